"""Attention against one that is written as the paper reads: a loop over queries and keys."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_jax.attention import relative_attention, shift, sinusoid, visible
from txl_jax.dropout import dropout


class Arguments(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    w_r: np.ndarray
    """[D, N, H]: makes the key of a distance from its sinusoid."""
    r_w_bias: np.ndarray
    r_r_bias: np.ndarray


def arguments(
    batch: int, tgt_len: int, mem_len: int, n_head: int, d_head: int, d_model: int = 6
) -> Arguments:
    draw = np.random.default_rng(7).standard_normal
    n_keys = mem_len + tgt_len
    return Arguments(
        draw((batch, tgt_len, n_head, d_head)),
        draw((batch, n_keys, n_head, d_head)),
        draw((batch, n_keys, n_head, d_head)),
        draw((d_model, n_head, d_head)),
        draw((n_head, d_head)),
        draw((n_head, d_head)),
    )


def literal_sinusoid(distance: int, d_model: int) -> list[float]:
    angles = [distance / 10000 ** (i / d_model) for i in range(0, d_model, 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def literal_attention(
    a: Arguments, filled: int, same_length: bool = False, clamp_len: int = -1
) -> np.ndarray:
    """What a query gets from the keys that it sees, one query, one head, one key at a time."""
    batch, tgt_len, n_head, d_head = a.q.shape
    n_keys = a.k.shape[1]
    mem_len = n_keys - tgt_len
    names = [literal_sinusoid(d, a.w_r.shape[0]) for d in range(n_keys)]
    out = np.zeros(a.q.shape)
    for b, i, n in np.ndindex(batch, tgt_len, n_head):
        scores = {}
        for j in range(mem_len - filled, mem_len + i + 1):
            distance = mem_len + i - j
            if same_length and distance >= mem_len:
                continue
            counted = min(distance, clamp_len) if clamp_len >= 0 else distance
            content = (a.q[b, i, n] + a.r_w_bias[n]) @ a.k[b, j, n]
            position = (a.q[b, i, n] + a.r_r_bias[n]) @ (names[counted] @ a.w_r[:, n])
            scores[j] = (content + position) / math.sqrt(d_head)
        highest = max(scores.values())
        total = sum(math.exp(score - highest) for score in scores.values())
        for j, score in scores.items():
            out[b, i, n] += math.exp(score - highest) / total * a.v[b, j, n]
    return out


def attend(
    a: Arguments,
    filled: int,
    same_length: bool = False,
    clamp_len: int = -1,
    dropatt: float = 0.0,
    seeds: jax.Array | None = None,
) -> jax.Array:
    """The same by way of the functions under test, for arrays of NumPy too."""
    q, k, v, w_r, r_w_bias, r_r_bias = (jnp.asarray(array) for array in a)
    tgt_len, n_keys = q.shape[1], k.shape[1]
    names = sinusoid(n_keys, w_r.shape[0], clamp_len).astype(w_r.dtype)
    r = jnp.einsum("SD,DNH->SNH", names, w_r)
    seen = visible(tgt_len, n_keys - tgt_len, jnp.asarray(filled, jnp.int32), same_length)
    return relative_attention(q, k, v, r, r_w_bias, r_r_bias, seen, dropatt, seeds)


compiled = jax.jit(
    attend,
    static_argnames=("same_length", "clamp_len", "dropatt"),
    compiler_options={"xla_backend_optimization_level": 0},  # for small shapes, and many
)


def converted(a: Arguments, dtype: Any = np.float32) -> Arguments:
    return Arguments(*(array.astype(dtype) for array in a))


@settings(max_examples=15)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 7),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.data(),
)
def test_attention_is_the_literal_one(batch, tgt_len, mem_len, n_head, d_head, half_d, data):
    same_length = data.draw(st.booleans()) if mem_len else False
    clamp_len = data.draw(st.integers(-1, mem_len + tgt_len))
    filled = data.draw(st.integers(0, mem_len))
    a = arguments(batch, tgt_len, mem_len, n_head, d_head, 2 * half_d)
    got = compiled(converted(a), filled, same_length, clamp_len)
    expected = literal_attention(a, filled, same_length, clamp_len)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "filled, same_length, clamp_len", [(3, False, -1), (2, True, -1), (3, True, 2)]
)
def test_gradients_are_those_of_the_literal_one(filled, same_length, clamp_len):
    a = arguments(batch=1, tgt_len=2, mem_len=3, n_head=2, d_head=3, d_model=4)
    weight = np.random.default_rng(1).standard_normal(a.q.shape)

    def loss(a: Arguments) -> jax.Array:
        out = attend(a, filled, same_length, clamp_len)
        return (out * np.float32(weight)).sum()

    def literal_loss(a: Arguments) -> float:
        return float((literal_attention(a, filled, same_length, clamp_len) * weight).sum())

    gradients = jax.jit(jax.grad(loss))(converted(a))
    step = 1e-5
    for name, got in gradients._asdict().items():
        entries = getattr(a, name)
        slopes = np.zeros(entries.shape)
        for place in np.ndindex(entries.shape):
            ends = []
            for change in (step, -step):
                moved = entries.copy()
                moved[place] += change
                ends.append(literal_loss(a._replace(**{name: moved})))
            slopes[place] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(got, slopes, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 0.06)])
def test_gradients_with_dropatt_are_those_that_jax_finds_itself(dtype, tolerance):
    a = arguments(batch=3, tgt_len=4, mem_len=5, n_head=2, d_head=6, d_model=4)
    seeds, weight = jnp.asarray([5, 6], jnp.uint32), np.float32(np.random.default_rng(1).random())

    def loss(a: Arguments) -> jax.Array:
        return (attend(a, 4, dropatt=0.4, seeds=seeds).astype(jnp.float32) ** 2 * weight).sum()

    def plain_loss(a: Arguments) -> jax.Array:
        q, k, v, w_r, r_w_bias, r_r_bias = a
        r = jnp.einsum("SD,DNH->SNH", sinusoid(9, 4, -1), w_r)
        position = jnp.einsum("BTNH,SNH->BNTS", q + r_r_bias, r)
        score = jnp.einsum("BTNH,BSNH->BNTS", q + r_w_bias, k) + shift(position)
        mask = visible(4, 5, jnp.asarray(4), same_length=False).mask
        probability = jax.nn.softmax(jnp.where(mask, score / np.float32(6**0.5), -jnp.inf))
        out = jnp.einsum("BNTS,BSNH->BTNH", dropout(probability, 0.4, seeds), v)
        return (out**2 * weight).sum()

    a = converted(converted(a, dtype))  # the same numbers, as far as the type has them
    got = jax.jit(jax.grad(loss))(converted(a, dtype))
    for name, expected in jax.grad(plain_loss)(a)._asdict().items():
        size = abs(expected).max()
        found = np.asarray(getattr(got, name), np.float32)
        np.testing.assert_allclose(found, expected, atol=tolerance * size, err_msg=name)


@pytest.mark.parametrize("dtype, kept", [(jnp.float32, []), (jnp.bfloat16, [jnp.bfloat16])])
def test_the_backward_pass_has_no_float32_scores_kept_for_it(dtype, kept):
    a = converted(arguments(batch=3, tgt_len=4, mem_len=5, n_head=2, d_head=6), dtype)
    seeds = jnp.asarray([5, 6], jnp.uint32)
    _, backward = jax.vjp(lambda a: attend(a, 4, dropatt=0.4, seeds=seeds), a)
    large = [array for array in jax.tree.leaves(backward) if array.size >= 3 * 2 * 4 * 9]
    assert [array.dtype for array in large if array.shape == (3, 2, 4, 9)] == kept
    assert {array.shape for array in large} <= {(3, 2, 4, 9), a.k.shape}


@given(st.integers(1, 7), st.integers(0, 7), st.sampled_from([(), (2,), (2, 3)]))
@settings(max_examples=25)
def test_shift_brings_each_distance_to_its_key(tgt_len, mem_len, lead):
    n_keys = mem_len + tgt_len
    scores = np.arange(math.prod(lead) * tgt_len * n_keys).reshape(*lead, tgt_len, n_keys)
    shifted = np.asarray(jax.jit(shift)(scores.astype(np.int32)))
    assert shifted.shape == scores.shape
    for i in range(tgt_len):
        for j in range(mem_len + i + 1):
            distance = mem_len + i - j
            # Column c of the scores belongs to distance n_keys - 1 - c.
            expected = scores[..., i, n_keys - 1 - distance]
            np.testing.assert_array_equal(shifted[..., i, j], expected)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("tgt_len, mem_len", [(1, 1), (1, 4), (4, 1), (3, 7), (7, 3), (5, 5)])
def test_visible_are_self_past_and_filled_memory(tgt_len, mem_len, same_length):
    of = jax.jit(partial(visible, tgt_len, mem_len, same_length=same_length))
    for filled in range(mem_len + 1):
        seen = np.asarray(of(filled=np.int32(filled)).mask)
        assert seen.dtype == bool
        assert seen.shape == (tgt_len, mem_len + tgt_len)
        for i in range(tgt_len):
            keys = list(range(mem_len - filled, mem_len + i + 1))
            if same_length:
                keys = keys[-mem_len:]
                assert filled < mem_len or len(keys) == mem_len
            assert seen[i].nonzero()[0].tolist() == keys


def test_visible_without_memory_is_the_triangle():
    seen = visible(4, 0, jnp.int32(0), same_length=False).mask
    np.testing.assert_array_equal(seen, np.tri(4, dtype=bool))


@pytest.mark.parametrize("clamp_len", [-1, 0, 5, 400])
def test_sinusoids_count_down_to_distance_0(clamp_len):
    got = sinusoid(301, 10, clamp_len)
    distances = range(300, -1, -1)
    if clamp_len >= 0:
        distances = [min(distance, clamp_len) for distance in distances]
    expected = [literal_sinusoid(distance, 10) for distance in distances]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_bfloat16_is_close_to_float32():
    a = arguments(batch=2, tgt_len=5, mem_len=7, n_head=2, d_head=8)
    a = converted(a, jnp.bfloat16)
    got = compiled(a, 7)
    assert got.dtype == jnp.bfloat16
    # What is left is the rounding of r, of the sums with the biases, and of the weights.
    expected = literal_attention(converted(a, np.float64), 7)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.05)


def test_bfloat16_scores_are_summed_and_normalised_in_float32():
    a = arguments(batch=2, tgt_len=5, mem_len=7, n_head=2, d_head=8)
    none = np.zeros_like(a.r_w_bias)
    # Scores of about 20: rounded to 8 bits, the weights would be wrong by several percent.
    a = a._replace(q=16 * a.q, w_r=np.zeros_like(a.w_r), r_w_bias=none, r_r_bias=none)
    a = converted(a, jnp.bfloat16)
    expected = literal_attention(converted(a, np.float64), 7)
    np.testing.assert_allclose(np.asarray(compiled(a, 7), np.float64), expected, atol=0.012)


def test_dropatt_hits_the_weights_after_the_softmax():
    # A single key, of weight 1 and value 1.
    a = arguments(batch=60, tgt_len=1, mem_len=0, n_head=50, d_head=1)
    a = converted(a._replace(v=np.ones_like(a.v)))
    kept = np.asarray(compiled(a, 0, dropatt=0.75, seeds=jnp.asarray([0, 1], jnp.uint32)))[
        :, 0, :, 0
    ]
    assert set(np.unique(kept)) == {0.0, 4.0}
    # Every sequence and every head has its own mask.
    assert abs(kept.mean() - 1) < 0.2
    assert abs(kept.mean(0) - 1).max() < 1
    assert abs(kept.mean(1) - 1).max() < 1


def test_dropatt_keeps_the_mean_and_without_seeds_does_nothing():
    a = converted(arguments(batch=1, tgt_len=3, mem_len=4, n_head=2, d_head=2))
    q, k, v = (np.tile(array, (4000, 1, 1, 1)) for array in (a.q, a.k, a.v))
    a = a._replace(q=q, k=k, v=v)
    plain = np.asarray(compiled(a, 4))
    np.testing.assert_array_equal(compiled(a, 4, dropatt=0.3), plain)
    samples = np.asarray(compiled(a, 4, dropatt=0.3, seeds=jnp.asarray([3, 4], jnp.uint32)))
    error = samples.std(0) / math.sqrt(len(samples))
    assert (error > 0).all()
    assert (abs(samples.mean(0) - plain[0]) < 5 * error).all()
