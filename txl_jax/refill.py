"""Segment memory made anew, where a run goes on with other streams than before.

Letters: B batch, T tgt_len, L layers, M mem_len, D d_model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from txl_jax import sharding
from txl_jax.config import Config
from txl_jax.course import Course
from txl_jax.evaluator import context_segments
from txl_jax.model import Memory, abstract
from txl_jax.step import TrainState
from txl_jax.streams import Streams


def refilled(
    cfg: Config,
    mesh: Mesh,
    state: TrainState,
    streams: Streams,
    course: Course,
    batch: int,
    on_segment: Callable[[], object] = lambda: None,
) -> tuple[TrainState, str]:
    """The state with the memory of its place in other streams, and a line that says so.

    Args:
      state: its memory may hold anything.
      streams, course: those of today, with which training goes on.
      batch: how many streams there were before.
      on_segment: called when a segment has been read, on every process alike.
    """
    epoch, segment = divmod(course.segment(int(state.step)), len(streams))
    first = max(0, segment - context_segments(cfg.model))
    params = sharding.Layout.of(cfg, mesh).whole(state.params)
    memory = memory_before(cfg, mesh, params, streams.epoch(epoch), segment, on_segment)
    state = state._replace(memory=memory)
    back = f", {course.rest} tokens back" if course.rest else ""
    what = f"refilled from segment {first} on" if first < segment else "is empty"
    return state, (
        f"batch {streams.batch} instead of {batch}: the streams are cut anew and go on at segment "
        f"{segment} of {len(streams)}{back}; memory {what}"
    )


def memory_before(
    cfg: Config,
    mesh: Mesh,
    params: Any,
    streams: Streams,
    segment: int,
    on_segment: Callable[[], object] = lambda: None,
) -> Memory:
    """The memory [L, B, M, D] with which `segment` of the streams is read.

    The segments before it are read once more, without training or dropout: as many as the memory
    depends on, L x ceil(M / T), or back to the start of the streams. It is what the parameters of
    today make of them; training would have left what those of each step made, with dropout.

    Args:
      params: whole on every device.
      segment: of the epoch, 0 … len(streams) - 1; memory is empty before the first.
      on_segment: as of `refilled`.
    """
    rows, whole = sharding.split_spec(0), PartitionSpec()
    memory = Memory(sharding.split_spec(1), whole)  # pyright: ignore[reportArgumentType]
    graphdef, _ = abstract(cfg.model)

    def read(params: Any, memory: Memory, inputs: jax.Array) -> Memory:
        return nnx.merge(graphdef, params).hidden(inputs, memory)[1]

    step = jax.jit(
        jax.shard_map(
            read, mesh=mesh, in_specs=(whole, memory, rows), out_specs=memory, check_vma=False
        ),
        donate_argnums=1,
    )
    filled = jax.jit(
        lambda: Memory.empty(cfg.model, streams.batch),
        out_shardings=jax.tree.map(partial(NamedSharding, mesh), memory),
    )()
    own = sharding.local_rows(mesh, streams.batch)
    for i in range(max(0, segment - context_segments(cfg.model)), segment):
        inputs, _ = streams.segment(i, own)
        filled = step(
            params, filled, jax.make_array_from_process_local_data(sharding.split(mesh, 0), inputs)
        )
        jax.block_until_ready(filled.filled)
        on_segment()
    return filled
