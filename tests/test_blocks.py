"""Blocks of arrays that are split in one way, put together in another."""

import math
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from txl_jax import blocks

AXES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=3)
"""For each axis: into how many parts it is split, and how long a part is."""


@dataclass(frozen=True, eq=False)
class Device:
    process_index: int


class Split:
    """A sharding of devices of several processes, as much of one as `blocks` looks at."""

    def __init__(self, axes: list[tuple[int, int]], processes: list[int]) -> None:
        boxes = list(np.ndindex(*(count for count, _ in axes)))
        self.indices = {
            Device(process): tuple(
                slice(None) if count == 1 else slice(place * length, (place + 1) * length)
                for place, (count, length) in zip(boxes[number % len(boxes)], axes, strict=True)
            )
            for number, process in enumerate(processes)
        }

    def devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
        return self.indices


@given(st.data(), AXES, st.integers(1, 3))
def test_every_element_is_saved_once_by_the_first_that_holds_it(data, axes, copies) -> None:
    n_devices = copies * math.prod(count for count, _ in axes)
    processes = data.draw(
        st.lists(st.integers(0, 3), min_size=n_devices, max_size=n_devices), label="processes"
    )
    shape = tuple(count * length for count, length in axes)
    split: Any = Split(axes, processes)
    first = np.full(shape, 99)
    for device, index in split.indices.items():
        first[index] = np.minimum(first[index], device.process_index)
    saved = np.full(shape, -1)
    for process, boxes in blocks.parts(split, shape).items():
        for box in boxes:
            where = blocks.within(blocks.everything(shape), box)
            assert (saved[where] == -1).all()
            saved[where] = process
    np.testing.assert_array_equal(saved, first)


@given(st.data(), AXES)
def test_what_was_split_over_n_is_put_together_on_m(data, axes) -> None:
    shape = tuple(count * length for count, length in axes)
    whole = np.arange(math.prod(shape)).reshape(shape)
    n_devices = math.prod(count for count, _ in axes)
    processes = data.draw(
        st.lists(st.integers(0, 2), min_size=n_devices, max_size=n_devices), label="processes"
    )
    split: Any = Split(axes, processes)
    stored = [
        (box, whole[blocks.within(blocks.everything(shape), box)])
        for boxes in blocks.parts(split, shape).values()
        for box in boxes
    ]
    cuts = [
        sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
        for size in shape
    ]
    wanted = tuple((start, stop) for start, stop in cuts)
    needed = [(box, block) for box, block in stored if blocks.overlap(box, wanted) is not None]
    put = blocks.gather(wanted, whole.dtype, needed)
    np.testing.assert_array_equal(put, whole[tuple(slice(*cut) for cut in cuts)])
