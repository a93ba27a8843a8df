"""Processes that share the work on the blocks of a text.

They are programs of their own, not copies of this process: JAX may have threads here, which a copy
would lack, and they import only what their task needs. They end when this process does.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, Self, TypeVar

from txl_jax.errors import UserError

_Task = TypeVar("_Task", bound=Callable[[bytes], Any])
_AHEAD = 2
"""Blocks for each process that are read before they are needed."""


class Workers(Generic[_Task]):
    """Copies of a task, each in a process; a single one is called in this process."""

    def __init__(self, task: _Task, processes: int):
        """Starts the processes.

        Args:
          task: what is done with a block; it can be pickled, and may keep something between blocks.
          processes: how many there are.

        Raises UserError where they cannot be started.
        """
        self._task = task
        self._processes: list[_Process] = []
        try:
            for _ in range(processes if processes > 1 else 0):
                self._processes.append(_Process(task))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()

    def map(self, blocks: Iterable[bytes]) -> Iterator[Any]:
        """What the task returns for each block, in the order of the blocks.

        A block goes to whichever process is free; each gets its own in their order. Raises
        UserError if the task does, or if a process is killed.
        """
        if not self._processes:
            yield from map(self._task, blocks)
            return
        free: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            free.put(process)

        def work(process: _Process, block: bytes) -> Any:
            try:
                return process.ask(block)
            finally:
                free.put(process)

        pending: deque[Future[Any]] = deque()
        threads = ThreadPoolExecutor(len(self._processes))
        try:
            for block in blocks:
                # Here and not in a thread, so that each process gets its blocks in their order.
                pending.append(threads.submit(work, free.get(), block))
                if len(pending) > (1 + _AHEAD) * len(self._processes):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def tasks(self) -> list[_Task]:
        """The tasks with what they have kept; UserError if a process is killed."""
        if not self._processes:
            return [self._task]
        return [process.ask(None) for process in self._processes]


class _Process:
    def __init__(self, task: Callable[[bytes], Any]):
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "txl_jax.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
        except OSError as error:
            raise UserError(
                "cannot start a process that turns text into tokens "
                f"({error.strerror or error}): close other programs, or raise the limits on "
                "processes and open files"
            ) from None
        try:
            self._send(task)
        except BaseException:
            self.kill()
            raise

    def ask(self, block: bytes | None) -> Any:
        """The answer to a block; the task itself where it is None."""
        self._send(block)
        assert self._process.stdout
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError, ValueError):
            raise _killed() from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # What is still to be written has no reader any more.
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin
        try:
            pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise _killed() from None


def _killed() -> UserError:
    return UserError(
        "a process that turned text into tokens was killed, perhaps as memory ran out: start again"
    )


def _serve() -> None:
    """Answers the process that started this one until that closes the pipe."""
    # Ctrl-C reaches the whole group of processes; the one that started this one sees to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        task = pickle.load(sys.stdin.buffer)
        while True:
            block = pickle.load(sys.stdin.buffer)
            try:
                answer = task if block is None else task(block)
            except UserError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    _serve()
