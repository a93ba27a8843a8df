"""How the next token is drawn from the model's log-probabilities.

Letters: V vocabulary, W repeat_window.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from txl_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: repetition first, then temperature, top_k and top_p."""

    temperature: float = 1.0
    """Below 1 sharper, above 1 flatter than the model's; 0: always the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Log-probabilities of recent tokens are multiplied by this (CTRL: 1.2); 1: they are not."""
    no_repeat_ngram: int = 0
    """Never write the same n tokens a second time; 0: they may be."""
    repeat_window: int = 512
    """How many of the newest tokens count as recent for these two, the prompt's included."""

    def check(self) -> None:
        """Raises UserError, in one line, for the first field that cannot work."""
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it has to be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it has to be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it has to be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it has to be above 0 (1: none, "
                "above 1: less repetition)"
            )
        if self.no_repeat_ngram < 0:
            raise UserError(
                f"no_repeat_ngram is {self.no_repeat_ngram}; it has to be 0 (no limit) or more"
            )
        if self.repeat_window < max(1, self.no_repeat_ngram):
            raise UserError(
                f"repeat_window is {self.repeat_window}; it has to be at least "
                f"{max(1, self.no_repeat_ngram)}, so that what it looks for fits into it"
            )

    @property
    def remembered(self) -> int:
        """How many of the newest tokens `discourage` has to be given."""
        controlled = self.repetition_penalty != 1 or self.no_repeat_ngram
        return self.repeat_window if controlled else 0


def discourage(log_probs: jax.Array, recent: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities [V], no longer normalised, with repetition made unlikely or impossible.

    The penalty is that of CTRL (Keskar et al. 2019, arXiv 1909.05858), which divides the score of a
    token that was seen before, so that a score below 0 has to be multiplied instead. Its scores are
    logits, which mean the same if a constant is added to all of them, while the penalty does not.
    Here it acts on the normalised log-probabilities, before temperature: none is above 0, so all of
    them are multiplied, and p becomes p ** penalty.

    Args:
      log_probs: float32 [V], normalised.
      recent: int32 [W], the newest tokens, the newest last; V where there was none.
      sampling: its `no_repeat_ngram` makes impossible what would complete n tokens that stand in
        recent already, unless that leaves no token at all.
    """
    nothing = jnp.zeros(log_probs.shape, bool)
    if sampling.repetition_penalty != 1:
        seen = nothing.at[recent].set(True, mode="drop")
        log_probs = jnp.where(seen, sampling.repetition_penalty * log_probs, log_probs)
    if n := sampling.no_repeat_ngram:
        first = jnp.arange(recent.shape[0] - n + 1)
        ngrams = recent[first[:, None] + jnp.arange(n)]
        begun = (ngrams[:, :-1] == recent[recent.shape[0] - n + 1 :]).all(-1)
        last = jnp.where(begun, ngrams[:, -1], log_probs.shape[0])
        banned = nothing.at[last].set(True, mode="drop")
        log_probs = jnp.where(banned & ~banned.all(), -jnp.inf, log_probs)
    return log_probs


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draws one token, int32 scalar, from logits [V]."""
    if sampling.temperature == 0:
        return logits.argmax().astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[0]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][-1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits)
        probability = jax.nn.softmax(logits[order])
        before = jnp.cumsum(probability) - probability
        kept = jnp.zeros(logits.shape, bool).at[order].set(before < sampling.top_p)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)
