"""Products of activations with weights.

Letters: D and F the widths before and after, n all rows of activations.
"""

import math

import jax
import jax.numpy as jnp


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """x [..., D] times weights [D, ...]: both of one type, and so is what comes out.

    Forward and backward these are products of matrices that nobody has to transpose: XLA for CPUs
    would copy weights that have more axes, and the gradient of what comes out, at each layer.
    """
    width, *axes = weights.shape
    out = _product(x, weights.reshape(width, math.prod(axes)))
    return out.reshape(*x.shape[:-1], *axes)


@jax.custom_vjp
def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[..., D] times [D, F]."""
    return jnp.einsum("...D,DF->...F", x, weights)


def _product_forward(x, weights):
    # x as it is: other products keep the same for their backward passes.
    return _product(x, weights), (x, weights)


def _product_backward(kept, gradient):
    x, weights = kept
    rows = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    # JAX's own rule gives [F, D], and turns that.
    d_weights = jnp.einsum("nD,nF->DF", *rows)
    return jnp.einsum("...F,DF->...D", gradient, weights), d_weights


_product.defvjp(_product_forward, _product_backward)
