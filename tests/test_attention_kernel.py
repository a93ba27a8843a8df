"""The fused kernel, run as ordinary operations, against the plain form: values and gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txl_jax import attention, attention_kernel
from txl_jax.attention_kernel import fused_attention
from txl_jax.dropout import keeps, seeds_of

TILE = 16
SEED = jnp.asarray([3, 4], jnp.uint32)
SHAPES = [
    pytest.param((2, 32, 16, 1, 16), 16, False, id="whole tiles", marks=pytest.mark.slow),
    pytest.param((2, 21, 37, 2, 5), 19, False, id="odd sizes, memory half filled"),
    pytest.param((1, 19, 0, 2, 8), 0, False, id="no memory", marks=pytest.mark.slow),
    pytest.param((1, 17, 40, 2, 8), 0, False, id="empty memory", marks=pytest.mark.slow),
    pytest.param((1, 40, 70, 1, 8), 33, True, id="same length, tiles that nobody sees"),
]
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def arguments(shape: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.Array]:
    batch, tgt_len, mem_len, n_head, d_head = shape
    draw, heads, n_keys = (
        np.random.default_rng(0).standard_normal,
        (n_head, d_head),
        mem_len + tgt_len,
    )
    shapes = [
        (batch, tgt_len, *heads),
        *[(batch, n_keys, *heads)] * 2,
        (n_keys, *heads),
        heads,
        heads,
    ]
    return [jnp.asarray(draw(shape), dtype) for shape in shapes]


def plain(mem_len: int, filled: int, same_length: bool, *a: jax.Array) -> jax.Array:
    seen = attention.visible(a[0].shape[1], mem_len, jnp.int32(filled), same_length)
    return attention.relative_attention(a[0], a[1], a[2], a[3], a[4], a[5], seen)


def fused(filled: int, same_length: bool, *a: jax.Array, **options: Any) -> jax.Array:
    settings = {"tile": TILE, "interpret": True} | options
    return fused_attention(
        a[0], a[1], a[2], a[3], a[4], a[5], jnp.int32(filled), same_length, **settings
    )


def both(function: Any, a: list[jax.Array]) -> tuple[jax.Array, ...]:
    """What a function gives, and the gradients of a sum over it with random weights."""
    weights = np.random.default_rng(1).standard_normal(a[0].shape).astype(np.float32)

    def total(*a: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*a)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grads, out = compiled(jax.grad(total, range(6), has_aux=True))(*a)
    return (out, *grads)


def assert_near(found: tuple[jax.Array, ...], expected: tuple[jax.Array, ...], most: float) -> None:
    """Differences in parts of the largest entry."""
    names = ("out", "q", "k", "v", "r", "r_w_bias", "r_r_bias")
    for name, got, want in zip(names, found, expected, strict=True):
        largest = np.abs(want).max()
        np.testing.assert_allclose(
            np.float32(got) / largest, want / largest, rtol=0, atol=most, err_msg=name
        )


@pytest.mark.parametrize(("shape", "filled", "same_length"), SHAPES)
def test_values_and_gradients_are_those_of_the_plain_form(shape, filled, same_length):
    a = arguments(shape)
    expected = both(partial(plain, shape[2], filled, same_length), a)
    assert_near(both(partial(fused, filled, same_length), a), expected, 3e-6)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        pytest.param(jnp.bfloat16, 1.5e-2, marks=pytest.mark.slow),
        (jnp.float16, 2e-3),
    ],
)
def test_in_16_bits_it_is_off_by_their_rounding(dtype, most):
    shape, filled = (2, 33, 30, 2, 16), 30
    a = arguments(shape, dtype)
    exact = both(partial(plain, shape[2], filled, False), [x.astype(jnp.float32) for x in a])
    found = both(partial(fused, filled, False), a)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert_near(found, exact, most)


def test_dropout_is_that_of_the_weights_it_says():
    shape, rate = (2, 20, 13, 2, 8), 0.3
    batch, tgt_len, mem_len, n_head, _ = shape
    a, seeds = arguments(shape), seeds_of(SEED, jnp.arange(batch))
    rows, n_keys = 32, 48  # in whole tiles, with a key for each of the rows
    place = jnp.arange(n_head * rows * n_keys, dtype=jnp.uint32).reshape(n_head, rows, n_keys)
    dropped = round(rate * 2**16)
    kept = jax.vmap(lambda seed: keeps((seed[0], seed[1]), place, dropped))(seeds)
    assert abs(float(kept.mean()) - (1 - rate)) < 0.01
    kept = kept[:, :, :tgt_len, : mem_len + tgt_len]
    mask = attention.visible(tgt_len, mem_len, jnp.int32(mem_len), False).mask

    def expected(q, k, v, r, r_w_bias, r_r_bias):
        score = jnp.einsum("BTNH,BSNH->BNTS", q + r_w_bias, k)
        score += attention.shift(jnp.einsum("BTNH,SNH->BNTS", q + r_r_bias, r))
        weight = jax.nn.softmax(jnp.where(mask, score / 8**0.5, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", jnp.where(kept, weight / (1 - rate), 0), v)

    found = both(partial(fused, mem_len, False, dropatt=rate, seeds=seeds), a)
    assert_near(found, both(expected, a), 1e-4)  # the rate is rounded to a part of 2**16


def test_dropout_of_a_sequence_does_not_depend_on_the_others():
    a, seeds = arguments((3, 18, 10, 2, 8)), seeds_of(SEED, jnp.arange(3))
    of = compiled(lambda seeds, *a: fused(10, False, *a, dropatt=0.5, seeds=seeds))
    whole = of(seeds, *a)
    alone = of(seeds[1:2], *(x[1:2] for x in a[:3]), *a[3:])
    np.testing.assert_array_equal(alone[0], whole[1])
    assert not np.array_equal(of(seeds[:1], *(x[1:2] for x in a[:3]), *a[3:])[0], whole[1])


@pytest.mark.parametrize(("dtype", "dropatt"), [(jnp.bfloat16, 0.0), (jnp.float16, 0.1)])
def test_gpus_get_three_kernels_and_no_array_of_all_scores(dtype, dropatt):
    """As far as that can be told where there is none."""
    shape = (2, 192, 192, 8, 64)
    seeds = seeds_of(SEED, jnp.arange(2))

    def total(*a: jax.Array) -> jax.Array:
        out = fused(192, False, *a, tile=64, interpret=False, dropatt=dropatt, seeds=seeds)
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(total, range(6))).trace(*arguments(shape, dtype))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
    assert "192x384x" not in text


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine without a GPU")
def test_without_a_gpu_the_plain_form_is_taken(monkeypatch):
    monkeypatch.delattr(attention_kernel, "fused_attention")
    a = arguments((1, 32, 16, 1, 16), jnp.bfloat16)
    assert plain(16, 16, False, *a).dtype == jnp.bfloat16
