"""Layer normalisation (Ba et al. 2016) over the last axis, with statistics in float32.

Letters: D d_model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

LAYER_NORM_EPS = 1e-5


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the last axis, then a scale and a bias, [D] each."""

    def __init__(self, d_model: int, init_std: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(1.0 + init_std * jax.random.normal(rngs.params(), (d_model,)))
        self.bias = nnx.Param(jnp.zeros((d_model,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] for x [..., D], in the type of x."""
        return layer_norm(x, self.scale[...], self.bias[...])


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D] normalised, times scale, plus bias, float32 [D] both; in the type of x.

    For the backward pass it keeps x in its own type and two numbers for each row: left to itself,
    JAX would keep two arrays like x in float32.
    """
    return _forward(x, scale, bias)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    spread = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    out = (wide - mean) * spread * scale + bias
    return out.astype(x.dtype), (x, mean, spread, scale)


def _backward(kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, spread, scale = kept
    d_out = d_out.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * spread
    d_normal = d_out * scale
    along = (d_normal * normal).mean(-1, keepdims=True)
    d_x = spread * (d_normal - d_normal.mean(-1, keepdims=True) - normal * along)
    rows = tuple(range(x.ndim - 1))
    return d_x.astype(x.dtype), (d_out * normal).sum(rows), d_out.sum(rows)


layer_norm.defvjp(_forward, _backward)
