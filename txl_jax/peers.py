"""The processes of a run: they agree, watch one another, and end together.

Each shows a sign of life in the store every second. Who shows none for 12 s is lost, and then every
other process says so and ends with status 75, wherever its main thread is: most often in a
collective that will never end.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from txl_jax import distributed, run_folder, sharding
from txl_jax.config import Config
from txl_jax.distributed import VERDICT, Cluster, Store
from txl_jax.errors import INTERRUPTED_STATUS, RESTART_STATUS, USAGE_STATUS, UserError
from txl_jax.signals import Stopped

PULSE_SECONDS = 1.0
SILENCE_SECONDS = 12.0
"""A process that has shown no sign of life for so long is lost."""
PATIENCE_SECONDS = 15.0
"""What looks like an error may be a peer's death; after so long it would be known."""
LAST_WORK_SECONDS = 6.0
"""For what is done before an end at once."""
LINGER_SECONDS = 3.0
"""Process 0 holds the store, and stays until the others have read in it why the run ends."""
_BUG_STATUS = 1
_CONTACT = re.compile("gloo|nccl|coordination|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", re.IGNORECASE)
"""What JAX's errors say when processes could not talk to one another: who is late by 30 s, because
its machine is busy, is an error on CPUs though all are alive."""
_DEVICE = re.compile(
    "CUDA_ERROR|CUDA error|CUBLAS_STATUS|CUDNN_STATUS|launched on stream|in an error state"
)
"""What they say when a GPU has failed; it, or the one of another machine, may do the next time."""
_FULL = re.compile("RESOURCE_EXHAUSTED|OUT_OF_MEMORY")
"""What they say when its memory does not suffice: it would not the next time."""
_XLA_STATUS = re.compile("[A-Z_]+: ")
_MAY_DIFFER = {"train.logdir", "data.data_dir", "data.text_dir"}
"""Folders may have other names on other hosts; the token files are compared by what is in them."""
_LONGEST_SHOWN = 32


@dataclass
class _Life:
    """What was seen of a peer."""

    sign: str
    seen: float
    """When the sign was last another one, by this process's monotonic clock."""


class Peers:
    """The processes of a run, in a `with` that holds all that they do together.

    A normal end waits for all of them. An error in one ends all: after a UserError with status 2,
    after a failure of what connects them or of a device, or the loss of a peer, with 75, after any
    other with status 1 and its traceback.

    Alone (`Peers(None)`) there is nobody to wait for; the failure of a device ends the process with
    75, and other errors pass through.
    """

    def __init__(self, cluster: Cluster | None):
        self.several = cluster is not None
        self.step = 0
        """The step that signs of life and reports name; `stop_agreed` keeps it."""
        self._looks, self._stopped = 0, False
        self._last_work: Callable[[], None] = lambda: None
        self._host = socket.gethostname()
        if cluster is None:
            return
        self._cluster, self._store = cluster, Store()
        self._lives: dict[int, _Life] = {}
        self._answered = time.monotonic()
        self._gathered = 0
        self._left = threading.Event()
        self._ending = threading.Lock()

    @staticmethod
    def join(cluster: Cluster | None, timeout: float = 300.0) -> "Peers":
        """Meets the others, as `distributed.join`; None: there are none."""
        if cluster:
            distributed.join(cluster, timeout)
        return Peers(cluster)

    def gather(self, name: str, value: str) -> list[str]:
        """The values that all processes pass, in the order of their numbers.

        All call it in the same order; `name` is there to notice if they do not.
        """
        if not self.several:
            return [value]
        self._gathered += 1
        me, folder = self._cluster.process, f"gather/{self._gathered}"
        self._store.set(f"{folder}/{me}", json.dumps([name, value]))
        numbers = range(self._cluster.processes)
        found = [json.loads(self._store.get(f"{folder}/{number}")) for number in numbers]
        if self._gathered > 1:  # all have read it, or they would not be here
            self._store.delete(f"gather/{self._gathered - 1}/{me}")
        if {other for other, _ in found} != {name}:
            raise RuntimeError(f"the processes gather different things: {found}")
        return [value for _, value in found]

    def everyone(self, ok: bool) -> bool:
        """Whether all processes pass True; all call it in the same order."""
        return all(self.gather("everyone", "ok" * ok))

    def check_same(self, facts: dict[str, str]) -> None:
        """Compares facts over the processes.

        Raises:
          UserError: everywhere, if any has other facts than process 0; it names the processes with
            their hosts and what differs, short values with both.
        """
        found = [json.loads(text) for text in self.gather("facts", json.dumps([self._host, facts]))]
        (first, here), *others = found
        differ = [
            f"{distributed.name_of(number, host)}: {_differences(there, here)}"
            for number, (host, there) in enumerate(others, 1)
            if there != here
        ]
        if differ:
            raise UserError(
                f"these are not as on {distributed.name_of(0, first)}: {'; '.join(differ)}; make "
                "all hosts the same"
            )

    def connect(self, mesh: Mesh) -> None:
        """Has all devices add up something, so that afterwards they are connected.

        On CPUs the first collective waits 30 s for others and not longer, and all-reduces after it
        half an hour; on GPUs, what is wrong with their network is seen before anything is compiled.
        """
        if self.several:
            self.gather("connect", "")
            ones = jax.jit(
                lambda: jnp.ones(mesh.devices.size), out_shardings=sharding.split(mesh, 0)
            )
            add_up = jax.jit(jnp.sum, out_shardings=sharding.repeated(mesh))
            jax.block_until_ready(add_up(ones()))

    def compiled(self, step: Any, *arguments: Any) -> Any:
        """The jitted `step`, compiled for such arguments, when all processes have got that far.

        JAX lets process 0 alone write its cache of programs, so that it may have at once what the
        others take minutes for; they would be late for a collective, and on CPUs a reduce-scatter
        waits 30 s.
        """
        step.lower(*arguments).compile()
        self.gather("compiled", "")
        return step

    def stop_agreed(self, step: int | None = None) -> bool:
        """Whether to stop now, after `step`, because one of the processes got SIGTERM.

        All call it at the same places, as often as each other: at every step, and between two steps
        (without a number) wherever something takes long. All are told the same; the answer comes up
        to about three seconds after the signal.
        """
        self.step = self.step if step is None else step
        self._looks += 1
        self._stopped = self._stopped or (self.several and distributed.reached_stop(self._looks))
        return self._stopped

    def check_stop(self) -> None:
        """As `stop_agreed`, between two steps; raises Stopped if so."""
        if self.stop_agreed():
            raise Stopped

    def before_end(self, work: Callable[[], None]) -> None:
        """Has `work` done, for some seconds at most, when this process has to end at once.

        It is done by another thread, wherever the main thread is.
        """
        self._last_work = work

    def __enter__(self) -> "Peers":
        if self.several:
            for work in (self._beat, self._judge):
                threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.several:
            if error is not None and is_loss(error):
                traceback.print_exception(error)
                raise SystemExit(RESTART_STATUS) from error
            return
        if error is None:
            self._store.wait_for_all("end")
            self._left.set()
            distributed.leave(self._cluster)
        elif isinstance(error, UserError):
            self._end(USAGE_STATUS, f"error: {error}", self._told(USAGE_STATUS, str(error)))
        elif isinstance(error, KeyboardInterrupt):
            self._end(INTERRUPTED_STATUS, "", self._told(RESTART_STATUS, "interrupted"))
        else:
            time.sleep(PATIENCE_SECONDS)  # the watching threads may end the process meanwhile
            line = traceback.format_exception_only(error)[0].strip()
            if is_loss(error):
                told = self._told(RESTART_STATUS, line)
                self._end(RESTART_STATUS, told.split(" ", 1)[1], told)
            report = "".join(traceback.format_exception(error)).strip()
            self._end(_BUG_STATUS, report, self._told(_BUG_STATUS, line))

    def _told(self, status: int, line: str) -> str:
        """The verdict that the others read when this process ends."""
        what = "lost" if status == RESTART_STATUS else "error"
        return f"{status} {what}: {distributed.name_of(self._cluster.process)}: {line}"

    def _beat(self) -> None:
        """Shows signs of life, and sees those of others."""
        count = 0
        while not self._left.wait(PULSE_SECONDS if count else 0):
            count += 1
            sign = json.dumps([self._host, self.step, count])
            # What is wrong with the store, `_judge` sees; JAX ends the process if it is gone.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._store.set(f"life/{self._cluster.process}", sign)
                self._see(self._store.all())

    def _see(self, found: dict[str, str]) -> None:
        now = self._answered = time.monotonic()
        for number in range(self._cluster.processes):
            sign, known = found.get(f"life/{number}", ""), self._lives.get(number)
            if known is None or known.sign != sign:
                self._lives[number] = _Life(sign, now)
        if VERDICT in found:
            status, line = found[VERDICT].split(" ", 1)
            if int(status) != RESTART_STATUS:
                time.sleep(PULSE_SECONDS)  # the same error may be on its way in this process
            self._end(int(status), line)

    def _judge(self) -> None:
        """Ends the process when a peer, or the store, has been silent for too long."""
        checked = time.monotonic()
        while not self._left.wait(PULSE_SECONDS):
            now = time.monotonic()
            if now - checked > 2 * PULSE_SECONDS:  # this process was stopped, not the others
                self._answered += now - checked
                for life in list(self._lives.values()):
                    life.seen += now - checked
            checked = now
            if now - self._answered > SILENCE_SECONDS:
                self._lose([0])
            # Of the others we know nothing newer than the store's last answer.
            lives, known = list(self._lives.items()), self._answered
            if lost := [number for number, life in lives if known - life.seen > SILENCE_SECONDS]:
                self._lose(lost)

    def _lose(self, numbers: list[int]) -> NoReturn:
        names, steps = [], set()
        for number in numbers:
            host, step = ("unknown", 0)
            if (life := self._lives.get(number)) and life.sign:
                host, step, _ = json.loads(life.sign)
            names.append(distributed.name_of(number, host))
            steps.add(step)
        at = f", the coordinator at {self._cluster.coordinator}" if numbers[0] == 0 else ""
        line = (
            f"lost: {', '.join(names)}{at}: no sign of life for {SILENCE_SECONDS:.0f} s "
            f"after step {min(steps)}"
        )
        self._end(RESTART_STATUS, line, f"{RESTART_STATUS} {line}")

    def _end(self, status: int, report: str, verdict: str | None = None) -> NoReturn:
        """Ends the process at once: a normal exit would wait for collectives that never end."""
        self._ending.acquire()  # never released: another thread may be on its way here
        if verdict:
            publish = threading.Thread(target=self._publish, args=(verdict,), daemon=True)
            publish.start()
            publish.join(2.0)  # the store may be what is lost
        sys.stdout.flush()
        print(report, file=sys.stderr, flush=True)
        linger = time.monotonic() + (LINGER_SECONDS if self._cluster.process == 0 else 0)
        last = threading.Thread(target=self._last_work, daemon=True)
        last.start()
        last.join(LAST_WORK_SECONDS)
        time.sleep(max(0.0, linger - time.monotonic()))
        os._exit(status)

    def _publish(self, verdict: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.set_first(VERDICT, verdict)


def is_loss(error: BaseException) -> bool:
    """Whether a computation has failed for want of a peer or of a device: another start may do."""
    # A value that is made a Python number raises ValueError.
    from_xla = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and _XLA_STATUS.match(str(error)) is not None
    )
    text = str(error)
    found = _CONTACT.search(text) or (_DEVICE.search(text) and not _FULL.search(text))
    return from_xla and bool(found)


def facts(cfg: Config) -> dict[str, str]:
    """What has to be the same on all hosts before a run: code, versions, fields of the config."""
    fields = {
        f"{section}.{name}": repr(value)
        for section, values in dataclasses.asdict(cfg).items()
        for name, value in values.items()
        if f"{section}.{name}" not in _MAY_DIFFER
    }
    versions = run_folder.versions()
    return {"code": _code(), "python": platform.python_version(), **versions, **fields}


def local_devices() -> dict[str, str]:
    """The devices of this process, for `Peers.check_same`: batches are split evenly over all."""
    local = jax.local_devices()
    return {"devices": f"{len(local)} x {local[0].device_kind}"}


def _code() -> str:
    """SHA-256 of the source files, with their names."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("txl_jax/**/*.py"), *root.glob("configs/*.py")]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _differences(there: dict[str, str], here: dict[str, str]) -> str:
    def difference(name: str) -> str:
        values = there.get(name, "nothing"), here.get(name, "nothing")
        if max(map(len, values)) > _LONGEST_SHOWN:
            return f"another {name}"
        return f"{name} {values[0]} instead of {values[1]}"

    names = [name for name in here | there if there.get(name) != here.get(name)]
    return ", ".join(map(difference, names))
