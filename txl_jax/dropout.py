"""Dropout with explicit seeds; there is no training mode and no hidden random state.

A seed is two uint32 words. What is dropped is a hash of the seed and of an entry's place, which
costs less than to draw random bits and can be had again in the backward pass: nothing is kept.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

_BITS = 16
LEVELS = 1 << _BITS
"""Rates of dropout are rounded to multiples of 1 / LEVELS."""


def dropout(x: jax.Array, rate: float, seeds: jax.Array | None) -> jax.Array:
    """Zeroes entries of x with probability `rate` and scales the others so that the mean stays.

    Without seeds, or with rate 0, x itself.

    Args:
      seeds: uint32 [2], or [B, 2], one for each entry of the leading axis of x. The entries of
        [B, ...] that belong to one seed, or all of them, are 2**32 at most.
    """
    dropped = round(rate * LEVELS)
    if seeds is None or dropped == 0:
        return x
    return _dropout(dropped, x, seeds)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropout(dropped: int, x: jax.Array, seeds: jax.Array) -> jax.Array:
    shape = x.shape[seeds.ndim - 1 :]
    place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    first, second = (seeds[..., i].reshape(-1, *(1,) * len(shape)) for i in (0, 1))
    kept = keeps((first, second), place, dropped).reshape(x.shape)
    return jnp.where(kept, x * jnp.asarray(kept_scale(dropped), x.dtype), jnp.zeros((), x.dtype))


def _forward(dropped: int, x: jax.Array, seeds: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _dropout(dropped, x, seeds), seeds


def _backward(dropped: int, seeds: jax.Array, d_out: jax.Array) -> tuple[jax.Array, None]:
    return _dropout(dropped, d_out, seeds), None


_dropout.defvjp(_forward, _backward)


def relu_dropout(x: jax.Array, rate: float, seeds: jax.Array | None) -> jax.Array:
    """`dropout(relu(x), rate, seeds)`; the backward pass needs no more of it than what it gives."""
    return _relu_dropout(0 if seeds is None else round(rate * LEVELS), x, seeds)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _relu_dropout(dropped: int, x: jax.Array, seeds: jax.Array | None) -> jax.Array:
    return dropout(jax.nn.relu(x), dropped / LEVELS, seeds)


def _relu_forward(dropped: int, x: jax.Array, seeds: jax.Array | None) -> tuple[Any, Any]:
    out = _relu_dropout(dropped, x, seeds)
    return out, out


def _relu_backward(dropped: int, out: jax.Array, d_out: jax.Array) -> tuple[jax.Array, None]:
    scale = jnp.asarray(kept_scale(dropped), d_out.dtype)
    return jnp.where(out > 0, d_out * scale, jnp.zeros((), d_out.dtype)), None


_relu_dropout.defvjp(_relu_forward, _relu_backward)


def kept_scale(dropped: int) -> float:
    """What an entry that is kept is multiplied by; `dropped` is the rate x LEVELS."""
    return LEVELS / (LEVELS - dropped)


def keeps(seed: tuple[Any, Any], place: jax.Array, dropped: int) -> jax.Array:
    """Whether dropout keeps the entries at `place`, uint32, with a seed's two words.

    Words and place are broadcast against one another; `dropped` is the rate x LEVELS.
    """
    return (_mixed(seed, place) >> jnp.uint32(32 - _BITS)) >= jnp.uint32(dropped)


def draw_seeds(key: jax.Array, *shape: int) -> jax.Array:
    """Seeds uint32 [*shape, 2]."""
    return jax.random.bits(key, (*shape, 2), jnp.uint32)


def seeds_of(seed: jax.Array, sequences: jax.Array) -> jax.Array:
    """A seed for each sequence, uint32 [B, 2]: it depends on its number and on nothing else.

    So a sequence meets the same dropout on whatever device, and in whatever part of a batch, it is.

    Args:
      seed: uint32 [2].
      sequences: int32 [B], numbers of the sequences in the whole batch, below 2**31.
    """
    numbers = 2 * sequences.astype(jnp.uint32)[:, None] + jnp.arange(2, dtype=jnp.uint32)
    return _mixed((seed[0], seed[1]), numbers)


def _mixed(seed: tuple[Any, Any], place: jax.Array) -> jax.Array:
    """Two rounds of the 32-bit mixer of MurmurHash3 (Appleby), each begun with a word."""
    mixed = place
    for word in seed:
        mixed = mixed ^ word
        mixed = (mixed ^ (mixed >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        mixed = mixed ^ (mixed >> jnp.uint32(16))
    return mixed
