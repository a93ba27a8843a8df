"""LAMB (You et al. 2020, arXiv 1904.00962): every tensor moves in proportion to its own norm.

A tensor is what the original's model calls one. Leaves of this model's parameters are sometimes
several of them (the layers are stacked) and sometimes a part of one (the original keeps queries,
keys and values in one matrix, and with div_val 1 all clusters of the vocabulary in one table).
Norms are those of the original's tensors, so that the same rates do the same as there.

Letters: L layers.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from txl_jax import original_tensors
from txl_jax.config import ModelConfig

Path = tuple[Hashable, ...]
"""Keys that lead to a leaf in a tree of dicts."""


class Tensor(NamedTuple):
    """Which tensor a leaf is; leaves with the same name are parts of one."""

    name: Hashable
    stacked: bool
    """Whether the leaf's leading axis L runs over tensors of the layers."""


def tensors(cfg: ModelConfig) -> dict[Path, Tensor]:
    """The original's tensors behind every parameter of a model of this config."""
    return {
        path: Tensor(source.names, source.stacked) for path, source in original_tensors.sources(cfg)
    }


def forks_ratio(weight_norm: jax.Array, update_norm: jax.Array) -> jax.Array:
    """The trust ratio of the scaling fork's LAMB (pytorch_lamb 1.0.0), elementwise.

    The weights' norm counts as 10 if it is more. Weights of norm 0 get ratio 0, so that a bias that
    starts at zero never moves. An update of norm 0 gets ratio 0 as well: no update, where the fork
    divides by zero and makes the weights NaN.
    """
    moves = update_norm > 0
    return jnp.where(moves, jnp.minimum(weight_norm, 10.0) / jnp.where(moves, update_norm, 1.0), 0)


def librarys_ratio(weight_norm: jax.Array, update_norm: jax.Array) -> jax.Array:
    """The trust ratio of optax.lamb, elementwise: 1 where one of the norms is 0."""
    defined = (weight_norm > 0) & (update_norm > 0)
    return jnp.where(defined, weight_norm / jnp.where(defined, update_norm, 1.0), 1.0)


def scale_by_trust_ratio(
    tensor_of: Mapping[Path, Tensor], ratio: Callable[[jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """Multiplies the update of every tensor by its trust ratio.

    Args:
      tensor_of: for the path of every leaf, which tensor it is.
      ratio: from the Euclidean norms of a tensor's weights and of its update.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        ratios = jax.tree.map(ratio, _norms(params, tensor_of), _norms(updates, tensor_of))

        def scaled(path, leaf):
            own = ratios[tensor_of[_keys(path)].name]
            return leaf * own.reshape(own.shape + (1,) * (leaf.ndim - own.ndim))

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _norms(tree: Any, tensor_of: Mapping[Path, Tensor]) -> dict[Hashable, jax.Array]:
    """Norm of every tensor, by name: float32 scalar, or [L] if it is stacked."""
    squares: dict[Hashable, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, stacked = tensor_of[_keys(path)]
        own = jnp.square(leaf).sum(axis=tuple(range(int(stacked), leaf.ndim)))
        squares[name] = squares[name] + own if name in squares else own
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def _keys(path: tuple[Any, ...]) -> Path:
    return tuple(entry.key for entry in path)
