"""Tokens read one by one give what a segment of one token gives to the model itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_model import POST, PRE, B, M, build, garbage, random_params, to_jax, tokens
from txl_jax.config import ModelConfig
from txl_jax.decoder import Cache, Decoder
from txl_jax.model import Memory

ROOM = 3
LENGTH = M + 2 * ROOM + 1
"""Tokens: what was in memory has gone in the end, and there was no room three times."""
CONFIGS = {
    "attn_type=0": POST,
    "attn_type=0, pre_lnorm, untied biases, clamp_len": PRE,
    "attn_type=0, same_length": dataclasses.replace(POST, same_length=True),
    "attn_type=1": dataclasses.replace(POST, attn_type=1, clamp_len=4, pre_lnorm=True),
    "attn_type=2": dataclasses.replace(POST, attn_type=2),
    "attn_type=3": dataclasses.replace(POST, attn_type=3, d_head=4),
    "no memory": dataclasses.replace(POST, mem_len=0),
}


def read(cfg: ModelConfig, filled: int) -> tuple[list[jax.Array], list[jax.Array], Any]:
    """Outputs [B, D] of both ways after each token, and the last cache."""
    decoder, params = Decoder(cfg, ROOM), random_params(cfg)
    inputs = to_jax(tokens(LENGTH)[0])

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(memory: Memory) -> Any:
        xl = build(cfg, params)
        layers, cache = decoder.fix(xl), decoder.begin(xl, memory)
        expected, found = [], []
        for i in range(LENGTH):
            if i % ROOM == 0:
                cache = decoder.make_room(cache)
            hidden, memory = xl.hidden(inputs[:, i : i + 1], memory)
            expected.append(hidden[:, 0])
            one, cache = decoder.read(xl, layers, cache, inputs[:, i])
            found.append(one)
        return expected, found, cache

    return both(garbage(cfg, filled))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("filled", [0, M - 1])
def test_it_is_the_model_token_by_token(name, filled):
    cfg = CONFIGS[name]
    expected, found, cache = read(cfg, min(filled, cfg.mem_len))
    assert isinstance(cache, Cache) == (name not in ("attn_type=2", "attn_type=3", "no memory"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_in_16_bits_it_is_as_close_as_rounding_lets_it_be():
    expected, found, _ = read(dataclasses.replace(POST, dtype="bfloat16"), M)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=0.12)


def test_room_is_made_at_any_time():
    cfg = CONFIGS["attn_type=0"]
    decoder, xl = Decoder(cfg, ROOM), build(cfg, random_params(cfg))
    layers, cache = decoder.fix(xl), decoder.begin(xl, garbage(cfg, M))
    inputs = to_jax(tokens(4)[0])
    often = seldom = decoder.make_room(cache)
    for i in range(3):
        often, seldom = decoder.make_room(often), seldom
        one, often = decoder.read(xl, layers, often, inputs[:, i])
        other, seldom = decoder.read(xl, layers, seldom, inputs[:, i])
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_streams_are_taken_as_they_are():
    cfg = CONFIGS["attn_type=0"]
    decoder, xl = Decoder(cfg, ROOM), build(cfg, random_params(cfg))
    layers, cache = decoder.fix(xl), decoder.make_room(decoder.begin(xl, garbage(cfg, M)))
    token, rows = to_jax(tokens(1)[0])[:, 0], jnp.asarray([2, 0])
    whole, _ = decoder.read(xl, layers, cache, token)
    some, _ = decoder.read(xl, layers, decoder.take_streams(cache, rows), token[rows])
    assert whole.shape[0] == B
    np.testing.assert_allclose(some, whole[rows], rtol=1e-5, atol=1e-6)
