"""The parent of a trainer: `python -m txl_jax.supervise RESTARTS COMMAND …`, without JAX.

It starts the trainer again, RESTARTS times at most, when that ends with status 75 or by a signal:
JAX ends a process that loses process 0, and nothing inside the process can prevent it. A trainer
that stands still is killed. SIGTERM, SIGINT and SIGHUP go on to the trainer, which is not started
again then; nor is it after a spot notice.
"""

import ctypes
import itertools
import math
import os
import random
import signal
import socket
import sys
import time
from typing import NamedTuple, NoReturn

from txl_jax import spot
from txl_jax.errors import RESTART_STATUS

PARENT = "TXL_PARENT"
"""Tells a trainer the process id of its parent."""
COORDINATOR, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"
STOPPED_SECONDS = 10.0
"""A trainer that was stopped for so long is killed."""
GRACE_SECONDS = 110.0
"""For the trainer to save, upload and end after SIGTERM; a spot notice comes two minutes before."""
PAUSE_SECONDS = (2.0, 5.0)
"""Before a restart, at random between these, so that hosts do not come all at once."""
_PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_PR_SET_PDEATHSIG = 1


class End(NamedTuple):
    """How a trainer ended."""

    status: int
    why: str
    """Why it may be started again; empty if it said so itself, or may not."""
    asked: bool
    """Whether a signal to the parent ended it."""


def is_child() -> bool:
    """Whether this process was started by a parent; from then on it dies with it."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return False
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before
        os._exit(RESTART_STATUS)
    return True


def become_parent(restarts: int, command: list[str], environ: dict[str, str]) -> NoReturn:
    """Replaces this process with the parent of `command`."""
    sys.stdout.flush()
    words = [sys.executable, "-m", "txl_jax.supervise", str(restarts), *command]
    os.execve(sys.executable, words, environ)


def supervise(command: list[str], restarts: int) -> int:
    """Runs `command` until it needs no restart; its exit status, or 75 if a signal ended it.

    Blocks the signals that it passes on, also for later threads of this process.
    """
    # What is ignored (nohup, a shell's background jobs) stays so, here and in the trainer.
    watched = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
    watched.add(signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    spot.start_watching(lambda: os.kill(os.getpid(), signal.SIGTERM))
    for number in itertools.count(1):
        began = time.monotonic()
        end = _run(command, watched)
        if end.status != RESTART_STATUS or end.asked or number > restarts:
            if end.why:
                _say(end.why)
            return end.status
        pause = random.uniform(*PAUSE_SECONDS)
        _say(
            f"{end.why or 'the trainer asks for it'}: restart {number} of {restarts} in "
            f"{pause:.1f} s, after {time.monotonic() - began:.0f} s"
        )
        if signal.sigtimedwait(watched - {signal.SIGCHLD}, pause):
            return end.status
    raise AssertionError


def _run(command: list[str], watched: set[signal.Signals]) -> End:
    """Runs the command once; it has its own process group, so that Ctrl-C reaches it once."""
    environ = os.environ | {PARENT: str(os.getpid())}
    child = os.posix_spawnp(command[0], command, environ, setpgroup=0, setsigmask=[])
    # When it is killed: having been asked to end, having been stopped.
    end_by, go_on_by, why = math.inf, math.inf, ""
    while True:
        received = signal.sigtimedwait(watched, 1.0)
        pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        now = time.monotonic()
        if pid and os.WIFSTOPPED(status):
            go_on_by = now + STOPPED_SECONDS
        elif pid and os.WIFCONTINUED(status):
            go_on_by = math.inf
        elif pid:
            return _end(os.waitstatus_to_exitcode(status), end_by < math.inf, why)
        if received and received.si_signo != signal.SIGCHLD:
            hang_up = received.si_signo == signal.SIGHUP
            os.kill(child, signal.SIGTERM if hang_up else received.si_signo)
            end_by = min(end_by, now + GRACE_SECONDS)
        if now > min(end_by, go_on_by):
            os.kill(child, signal.SIGKILL)
            why = (
                f"the trainer did not end in {GRACE_SECONDS:.0f} s, and was killed"
                if now > end_by
                else f"the trainer was stopped for {STOPPED_SECONDS:.0f} s, and killed"
            )


def _end(code: int, asked: bool, why: str) -> End:
    """What an exit code, or minus a signal, means."""
    if code >= 0:
        return End(code, "", asked)
    number = signal.Signals(-code)
    if number == signal.SIGABRT and _coordinator_is_gone():
        why = f"lost: process 0, the coordinator at {os.environ[COORDINATOR]}"
    elif number != signal.SIGKILL or not why:
        why = f"the trainer was ended by {number.name}"
    return End(RESTART_STATUS, why, asked)


def _coordinator_is_gone() -> bool:
    """Whether process 0 is another one, and nothing listens there any more."""
    if os.environ.get(PROCESS, "0") == "0":
        return False
    host, _, port = os.environ[COORDINATOR].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return True
    return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], int(sys.argv[1])))
