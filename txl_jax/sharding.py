"""The mesh of all devices, and what is split over it and what is repeated.

There is one mesh axis, `data`. Parameters and optimizer state are repeated on every device; the
batch and the segment memory are split by sequence.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from txl_jax.errors import UserError


def initialize(local: bool) -> None:
    """Joins the processes of a run; with `local` this process is the run.

    Raises:
      UserError: not local, and no cluster is found (Slurm, MPI, Kubernetes …).
    """
    if local:
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no cluster was found to join ({reason}); pass --local to train on this machine"
        ) from error


def make_mesh() -> Mesh:
    """All devices of all processes along the axis `data`."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def split(mesh: Mesh, axis: int) -> NamedSharding:
    """Arrays whose axis number `axis` runs over sequences."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def repeated(mesh: Mesh) -> NamedSharding:
    """Arrays of which every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, name: str, batch: int, accumulate: int = 1) -> None:
    """Raises UserError unless the devices divide a batch into `accumulate` parts evenly."""
    parts = mesh.devices.size * accumulate
    if batch < 1 or batch % parts:
        devices = f"{mesh.devices.size} device{'s' if mesh.devices.size > 1 else ''}"
        what = f"{devices} x accumulate {accumulate}" if accumulate > 1 else devices
        raise UserError(f"{name} is {batch}, which {what} cannot divide; use a multiple of {parts}")


def local_rows(mesh: Mesh, batch: int) -> slice:
    """The sequences of a batch of `batch` that this process's devices hold."""
    per_process = batch // jax.process_count()
    first = jax.process_index() * per_process
    return slice(first, first + per_process)
