"""What a launch has started is terminated, unless it comes to its end."""

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from launcher import ec2, runs
from launcher.aws import Account
from launcher.hold import Hold, Superseded
from launcher.request import LaunchCommand
from launcher.runs import Host
from txl_jax.errors import UserError

_LOOK_SECONDS = 10.0
"""For which a second Ctrl-C still waits for EC2 to say what stands."""


class Undo:
    """A context manager around all that starts hosts and prepares them.

    If it is left by an error or Ctrl-C, the hosts of the launch are terminated, and it says so.
    Ctrl-C once more ends the wait for that, and names what stands. Hosts that another command goes
    on with, or that somebody has stopped, are left alone.

    Raises UserError if the hosts could not be terminated; it names them.
    """

    def __init__(
        self, account: Account, command: LaunchCommand, launch: str, say: Callable[[str], None]
    ) -> None:
        self._account, self._name, self._launch, self._say = account, command.name, launch, say
        self._hosts: list[Host] = []
        self._active = True
        self._hold: Hold | None = None
        self._kill = f"`{command.follow_up('kill')}`"
        self._start = f"`{command.follow_up('start')}`"

    def __enter__(self) -> Self:
        return self

    def holds(self, hold: Hold) -> None:
        """The hosts are this command's to terminate, for as long as it has this hold."""
        self._hold = hold

    def started(self, *hosts: tuple[Host, ...]) -> None:
        """The launch has these hosts; none are known as yet without any."""
        self._hosts = [host for some in hosts for host in some]

    def release(self) -> None:
        """From now on the hosts stay, whatever happens."""
        self._active = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, (Superseded, ec2.Stopped)):
            return
        if not self._active:
            self._tell(f"{self._name} trains all the same; {self._kill} ends it")
            return
        # Nothing was started then, or `ec2.start` has seen to it.
        if isinstance(error, UserError) and not self._hosts:
            return
        try:
            if not self._hold:
                self._tell(self._what_stands())
                return
            self._tell(f"terminating the hosts of {self._name} …")
            undone = _in_background(self._end, None)
        except KeyboardInterrupt:
            self._tell(self._what_stands())
            raise
        except Exception as failure:
            ids = ", ".join(host.instance_id for host in self._hosts) or "which are not known"
            raise UserError(
                f"{str(error) or 'interrupted'}; and hosts of {self._name} ({ids}) could not be "
                f"terminated ({failure}): do it with {self._kill}; otherwise they end by "
                "themselves, half an hour after their set-up stood still"
            ) from error
        for line in self._what_was_done(undone):
            self._tell(line)

    def _tell(self, text: str) -> None:
        """Nobody may be there any more to read it; rich ends the program for a closed pipe."""
        with contextlib.suppress(OSError, SystemExit):
            self._say(text)

    def _end(self) -> ec2.Undone | None:
        """What was terminated; None: another command goes on with the hosts."""
        if self._hold and self._hold.lost():
            return None
        return ec2.undo(self._account, self._name, self._launch)

    def _what_was_done(self, undone: ec2.Undone | None) -> list[str]:
        if undone is None:
            return [f"another command goes on with the hosts of {self._name}: they are left to it"]
        ids = ", ".join(host.instance_id for host in undone.terminated)
        stopped = ", ".join(host.instance_id for host in undone.stopped)
        lines = [f"terminated: {ids}"] if ids else []
        if stopped:
            lines.append(
                f"stopped by somebody, and kept: {stopped}; {self._start} starts them again, "
                f"{self._kill} terminates them"
            )
        return lines or [f"nothing of {self._name} is running"]

    def _what_stands(self) -> str:
        try:
            found = _in_background(
                lambda: runs.find(self._account, self._name, all_users=True), _LOOK_SECONDS
            )
        except (KeyboardInterrupt, TimeoutError, UserError):
            ids = ", ".join(host.instance_id for host in self._hosts)
            known = f"these: {ids}" if ids else f"some of the launch {self._launch}"
            return f"hosts of {self._name} may be running, {known}; terminate them: {self._kill}"
        hosts = [host for run in found if run.launch == self._launch for host in run.hosts]
        if not hosts:
            return f"nothing of {self._name} is running"
        states = ", ".join(f"{host.instance_id} {host.state}" for host in hosts)
        return f"hosts of {self._name} stand: {states}; terminate them: {self._kill}"


def _in_background(work: Callable[[], Any], seconds: float | None) -> Any:
    """What `work` returns or raises; Ctrl-C, or the time being over, leaves it alone."""
    outcome: list[Any] = []
    failure: list[Exception] = []

    def do() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=do, name="undo", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if failure:
        raise failure[0]
    return outcome[0]
