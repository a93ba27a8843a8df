"""Whether hosts are fit to train: `python -m txl_jax.health --gpus N …`, on all of them together.

    python -m txl_jax.health --gpus 8 --gbps 100 --coordinator 10.0.0.4:8477 --num-processes 2
        --process-id 0
    python -m txl_jax.health --gpus 8 --local

Every process has to see its devices: N GPUs, or N CPU devices where JAX_PLATFORMS is cpu. Then all
devices of all hosts add up arrays of a known size, and the sums have to be right. Process 0 prints
one line of JSON; warnings go to standard error. An error ends all with exit status 2.

The rate is the bus bandwidth as NCCL's own tests define it: S bytes that n devices add up in t
seconds are 2 (n - 1) / n x S / t. In a ring, that is what each link carries one way, so over
several hosts it can be held against the rate of a host's network.
"""

import json
import os
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from txl_jax import config, distributed, sharding
from txl_jax.errors import USAGE_STATUS, UserError, run_command
from txl_jax.peers import Peers

TIME_LIMIT = 240.0
"""Seconds after which it gives up."""
JOIN_SECONDS = 120.0
"""For which processes wait for one another."""
GPU_BYTES, CPU_BYTES = 128 << 20, 4 << 20
"""Bytes that every device adds to the sum."""
WARM_UP, TIMED = 3, 10
"""All-reduces. The first ones open the connections."""
ENOUGH = 0.5
"""Part of the network's rate below which the bus bandwidth is warned of."""
EFA, TCP, NONE, UNKNOWN = "EFA", "TCP", "none", "unknown"


@dataclass(frozen=True)
class HealthCommand:
    """The words of the command line."""

    gpus: int
    """Devices that this process has to see: GPUs, or CPU devices where JAX_PLATFORMS is cpu."""
    gbps: float = 0.0
    """Rate of a host's network in Gbit/s; 0: not known."""
    local: bool = False
    """Check this machine alone."""
    coordinator: str = ""
    """HOST:PORT, in the private network, where process 0 listens for the others."""
    num_processes: int | None = None
    """Processes, one for each machine."""
    process_id: int | None = None
    """Number of this process, from 0."""


def main(words: list[str]) -> int:
    """Checks, prints, and returns the exit status.

    Raises UserError: names the host, and what it lacks.
    """
    command = config.parse_words(
        HealthCommand, None, "python -m txl_jax.health", "Whether hosts are fit to train.", words
    )
    if command.gpus < 1:
        raise UserError(f"--gpus is {command.gpus}; it has to be 1 or more")
    cluster = distributed.find(
        command.local, command.coordinator, command.num_processes, command.process_id
    )
    alarm = threading.Timer(TIME_LIMIT, _give_up)
    alarm.daemon = True
    alarm.start()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "nccl"
        # It says there which network it uses.
        os.environ |= {
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_SUBSYS": "INIT,NET",
            "NCCL_DEBUG_FILE": str(log),
        }
        with Peers.join(cluster, JOIN_SECONDS) as peers:
            found, warnings = check(peers, command.gpus, command.gbps, log)
    alarm.cancel()
    if found["process"] == 0:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(json.dumps(found | {"warnings": warnings}), flush=True)
    return 0


def check(peers: Peers, gpus: int, gbps: float, log: Path) -> tuple[dict[str, Any], list[str]]:
    """What was found, ready for JSON, and warnings.

    Raises UserError: a process sees other devices than it should, or sums are wrong.
    """
    kind = _check_devices(gpus)
    hosts = jax.process_count()
    devices = jax.device_count()
    size = CPU_BYTES if kind == "cpu" else GPU_BYTES
    seconds = all_reduce_seconds(size)
    rate = 8e-9 * bus_bytes(devices, size) / seconds
    networks = peers.gather("network", _network(kind, log) if hosts > 1 else NONE)
    warnings = []
    if len(set(networks)) > 1:
        each = ", ".join(f"host {number}: {name}" for number, name in enumerate(networks))
        warnings.append(f"the hosts do not use the same network ({each})")
    if hosts > 1 and rate < ENOUGH * gbps:
        warnings.append(
            f"an all-reduce over {hosts} hosts ran at {rate:.1f} Gbit/s through {networks[0]}, "
            f"under half of the network's {gbps:g} Gbit/s"
        )
    found = {
        "process": jax.process_index(),
        "hosts": hosts,
        "devices": devices,
        "device_kind": jax.local_devices()[0].device_kind,
        "bytes": size,
        "ms": 1000 * seconds,
        "bus_gbps": rate if devices > 1 else None,
        "network_gbps": gbps or None,
        "network": networks[0],
    }
    return found, warnings


def _check_devices(gpus: int) -> str:
    """The kind of this process's devices, `gpu` or `cpu`, if they are as they should be."""
    wanted = "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "gpu"
    host = socket.gethostname()
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"host {host} sees no {wanted.upper()}: {reason}") from error
    seen = len([device for device in devices if device.platform == wanted])
    if seen != gpus:
        raise UserError(
            f"host {host} sees {seen} {wanted.upper()} devices and should see {gpus}; "
            + ("look at nvidia-smi there" if wanted == "gpu" else "see JAX_NUM_CPU_DEVICES")
        )
    return wanted


def all_reduce_seconds(size: int) -> float:
    """Median seconds of an all-reduce of `size` bytes, float32, over all devices.

    Raises UserError: a sum is wrong, so that a device or a connection is not to be trusted.
    """
    mesh = sharding.make_mesh()
    devices = mesh.devices.size
    local = [index for index, device in enumerate(mesh.devices) if device in jax.local_devices()]
    values = np.repeat(np.asarray(local, np.float32)[:, None] + 1, size // 4, axis=1)
    x = jax.make_array_from_process_local_data(sharding.split(mesh, 0), values)
    add_up = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=sharding.repeated(mesh))
    seconds = []
    for _ in range(WARM_UP + TIMED):
        began = time.perf_counter()
        total = jax.block_until_ready(add_up(x))
        seconds.append(time.perf_counter() - began)
        del total
    wrong = np.asarray(add_up(x)) != devices * (devices + 1) / 2
    if wrong.any():
        raise UserError(
            f"on host {socket.gethostname()} {wrong.sum()} of {wrong.size} sums over all devices "
            "are wrong: a GPU or a connection is faulty, so take other hosts"
        )
    return statistics.median(seconds[WARM_UP:])


def bus_bytes(devices: int, size: int) -> float:
    """Bytes that a link of a ring of devices carries one way in an all-reduce of `size` bytes."""
    return 2 * (devices - 1) / devices * size


def _network(kind: str, log: Path) -> str:
    """What carries collectives between this host and others."""
    if kind == "cpu":
        return TCP  # gloo knows nothing else
    try:
        return network_in(log.read_text(errors="replace"))
    except OSError:
        return UNKNOWN


def network_in(text: str) -> str:
    """The network that NCCL says it uses, in what it writes with NCCL_DEBUG=INFO."""
    used = re.findall(r"Using network (.+)", text)
    if not used:
        return UNKNOWN
    name = used[-1].strip()
    if "Libfabric" in name:  # the plugin aws-ofi-nccl, whose provider tells what is below it
        name = (re.findall(r"[Pp]rovider is (\w+)", text) or [name])[-1]
    known = {"Socket": TCP, "tcp": TCP, "efa": EFA}
    return str(known.get(name, name))


def _give_up() -> NoReturn:
    print(
        f"error: host {socket.gethostname()} did not finish in {TIME_LIMIT:.0f} s: a GPU or the "
        "network stands still",
        file=sys.stderr,
        flush=True,
    )
    os._exit(USAGE_STATUS)


if __name__ == "__main__":
    run_command(main)
