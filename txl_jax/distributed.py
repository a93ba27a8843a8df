"""How the processes of a run find one another, and the store that all of them read and write.

Process 0 holds both JAX's coordination service and the store. What JAX keeps private is used here
and in `interface`, nowhere else.
"""

import errno
import ipaddress
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import clusters
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from txl_jax import interface
from txl_jax.errors import RESTART_STATUS, UserError

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DEVICES = "JAX_LOCAL_DEVICE_IDS"
_NAMES = (COORDINATOR, PROCESSES, PROCESS, DEVICES)
HEARTBEAT_SECONDS = 40
"""JAX ends every process that has not heard from process 0 for so long, or already for half of it.

Peers notice earlier, and say more.
"""
VERDICT = "verdict"
"""The name in the store of what ends the run: an exit status, a space, and why."""
_BEGUN = "begun"
_FOLDER = "txl/"
_DAY_MS = 24 * 60 * 60 * 1000
_NO_NETWORK = {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, socket.EAI_AGAIN}
"""No route to the coordinator, or no answer to the question where it is."""


@dataclass(frozen=True)
class Cluster:
    """The place of this process among several."""

    coordinator: str
    """HOST:PORT where process 0 listens."""
    processes: int
    """How many there are, at least 2."""
    process: int
    """The number of this one."""
    devices: str = ""
    """Numbers of the GPUs that it takes, with commas between them; empty: all of this machine."""


def environ(cluster: Cluster | None) -> dict[str, str]:
    """The environment of a process in which `find` finds the same cluster, and no other."""
    others = {name: value for name, value in os.environ.items() if name not in _NAMES}
    if cluster is None:
        return others
    numbers = {PROCESSES: str(cluster.processes), PROCESS: str(cluster.process)}
    return {**others, COORDINATOR: cluster.coordinator, DEVICES: cluster.devices, **numbers}


def find(
    local: bool,
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    process_per_gpu: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster that the command line, the environment or the scheduler says; None: only us.

    What the command line leaves open is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, and after that from Slurm, Open MPI or Kubernetes, as JAX finds them. A process
    takes all GPUs of its machine; with `process_per_gpu` those of JAX_LOCAL_DEVICE_IDS, or the one
    that has the process's number on its machine.

    Starts nothing.

    Raises:
      UserError: not `local`, and there is no cluster or only part of one; what was given cannot be.
    """
    if local:
        if coordinator or processes is not None or process is not None or process_per_gpu:
            raise UserError("--local trains without others: leave out either it or the cluster")
        return None
    given: dict[str, Any] = {
        "--coordinator": coordinator or environ.get(COORDINATOR),
        "--num-processes": _number(processes, PROCESSES, environ),
        "--process-id": _number(process, PROCESS, environ),
    }
    devices = environ.get(DEVICES, "")
    if None in given.values():
        given, rank = _detected(given)
        if rank and not process_per_gpu:
            raise UserError(
                f"this is process {rank} on its machine, and one takes all GPUs: start one for "
                f"each machine, or pass --process-per-gpu"
            )
        devices = devices or (str(rank) if rank is not None and process_per_gpu else "")
    if process_per_gpu and not devices:
        raise UserError(f"--process-per-gpu: put the number of this process's GPU into {DEVICES}")
    return _checked(Cluster(*given.values(), devices=devices))


def _number(given: int | None, name: str, environ: Mapping[str, str]) -> int | None:
    """What the command line gave, or else the environment."""
    text = environ.get(name)
    if given is not None or not text:
        return given
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; it has to be a whole number")
    return int(text)


def _detected(given: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """`given` completed by what JAX finds, and the number of this process on its machine."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Kubernetes without its package; see below
            *found, ranks = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                *given.values(),
                local_device_ids=None,
                cluster_detection_method=None,
                initialization_timeout=60,
            )
    except Exception as error:  # whatever comes of a scheduler that is not as JAX expects it
        raise UserError(
            f"the cluster cannot be read from the scheduler ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); pass {', '.join(given)}"
        ) from error
    complete = dict(zip(given, found, strict=True))
    missing = [name for name, value in complete.items() if value is None]
    if len(missing) == len(complete):
        raise UserError(
            f"no cluster was found to join; pass {', '.join(complete)}, start under Slurm, Open "
            "MPI or Kubernetes (for that, install the package kubernetes), or pass --local to "
            "train on this machine"
        )
    if missing:
        are = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'}"
        raise UserError(f"{are} missing: {', '.join(complete)} go together")
    return complete, ranks[0] if ranks else None


def _checked(cluster: Cluster) -> Cluster | None:
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator is {cluster.coordinator!r}; it has to be HOST:PORT, as 10.0.0.4:4321"
        )
    if not 0 <= cluster.process < cluster.processes:
        raise UserError(
            f"--process-id is {cluster.process} of --num-processes {cluster.processes}; it has to "
            f"be from 0 to one less than that"
        )
    if not all(number.isdecimal() for number in cluster.devices.split(",") if cluster.devices):
        raise UserError(f"{DEVICES} is {cluster.devices!r}; it has to be numbers, as 0,1")
    return cluster if cluster.processes > 1 else None


def join(cluster: Cluster, timeout: float = 300.0) -> None:
    """Meets all other processes; before anything uses a device.

    A run that goes on without us (we were started again, and the others have not noticed yet) is
    told to end, and we wait for the next one. If not all have come after `timeout` seconds, the
    process ends with RESTART_STATUS.

    Raises:
      UserError: process 0 cannot listen at the coordinator's address, or its name is unknown.
    """
    # JAX's own timeout ends the process by SIGABRT.
    alarm = threading.Timer(timeout, _give_up, [cluster])
    alarm.daemon = True
    alarm.start()
    # Otherwise JAX ends all processes when one is lost, before anything can say which.
    jax.config.update("jax_enable_recoverability", True)
    host, _, port = cluster.coordinator.rpartition(":")
    address = _when_there_is_a_network(host.strip("[]"), int(port), listen=cluster.process == 0)
    while True:
        _connect(cluster, address, int(port), timeout)
        store = Store()
        if _BEGUN not in store.all():
            break
        lost = f"lost: {name_of(cluster.process)}: it ended and was started again"
        store.set_first(VERDICT, f"{RESTART_STATUS} {lost}")
        jax.distributed.shutdown()
        time.sleep(2)
    store.wait_for_all("joined")
    store.set_first(_BEGUN, "")
    alarm.cancel()


def name_of(process: int, host: str = "") -> str:
    """`process 2 (host ip-10-0-0-7)`; this machine's host unless another is named."""
    return f"process {process} (host {host or socket.gethostname()})"


def _connect(cluster: Cluster, address: str, port: int, timeout: float) -> None:
    devices = [int(number) for number in cluster.devices.split(",") if number]
    literal = f"[{address}]" if ":" in address else address
    jax.distributed.initialize(
        f"{literal}:{port}",
        cluster.processes,
        cluster.process,
        local_device_ids=devices or None,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{literal}:{port}",
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        initialization_timeout=round(timeout) + 60,
    )


def _give_up(cluster: Cluster) -> None:
    missing = f"not all {cluster.processes} processes came to {cluster.coordinator} in time"
    print(f"lost: {missing}", file=sys.stderr, flush=True)
    os._exit(RESTART_STATUS)


def _when_there_is_a_network(host: str, port: int, listen: bool) -> str:
    """The coordinator's address, once something is known about the way to it.

    Who was cut off and is started again may have no network yet.
    """
    said = ""
    while True:
        try:
            address = _address(host, port, listen)
            interface.use_towards(address, port)
            return address
        except OSError as error:
            if error.errno not in _NO_NETWORK:
                raise
            if said != (reason := f"waiting for the network, {host}: {error.strerror}"):
                print(said := reason, file=sys.stderr, flush=True)
            time.sleep(1)


def _address(host: str, port: int, listen: bool) -> str:
    """The coordinator's one address, so that it does not listen on all; checked where it listens.

    Waits a little for a port that the trainer before this one has not given back yet.
    """
    try:
        family, *_, (address, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        if error.errno in _NO_NETWORK:
            raise
        raise UserError(f"--coordinator: {host} is unknown here: {error.strerror}") from error
    name_only = not _is_address(host) and host != "localhost"
    if listen and name_only and ipaddress.ip_address(address).is_loopback:
        raise UserError(
            f"--coordinator: {host} is {address} on this machine, which others cannot reach; give "
            "its address in the private network"
        )
    for tries_left in reversed(range(10 if listen else 0)):
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((address, port))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not tries_left:
                    raise UserError(
                        f"process 0 cannot listen at {host}:{port}: {error.strerror}; "
                        "--coordinator is the address and a free port of its machine"
                    ) from error
        time.sleep(0.5)
    return str(address)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Store:
    """Names and values that all processes read and write; lost with process 0.

    When process 0 does not answer, the methods block; when it has gone, they raise JaxRuntimeError,
    and JAX ends the process soon after.
    """

    def __init__(self) -> None:
        self._client: Any = global_state.client

    def set(self, name: str, value: str) -> None:
        self._client.key_value_set(_FOLDER + name, value, allow_overwrite=True)

    def set_first(self, name: str, value: str) -> None:
        """Sets what has no value yet."""
        try:
            self._client.key_value_set(_FOLDER + name, value)
        except jax.errors.JaxRuntimeError:
            if name not in self.all():
                raise

    def get(self, name: str) -> str:
        """The value; waits until there is one."""
        return self._client.blocking_key_value_get(_FOLDER + name, _DAY_MS)

    def all(self) -> dict[str, str]:
        """All names and their values."""
        found = self._client.key_value_dir_get(_FOLDER)
        return {name.removeprefix(_FOLDER): value for name, value in found}

    def delete(self, name: str) -> None:
        self._client.key_value_delete(_FOLDER + name)

    def wait_for_all(self, name: str) -> None:
        """Returns when all processes have called this; a name can be used once."""
        self._client.wait_at_barrier(name, _DAY_MS)


def reached_stop(number: int) -> bool:
    """Whether this call is the one at which all processes stop, because one of them got SIGTERM.

    Every process calls this at the same places, with 1, 2, 3 …
    """
    return multihost_utils.reached_preemption_sync_point(number)


def leave(cluster: Cluster) -> None:
    """Ends what `join` began, when all processes have waited for one another."""
    if cluster.process == 0:
        # Answered when all that have not left have asked, that is, when all others have left.
        client: Any = global_state.client
        client.get_live_nodes(list(range(cluster.processes)))
    jax.distributed.shutdown()
