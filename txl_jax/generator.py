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
from txl_jax.decoder import Cache, Decoder, FixedLayer
from txl_jax.decoding import Sampling
from txl_jax.model import Memory, TransformerXL, abstract
from txl_jax.sampling import discourage, sample

TOKENS_AT_ONCE = 16
"""Tokens that are drawn without asking the host, where nobody watches them appear."""


class PromptReader:
    """Reads a prompt, a segment of tgt_len tokens at a time, the rest one by one."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, decoder: Decoder):
        graphdef, _ = abstract(cfg)
        self._tgt_len, self._room = cfg.tgt_len, decoder.room
        everywhere = sharding.repeated(mesh)

        def read_segment(params: Any, memory: Memory, inputs: jax.Array) -> Memory:
            xl: TransformerXL = nnx.merge(graphdef, params)
            return xl.hidden(inputs, memory)[1]

        def begin(params: Any, memory: Memory) -> Cache | Memory:
            return decoder.begin(nnx.merge(graphdef, params), memory)

        def read(params: Any, layers: list[FixedLayer], cache: Any, token: jax.Array) -> Any:
            return decoder.read(nnx.merge(graphdef, params), layers, cache, token)[1]

        self._empty = jax.jit(lambda: Memory.empty(cfg, batch=1), out_shardings=everywhere)
        self._read_segment = jax.jit(read_segment, out_shardings=everywhere, donate_argnums=1)
        self._begin = jax.jit(begin, out_shardings=everywhere)
        self._make_room = jax.jit(decoder.make_room, out_shardings=everywhere)
        self._read = jax.jit(read, out_shardings=everywhere, donate_argnums=2)

    def __call__(self, params: Any, layers: list[FixedLayer], prompt: np.ndarray) -> Cache | Memory:
        """The cache of one stream after all of prompt [n ≥ 1] but its last token.

        `layers`: the parameters once more, as `Decoder.fix` gives them.
        """
        memory = self._empty()
        tokens = np.asarray(prompt, np.int32)[None, :-1]
        whole = tokens.shape[1] // self._tgt_len * self._tgt_len
        for start in range(0, whole, self._tgt_len):
            segment = tokens[:, start : start + self._tgt_len]
            memory = self._read_segment(params, memory, segment)
        cache = self._begin(params, memory)
        for i, token in enumerate(tokens[:, whole:].T):
            if i % self._room == 0:
                cache = self._make_room(cache)
            cache = self._read(params, layers, cache, token)
        return cache


class Drawn(NamedTuple):
    """The next tokens of each sample."""

    tokens: Any
    """int32 [N, k]."""
    log_probs: Any
    """float32 [N, k]: the model's, whatever the sampling has made of them."""


class _State(NamedTuple):
    """Where N samples stand."""

    cache: Cache | Memory
    token: jax.Array
    """int32 [N]: the newest token, not yet read."""
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
        decoder = Decoder(cfg, at_once)
        self._read_prompt = PromptReader(cfg, mesh, decoder)
        self._n_token, self._remembered, self._at_once = cfg.n_token, sampling.remembered, at_once

        def begin(
            cache: Cache | Memory, recent: jax.Array, token: jax.Array, key: jax.Array
        ) -> _State:
            return _State(
                decoder.take_streams(cache, jnp.zeros(samples, jnp.int32)),
                jnp.full(samples, token),
                jnp.tile(recent, (samples, 1)),
                jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(samples)),
                jnp.zeros((), jnp.int32),
            )

        def draw(log_probs: jax.Array, recent: jax.Array, key: jax.Array) -> jax.Array:
            return sample(discourage(log_probs, recent, sampling), sampling, key)

        def step(
            params: Any, layers: list[FixedLayer], state: _State
        ) -> tuple[_State, tuple[jax.Array, jax.Array]]:
            xl: TransformerXL = nnx.merge(graphdef, params)
            hidden, cache = decoder.read(xl, layers, state.cache, state.token)
            log_probs = xl.log_probs(hidden)
            keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.drawn)
            token = jax.vmap(draw)(log_probs, state.recent, keys)
            own = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
            window = jnp.concatenate([state.recent, token[:, None]], axis=1)
            recent = window[:, window.shape[1] - state.recent.shape[1] :]
            return _State(cache, token, recent, state.keys, state.drawn + 1), (token, own)

        def steps(params: Any, layers: list[FixedLayer], state: _State) -> tuple[_State, Drawn]:
            state = state._replace(cache=decoder.make_room(state.cache))
            state, drawn = jax.lax.scan(lambda s, _: step(params, layers, s), state, length=at_once)
            return state, Drawn(*(values.T for values in drawn))

        self._begin = jax.jit(begin, out_shardings=everywhere)
        self._fix = jax.jit(
            lambda params: decoder.fix(nnx.merge(graphdef, params)), out_shardings=everywhere
        )
        self._steps = jax.jit(steps, out_shardings=everywhere, donate_argnums=2)

    def __call__(self, params: Any, prompt: np.ndarray, seed: int, tokens: int) -> Iterator[Drawn]:
        """The `tokens` tokens of each sample that follow `prompt` [n ≥ 1], k by k.

        The same seed gives the same ones. While the host looks at some, the next are computed.
        """
        layers = self._fix(params)
        cache = self._read_prompt(params, layers, prompt)
        recent = np.full(self._remembered + len(prompt), self._n_token, np.int32)
        recent[self._remembered :] = prompt
        recent = recent[len(prompt) :]
        state = self._begin(cache, recent, np.int32(prompt[-1]), jax.random.key(seed))

        def dispatched(state: _State) -> Iterator[tuple[int, Drawn]]:
            for left in range(tokens, 0, -self._at_once):
                state, drawn = self._steps(params, layers, state)
                yield left, drawn

        ahead = itertools.chain(dispatched(state), [(0, None)])
        for (left, drawn), _ in itertools.pairwise(ahead):
            assert drawn is not None
            yield Drawn(*(np.asarray(values)[:, :left] for values in drawn))
