"""Segment memory made anew, where a run goes on with other streams than before.

Letters: B batch, T tgt_len, L layers, M mem_len, D d_model.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from txl_jax import sharding
from txl_jax.config import Config
from txl_jax.data import Streams
from txl_jax.evaluator import context_segments
from txl_jax.model import Memory, abstract


def refilled(cfg: Config, mesh: Mesh, params: Any, streams: Streams, segment: int) -> Memory:
    """The memory [L, B, M, D] with which `segment` of the streams is read.

    The segments before it are read once more, without training: as many as the memory depends on,
    L x ceil(M / T), or back to the start of the streams. It is what the parameters of today make of
    them; training would have left what those of each step made.

    Args:
      params: whole on every device.
      segment: of the epoch, 0 … len(streams); memory is empty before the first.
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
        lambda: Memory.empty(cfg.model, cfg.train.batch),
        out_shardings=jax.tree.map(partial(NamedSharding, mesh), memory),
    )()
    own = sharding.local_rows(mesh, cfg.train.batch)
    for i in range(max(0, segment - context_segments(cfg.model)), segment):
        inputs, _ = streams.segment(i, own)
        filled = step(
            params, filled, jax.make_array_from_process_local_data(sharding.split(mesh, 0), inputs)
        )
    return filled
