"""Text from a trained model: `python -m txl_jax.generate --logdir DIR --prompt "def main("`.

Letters: B batch, T segment, V vocabulary.
"""

import codecs
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from txl_jax import sharding
from txl_jax.config import ModelConfig, parse_words
from txl_jax.errors import UserError, run_command
from txl_jax.model import Memory, TransformerXL, abstract
from txl_jax.trained import load_trained


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's probabilities."""

    temperature: float = 1.0
    """Below 1 sharper, above 1 flatter than the model's; 0: always the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""

    def check(self) -> None:
        """Raises UserError, in one line, for the first field that cannot work."""
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it has to be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it has to be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it has to be above 0 and at most 1")


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


class Generator:
    """Continues a text token by token; what came before is in memory and never read again.

    Raises:
      UserError: a field of `sampling` cannot work.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, sampling: Sampling):
        sampling.check()
        graphdef, _ = abstract(cfg)
        self._cfg = cfg
        everywhere = self._everywhere = sharding.repeated(mesh)

        def read(params: Any, memory: Memory, inputs: jax.Array) -> tuple[jax.Array, Memory]:
            xl: TransformerXL = nnx.merge(graphdef, params)
            hidden, memory = xl.hidden(inputs, memory)
            return xl.log_probs(hidden[0, -1]), memory

        def draw(params: Any, memory: Memory, inputs: jax.Array, key: jax.Array, drawn: jax.Array):
            logits, memory = read(params, memory, inputs)
            token = sample(logits, sampling, jax.random.fold_in(key, drawn))
            return token[None, None], memory

        def compiled(function: Callable) -> Callable:
            return jax.jit(function, out_shardings=everywhere, donate_argnums=1)

        self._empty = jax.jit(lambda: Memory.empty(cfg, batch=1), out_shardings=everywhere)
        self._read, self._draw = compiled(read), compiled(draw)

    def __call__(self, params: Any, prompt: np.ndarray, seed: int) -> Iterator[int]:
        """Endless tokens that follow `prompt` [n ≥ 1]; the same seed gives the same ones."""
        memory = self._empty()
        last = np.asarray(prompt, np.int32)[None, :]
        whole = (last.shape[1] - 1) // self._cfg.tgt_len * self._cfg.tgt_len
        cuts = [*range(0, whole, self._cfg.tgt_len), *range(whole, last.shape[1])]
        for start, stop in itertools.pairwise(cuts):
            _, memory = self._read(params, memory, last[:, start:stop])
        # Placed as a drawn token is: otherwise the second one would compile anew.
        token = jax.device_put(last[:, -1:], self._everywhere)
        key = jax.random.key(seed)
        for drawn in itertools.count():
            token, memory = self._draw(params, memory, token, key, np.int32(drawn))
            yield int(np.asarray(token)[0, 0])


@dataclass(frozen=True)
class Arguments:
    """What to write."""

    logdir: str
    """Folder of the run."""
    prompt: str = ""
    """Text to continue; empty: start a document."""
    tokens: int = 200
    """How many tokens to write."""
    checkpoint: Literal["best", "latest"] = "best"
    """The step with the lowest validation loss, or the newest."""
    mem_len: int | None = None
    """Hidden states that are remembered for each layer; None: as in training."""
    seed: int = 0
    """The same seed writes the same text."""
    sampling: Sampling = field(default_factory=Sampling)


def main(words: list[str]) -> None:
    args = parse_words(Arguments, None, "python -m txl_jax.generate", __doc__ or "", words)
    if args.tokens < 1:
        raise UserError(f"tokens is {args.tokens}; it has to be at least 1")
    mesh = sharding.make_mesh()
    trained = load_trained(Path(args.logdir), args.checkpoint, mesh)
    prompt = trained.vocab.encode(os.fsencode(args.prompt))
    if not prompt.size:
        prompt = trained.vocab.start
    cfg = trained.cfg.model
    if args.mem_len is not None:
        cfg = dataclasses.replace(cfg, mem_len=args.mem_len)
    generator = Generator(cfg, mesh, args.sampling)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    # A prompt may end inside a character, which the first tokens then complete.
    print(utf8.decode(os.fsencode(args.prompt)), end="", flush=True)
    started = 0.0
    tokens = generator(trained.params, prompt, args.seed)
    for written, token in enumerate(itertools.islice(tokens, args.tokens)):
        if written == 0:
            started = time.perf_counter()  # the first token waits for compilation
        print(utf8.decode(trained.vocab.decode([token])), end="", flush=True)
    print(utf8.decode(b"", final=True))
    if args.tokens > 1:
        rate = (args.tokens - 1) / (time.perf_counter() - started)
        print(f"{args.tokens} tokens, {rate:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
