"""Leaves of a state as checkpoints store them: by name, as arrays of numbers."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def by_name(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, such as `params/layers/w`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have the same name"
    return named


def describe(leaf: Any) -> str:
    """Type and shape, as `float32[2, 3]`."""
    return f"{leaf.dtype}[{', '.join(str(n) for n in leaf.shape)}]"


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
    """The leaf's own, or the first device for one that has none."""
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def words_of(leaf: Any) -> Any:
    """The leaf as numbers: a typed random key's are uint32 [..., words], others are themselves."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def like(leaf: Any, words: jax.Array) -> jax.Array:
    """Turns `words_of` back into a leaf of the type of `leaf`."""
    if not _is_key(leaf):
        return words
    implementations: list[Any] = []
    # key_impl reads the leaf's type but takes no ShapeDtypeStruct; what it gets here is a tracer.
    jax.eval_shape(lambda key: implementations.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(words, impl=implementations[0])


def block_name(leaf: str, number: int) -> str:
    """Under which a block of a leaf that is split over devices is stored."""
    return f"{leaf}/{number}"
