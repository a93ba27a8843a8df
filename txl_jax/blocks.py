"""Which process holds which block of an array that is split over devices, and arrays from blocks.

A box is a block's place in the whole array: [start, stop) along each axis. The boxes of one
sharding either are the same or do not overlap.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

Box = tuple[tuple[int, int], ...]


def everything(shape: tuple[int, ...]) -> Box:
    """The box of a whole array."""
    return tuple((0, length) for length in shape)


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The box of a shard, from the index that JAX gives for it."""
    return tuple(part.indices(length)[:2] for part, length in zip(index, shape, strict=True))


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of what lies in a box."""
    return tuple(stop - start for start, stop in box)


def overlap(one: Box, other: Box) -> Box | None:
    """The box that two have in common; None if they do not touch."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """Where `inner` is in an array that holds what lies in `outer`."""
    return tuple(
        slice(start - first, stop - first)
        for (first, _), (start, stop) in zip(outer, inner, strict=True)
    )


def parts(sharding: Sharding, shape: tuple[int, ...]) -> dict[int, list[Box]]:
    """The boxes that each process has to save, by process; every process finds the same.

    A block that several processes hold falls to the first of them. Blocks of a process that
    together fill a box count as one.
    """
    owners: dict[Box, int] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        box = box_of(index, shape)
        process = int(device.process_index or 0)
        owners[box] = min(process, owners.get(box, process))
    boxes: dict[int, list[Box]] = {}
    for box, process in sorted(owners.items()):
        boxes.setdefault(process, []).append(box)
    return {process: _as_one(blocks) for process, blocks in boxes.items()}


def _as_one(boxes: list[Box]) -> list[Box]:
    """The one box that `boxes` fill, or else `boxes`; they do not overlap."""
    axes = zip(*boxes, strict=True)
    hull = tuple((min(s for s, _ in axis), max(s for _, s in axis)) for axis in axes)
    filled = sum(math.prod(lengths(box)) for box in boxes)
    return [hull] if filled == math.prod(lengths(hull)) else boxes


def held(array: jax.Array, box: Box) -> list[tuple[Box, jax.Array]]:
    """The blocks of `array` on this process's devices that lie in `box`, each once."""
    blocks = {}
    for shard in array.addressable_shards:
        where = box_of(shard.index, array.shape)
        if overlap(where, box) is not None:
            blocks[where] = shard.data
    return list(blocks.items())


def gather(box: Box, dtype: np.dtype, blocks: Iterable[tuple[Box, np.ndarray]]) -> np.ndarray:
    """What lies in `box`, put together from blocks that do not overlap and cover it."""
    shape = lengths(box)
    found = np.empty(shape, dtype)
    filled = 0
    for where, block in blocks:
        common = overlap(box, where)
        if common is not None:
            found[within(box, common)] = block[within(where, common)]
            filled += math.prod(lengths(common))
    assert filled == found.size, f"blocks cover {filled} of {found.size} elements of {box}"
    return found


def boxes_here(sharding: Sharding, shape: tuple[int, ...]) -> set[Box]:
    """The boxes that this process's devices need of an array."""
    found = sharding.addressable_devices_indices_map(shape)
    return {box_of(index, shape) for index in found.values() if index is not None}


def place(
    sharding: Sharding,
    shape: tuple[int, ...],
    dtype: np.dtype,
    blocks: list[tuple[Box, np.ndarray]],
) -> jax.Array:
    """The array with this sharding whose `blocks` cover at least what this process's devices need.

    Its buffers are its own and may be donated.
    """
    exact = dict(blocks)
    found = {
        box: exact[box] if box in exact else gather(box, dtype, blocks)
        for box in boxes_here(sharding, shape)
    }
    shards = [
        _on(device, found[box_of(index, shape)])
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _on(device: Any, block: np.ndarray) -> jax.Array:
    placed = jax.device_put(block, device)
    if device.platform != "cpu":
        return placed
    # It may lie in memory that NumPy owns, and cannot be donated.
    return jax.device_put(placed, device, may_alias=False)
