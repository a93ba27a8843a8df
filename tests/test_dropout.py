import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_jax.dropout import LEVELS, draw_seeds, dropout, relu_dropout, seeds_of

SEED = draw_seeds(jax.random.key(5))
ONES = jnp.ones((1000, 20))
"""All tests drop in this shape where they can: it is compiled once."""


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drops_at_the_rate(rate):
    kept = np.asarray(dropout(ONES, rate, SEED)) != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / kept.size)


def test_the_smallest_rate_drops_one_in_65536():
    n = 1 << 22
    dropped = int((dropout(jnp.ones(n), 1 / LEVELS, SEED) == 0).sum())
    expected = n / LEVELS
    assert abs(dropped - expected) < 5 * math.sqrt(expected)


@given(st.integers(1, LEVELS - 1), st.floats(-0.49, 0.49))
def test_the_scale_is_unbiased_for_the_rounded_rate(level, off):
    out = np.asarray(dropout(ONES, (level + off) / LEVELS, SEED))
    # Whatever is kept has this value; a rate near 1 keeps nothing of so few.
    scales = set(out[out != 0].tolist())
    assert all(scale * (1 - level / LEVELS) == pytest.approx(1, rel=1e-7) for scale in scales)
    assert scales or level > 0.999 * LEVELS


def test_what_is_kept_is_scaled_and_the_rest_is_zero():
    x = np.random.default_rng(1).standard_normal(ONES.shape)
    out = np.asarray(dropout(jnp.asarray(x, jnp.float32), 0.25, SEED))
    kept = out != 0
    np.testing.assert_allclose(out[kept], x[kept] / 0.75, rtol=1e-6)
    assert 0.7 < kept.mean() < 0.8


def test_the_seed_alone_decides():
    same = dropout(ONES, 0.5, SEED)
    np.testing.assert_array_equal(same, dropout(ONES, 0.5, SEED))
    other = dropout(ONES, 0.5, draw_seeds(jax.random.key(6)))
    # Half of the entries agree by chance.
    assert 0.4 < float((same == other).mean()) < 0.6


def test_entries_are_dropped_independently():
    kept = np.asarray(dropout(ONES, 0.5, SEED)) > 0
    correlation = np.corrcoef(kept, rowvar=False) - np.eye(kept.shape[1])
    assert abs(correlation).max() < 5 / math.sqrt(len(kept))


@pytest.mark.parametrize("rate, seed", [(0.0, SEED), (0.5, None), (0.4 / LEVELS, SEED)])
def test_nothing_to_do_gives_x_itself(rate, seed):
    assert dropout(ONES, rate, seed) is ONES


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_type_stays(dtype):
    out = dropout(ONES.astype(dtype), 0.5, SEED)
    assert out.dtype == dtype
    assert set(np.unique(out.astype(jnp.float32))) == {0.0, 2.0}


def test_gradient_passes_only_where_kept():
    out, pull = jax.vjp(lambda x: dropout(x, 0.2, SEED), ONES)
    (gradient,) = pull(ONES)
    np.testing.assert_allclose(gradient, np.where(np.asarray(out) != 0, 1.25, 0.0), rtol=1e-4)


def test_with_a_seed_for_each_row_rows_are_dropped_each_by_its_own():
    seeds = seeds_of(SEED, jnp.asarray([4, 7, 4]))
    out = np.asarray(dropout(jnp.ones((3, 1000)), 0.5, seeds))
    np.testing.assert_array_equal(out[0], out[2])
    assert 0.4 < (out[0] != out[1]).mean() < 0.6
    alone = dropout(jnp.ones((1, 1000)), 0.5, seeds_of(SEED, jnp.asarray([7])))
    np.testing.assert_array_equal(alone[0], out[1])
    assert 0.4 < (out[1] == 0).mean() < 0.6


def test_dropping_is_not_multiplying():
    """0 x inf would be NaN; a dropped entry is 0 whatever it was."""
    assert set(np.unique(dropout(ONES * jnp.inf, 0.5, SEED))) == {0.0, np.inf}


@pytest.mark.parametrize("rate, seed", [(0.3, SEED), (0.0, SEED), (0.3, None)])
def test_with_relu_values_and_gradients_are_those_of_both_in_turn(rate, seed):
    x, d_out = np.random.default_rng(2).standard_normal((2, *ONES.shape)).astype(np.float32)
    x[0] = 0.0
    out, pull = jax.vjp(lambda x: relu_dropout(x, rate, seed), jnp.asarray(x))
    plain, pull_plain = jax.vjp(lambda x: dropout(jax.nn.relu(x), rate, seed), jnp.asarray(x))
    np.testing.assert_array_equal(out, plain)
    np.testing.assert_allclose(pull(jnp.asarray(d_out))[0], pull_plain(jnp.asarray(d_out))[0])


def test_with_relu_the_backward_pass_has_only_the_output_kept_for_it():
    out, pull = jax.vjp(lambda x: relu_dropout(x, 0.3, SEED), ONES)
    (kept,) = jax.tree.leaves(pull)
    np.testing.assert_array_equal(kept, out)
