"""Text token by token: what came before is in memory and never read again.

Letters: N samples, k tokens at once, L layers, M memory, D d_model, W recent tokens, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from txl_jax import sharding
from txl_jax.config import ModelConfig
from txl_jax.decoding import Sampling
from txl_jax.model import Memory, Recalled, TransformerXL, abstract
from txl_jax.sampling import discourage, sample

TOKENS_AT_ONCE = 16
"""Tokens that are drawn without asking the host, where nobody watches them appear."""


class PromptReader:
    """Reads a prompt into memory, a segment of tgt_len tokens at a time, the rest one by one."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh):
        graphdef, _ = abstract(cfg)
        self._tgt_len = cfg.tgt_len
        everywhere = sharding.repeated(mesh)

        def read(params: Any, memory: Any, inputs: jax.Array) -> Any:
            xl: TransformerXL = nnx.merge(graphdef, params)
            return xl.hidden(inputs, memory)[1]

        def recall(params: Any, memory: Memory) -> Memory | Recalled:
            return nnx.merge(graphdef, params).recall(memory, 1)

        self._empty = jax.jit(lambda: Memory.empty(cfg, batch=1), out_shardings=everywhere)
        self._read = jax.jit(read, out_shardings=everywhere, donate_argnums=1)
        self._recall = jax.jit(recall, out_shardings=everywhere)

    def __call__(self, params: Any, prompt: np.ndarray) -> Memory | Recalled:
        """Memory of one stream after all of prompt [n ≥ 1] but its last token.

        As `TransformerXL.recall` makes it for segments of one token.
        """
        memory = self._empty()
        inputs = np.asarray(prompt, np.int32)[None, :]
        whole = (inputs.shape[1] - 1) // self._tgt_len * self._tgt_len
        for start in range(0, whole, self._tgt_len):
            memory = self._read(params, memory, inputs[:, start : start + self._tgt_len])
        memory = self._recall(params, memory)
        for at in range(whole, inputs.shape[1] - 1):
            memory = self._read(params, memory, inputs[:, at : at + 1])
        return memory


def take_streams(memory: Any, rows: jax.Array) -> Any:
    """Memory, or Recalled, whose stream i is what stream rows[i] of `memory` was."""
    of_streams, *rest = memory
    return type(memory)(of_streams[:, rows], *rest)


class Drawn(NamedTuple):
    """The next tokens of each sample."""

    tokens: Any
    """int32 [N, k]."""
    log_probs: Any
    """float32 [N, k]: the model's, whatever the sampling has made of them."""


class _State(NamedTuple):
    """Where N samples stand."""

    memory: Memory | Recalled
    token: jax.Array
    """int32 [N]: the newest token, not yet in memory."""
    recent: jax.Array
    """int32 [N, W]: what `discourage` has to know."""
    keys: jax.Array
    """[N]: a random stream for each sample."""
    drawn: jax.Array
    """int32 scalar: tokens drawn so far."""


class Generator:
    """Continues a text, `samples` times at once, k tokens (`at_once`) between looks at them.

    Sample i draws from a random stream of its own, so that it is the same text however many others
    there are (but for rounding, which depends on the shape of a matrix product).

    Raises:
      UserError: a field of `sampling` cannot work.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: Mesh,
        sampling: Sampling,
        samples: int = 1,
        at_once: int = TOKENS_AT_ONCE,
    ):
        sampling.check()
        graphdef, _ = abstract(cfg)
        everywhere = sharding.repeated(mesh)
        self._read_prompt = PromptReader(cfg, mesh)
        self._n_token, self._remembered, self._at_once = cfg.n_token, sampling.remembered, at_once

        def begin(
            memory: Memory | Recalled, recent: jax.Array, token: jax.Array, key: jax.Array
        ) -> _State:
            return _State(
                take_streams(memory, jnp.zeros(samples, jnp.int32)),
                jnp.full(samples, token),
                jnp.tile(recent, (samples, 1)),
                jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(samples)),
                jnp.zeros((), jnp.int32),
            )

        def draw(log_probs: jax.Array, recent: jax.Array, key: jax.Array) -> jax.Array:
            return sample(discourage(log_probs, recent, sampling), sampling, key)

        def step(
            params: Any, layers: list[Any], state: _State
        ) -> tuple[_State, tuple[jax.Array, jax.Array]]:
            xl: TransformerXL = nnx.merge(graphdef, params)
            hidden, memory = xl.hidden(state.token[:, None], state.memory, layers=layers)
            log_probs = xl.log_probs(hidden[:, -1])
            keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.drawn)
            token = jax.vmap(draw)(log_probs, state.recent, keys)
            own = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
            window = jnp.concatenate([state.recent, token[:, None]], axis=1)
            recent = window[:, window.shape[1] - state.recent.shape[1] :]
            return _State(memory, token, recent, state.keys, state.drawn + 1), (token, own)

        def steps(params: Any, layers: list[Any], state: _State) -> tuple[_State, Drawn]:
            state, drawn = jax.lax.scan(lambda s, _: step(params, layers, s), state, length=at_once)
            return state, Drawn(*(values.T for values in drawn))

        self._begin = jax.jit(begin, out_shardings=everywhere)
        self._by_layer = jax.jit(
            lambda params: nnx.merge(graphdef, params).by_layer(), out_shardings=everywhere
        )
        self._steps = jax.jit(steps, out_shardings=everywhere, donate_argnums=2)

    def __call__(self, params: Any, prompt: np.ndarray, seed: int, tokens: int) -> Iterator[Drawn]:
        """The `tokens` tokens of each sample that follow `prompt` [n ≥ 1], k by k.

        The same seed gives the same ones. While the host looks at some, the next are computed.
        """
        memory = self._read_prompt(params, prompt)
        recent = np.full(self._remembered + len(prompt), self._n_token, np.int32)
        recent[self._remembered :] = prompt
        recent = recent[len(prompt) :]
        state = self._begin(memory, recent, np.int32(prompt[-1]), jax.random.key(seed))
        layers = self._by_layer(params)

        def dispatched(state: _State) -> Iterator[tuple[int, Drawn]]:
            for left in range(tokens, 0, -self._at_once):
                state, drawn = self._steps(params, layers, state)
                yield left, drawn

        ahead = itertools.chain(dispatched(state), [(0, None)])
        for (left, drawn), _ in itertools.pairwise(ahead):
            assert drawn is not None
            yield Drawn(*(np.asarray(values)[:, :left] for values in drawn))
