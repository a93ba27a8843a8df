"""Products with weights against NumPy's, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txl_jax.product import product


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("lead", [(5,), (3, 5)])
@pytest.mark.parametrize(
    ("letters", "axes"), [("F", (6,)), ("NH", (2, 3)), ("CNH", (2, 3, 4))], ids=["1", "2", "3"]
)
def test_values_and_gradients(lead, letters, axes):
    x, weights, along = drawn(*lead, 7), drawn(7, *axes, seed=1), drawn(*lead, *axes, seed=2)
    got, pull = jax.vjp(product, jnp.asarray(x), jnp.asarray(weights))
    d_x, d_weights = pull(jnp.asarray(along))
    wide = np.float64(x), np.float64(weights), np.float64(along)
    for found, names, of in (
        (got, f"...D,D{letters}->...{letters}", wide[:2]),
        (d_x, f"D{letters},...{letters}->...D", wide[1:]),
        (
            d_weights,
            f"nD,n{letters}->D{letters}",
            [a.reshape(-1, *a.shape[len(lead) :]) for a in wide[::2]],
        ),
    ):
        np.testing.assert_allclose(found, np.einsum(names, *of), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_is_of_the_type_of_the_operands(dtype):
    x, weights = jnp.asarray(drawn(4, 7), dtype), jnp.asarray(drawn(7, 2, 3), dtype)
    out, pull = jax.vjp(product, x, weights)
    assert {array.dtype for array in (out, *pull(out))} == {jnp.dtype(dtype)}


def test_what_several_products_are_made_of_is_kept_once():
    x, one, other = jnp.asarray(drawn(3, 5, 7)), jnp.asarray(drawn(7, 2)), jnp.asarray(drawn(7, 4))

    def both(x, one, other):
        return product(x, one), product(x, other)

    kept = jax.eval_shape(lambda *a: jax.vjp(both, *a)[1], x, one, other)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == x.size + one.size + other.size
