"""What a launch has started is terminated, unless it comes to its end."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from launcher import ec2, runs
from launcher.aws import Account
from launcher.request import LaunchCommand
from launcher.runs import Host
from txl_jax.errors import UserError

_LOOK_SECONDS = 10.0
"""For which a second Ctrl-C still waits for EC2 to say what stands."""


class Undo:
    """A context manager around all that starts hosts and prepares them.

    If it is left by an error or Ctrl-C, the hosts of the launch are terminated, and it says so.
    Ctrl-C once more ends the wait for that, and names what stands.

    Raises UserError if the hosts could not be terminated; it names them.
    """

    def __init__(
        self, account: Account, command: LaunchCommand, launch: str, say: Callable[[str], None]
    ) -> None:
        self._account, self._name, self._launch, self._say = account, command.name, launch, say
        self._hosts: list[Host] = []
        self._active = True
        self._kill = f"`{command.follow_up('kill')}`"

    def __enter__(self) -> Self:
        return self

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
        # Nothing was started then, or `ec2.start` has seen to it.
        undone = isinstance(error, UserError) and not self._hosts
        if error is None or not self._active or undone:
            return
        self._say(f"terminating the hosts of {self._name} …")
        try:
            terminated = _in_background(
                lambda: ec2.undo(self._account, self._name, self._launch), None
            )
        except KeyboardInterrupt:
            self._say(self._what_stands())
            raise
        except Exception as failure:
            ids = ", ".join(host.instance_id for host in self._hosts) or "which are not known"
            raise UserError(
                f"{str(error) or 'interrupted'}; and hosts of {self._name} ({ids}) could not be "
                f"terminated ({failure}): do it with {self._kill}; otherwise they end by "
                "themselves, half an hour after their start"
            ) from error
        ids = ", ".join(host.instance_id for host in terminated)
        self._say(f"terminated: {ids}" if ids else f"nothing of {self._name} was running")

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
