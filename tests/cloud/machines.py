"""Starts and ends the processes that are the local cloud's hosts (host.py)."""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cloud.cloud_init import UserData

HOST = Path(__file__).with_name("host.py")


@dataclass
class Spec:
    """What a host has to know of itself."""

    id: str
    hostname: str
    addresses: list[str]
    """Where sshd listens: the private address, and the public one if there is one."""
    user: str
    """Name of the login."""
    authorized_key: str
    user_data: UserData
    gpus: int
    gpu: str
    """Name of the GPUs, as EC2 has it."""
    driver: bool
    """Whether the image has a driver for them."""
    spot: bool
    environ: dict[str, str]
    """Of all processes."""
    grace: float
    """Seconds that processes get to end when the host turns off."""
    shared: str
    """A folder that is there and may be written to on all hosts, as a network's disk."""
    boot: int = 0
    """How often the host has been started before."""
    ssh: str = "up"
    wrong_key: bool = False
    """Whether sshd shows another key than the user data's."""
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    """Programs that fail, with what they say."""
    parent: int = 0


class Machines:
    """The running hosts. One thread starts them all, as they live no longer than it."""

    def __init__(self, folder: Path, ended: Callable[[str, int], None]) -> None:
        """`ended(id, status)` is called when a host has ended."""
        self._folder, self._ended = folder, ended
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._work: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="machines", daemon=True)
        self._thread.start()

    def folder(self, host: str) -> Path:
        """Where a host's home, log and disk lie."""
        return self._folder / host

    def running(self) -> set[str]:
        with self._lock:
            return set(self._running)

    def pid(self, host: str) -> int:
        """Of the process that holds the host."""
        return self._running[host].pid

    def start(self, spec: Spec) -> None:
        """Starts a host, unless it runs; its set-up goes on in the background."""
        self._do(lambda: self._start(spec))

    def tell(self, host: str, *words: str) -> None:
        """Gives a running host's process 1 a command."""
        with self._lock:
            process = self._running[host]
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(words).encode() + b"\n")
            process.stdin.flush()

    def turn_off(self, host: str) -> None:
        """Has a host turn itself off, as its power button would; returns at once."""
        with contextlib.suppress(KeyError):
            self.tell(host, "off", "0", "0")

    def wait(self, host: str, timeout: float = 30.0) -> None:
        """Until a host is off; ends it like a power failure after the timeout in seconds."""
        until = time.monotonic() + timeout
        while host in self.running() and time.monotonic() < until:
            time.sleep(0.02)
        with self._lock:
            process = self._running.get(host)
        if process is not None:
            process.terminate()
            process.wait()

    def close(self) -> None:
        """Kills all hosts, and waits until nothing of them runs."""
        with self._lock:
            processes = list(self._running.values())
            self._running.clear()
        for process in processes:
            process.terminate()
        for process in processes:
            _close(process)
        self._work.put(None)
        self._thread.join()

    def _do(self, act: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        self._work.put((act, done))
        return done.result()

    def _serve(self) -> None:
        while True:
            try:
                task = self._work.get(timeout=0.05)
            except queue.Empty:
                self._look()
                continue
            if task is None:
                return
            act, done = task
            try:
                done.set_result(act())
            except Exception as error:
                done.set_exception(error)

    def _start(self, spec: Spec) -> None:
        with self._lock:
            before = self._running.get(spec.id)
        if before is not None:  # it is turning off
            _close(before)
            with self._lock:
                self._running.pop(spec.id, None)
        folder = self.folder(spec.id)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "spec.json"
        spec.parent = os.getpid()
        path.write_text(json.dumps(dataclasses.asdict(spec)))
        path.chmod(0o600)
        with open(folder / "console.txt", "ab") as console:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(HOST), str(path)],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
                start_new_session=True,
                env={},
            )
        with self._lock:
            self._running[spec.id] = process

    def _look(self) -> None:
        """Tells of hosts that have ended."""
        with self._lock:
            ended = {host: p for host, p in self._running.items() if p.poll() is not None}
            for host in ended:
                del self._running[host]
        for host, process in ended.items():
            _close(process)
            self._ended(host, process.returncode)


def _close(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process, and closes the pipe to it."""
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
