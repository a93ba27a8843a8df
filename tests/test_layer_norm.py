import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txl_jax.layer_norm import LAYER_NORM_EPS, layer_norm

SHAPE = (3, 5, 16)


def arguments(dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal
    x, scale, bias = 2 * draw(SHAPE) + 1, 1 + draw(SHAPE[-1:]), draw(SHAPE[-1:])
    return jnp.asarray(x, dtype), jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)


def plain(x, scale, bias):
    wide = x.astype(jnp.float32)
    normal = (wide - wide.mean(-1, keepdims=True)) / jnp.sqrt(
        wide.var(-1, keepdims=True) + LAYER_NORM_EPS
    )
    return (normal * scale + bias).astype(x.dtype)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_the_formula(dtype, bound):
    a = arguments(dtype)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), dtype)
    (out, pull), (expected, pull_plain) = jax.vjp(layer_norm, *a), jax.vjp(plain, *a)
    for own, formula in zip((out, *pull(d_out)), (expected, *pull_plain(d_out)), strict=True):
        assert own.dtype == formula.dtype
        own, formula = np.asarray(own, np.float64), np.asarray(formula, np.float64)
        np.testing.assert_allclose(own, formula, rtol=0, atol=bound * abs(formula).max())


def test_gradients_are_those_of_finite_differences():
    x, scale, bias = (np.asarray(a, np.float64) for a in arguments())
    weights = np.random.default_rng(2).standard_normal(SHAPE)

    def total(x):
        centred = x - x.mean(-1, keepdims=True)
        normal = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)
        return (weights * (normal * scale + bias)).sum()

    _, pull = jax.vjp(layer_norm, *arguments())
    own = pull(jnp.asarray(weights, jnp.float32))[0]
    for place in [(0, 0, 0), (1, 3, 7), (2, 4, 15)]:
        step = np.zeros(SHAPE)
        step[place] = 1e-5
        slope = (total(x + step) - total(x - step)) / 2e-5
        assert float(own[place]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_a_row_of_one_value_is_its_bias():
    _, scale, bias = arguments()
    np.testing.assert_allclose(layer_norm(jnp.full(SHAPE, 3.0), scale, bias)[0, 0], bias, rtol=1e-6)


def test_the_backward_pass_has_x_kept_for_it_and_no_other_array_like_it():
    a = arguments(jnp.bfloat16)
    _, pull = jax.vjp(layer_norm, *a)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= a[0].size]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(SHAPE, jnp.bfloat16)]
