"""How the next token is drawn from the model's log-probabilities.

Letters: V vocabulary, W repeat_window.
"""

import jax
import jax.numpy as jnp

from txl_jax.decoding import Sampling


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
