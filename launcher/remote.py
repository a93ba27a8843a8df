"""SSH to all hosts of a run at once (Fabric); a host is known by its key, or is not talked to."""

import base64
import binascii
import contextlib
import io
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, TypeVar

import fabric
import paramiko
from invoke.exceptions import CommandTimedOut, ThreadException
from paramiko.ssh_exception import (
    AuthenticationException,
    BadHostKeyException,
    NoValidConnectionsError,
    SSHException,
)

from launcher.names import printable
from launcher.runs import Run
from txl_jax.errors import UserError

HOME = "txl"
"""Folder in the login's home that holds all that the launcher puts on a host."""
LOST = -1
"""Stands for the exit status of a command whose connection was lost."""
TIMED_OUT = 124
_CONNECT_SECONDS = 10.0
_PAUSE_SECONDS = 0.5
_GLANCE_SECONDS = 0.2
_KEEPALIVE_SECONDS = 15
_SILENT_SECONDS = 60.0
"""After which a host that takes nothing more of a file has failed."""
_LONGEST_LINE = 300
_LISTED = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.-]*(?::[0-9]+)?")

_T = TypeVar("_T")


class _Runner(fabric.Remote):
    """Sends all input at once; Fabric does a letter every hundredth of a second."""

    def handle_stdin(self, input_: IO[str], output: IO[str], echo: bool = False) -> None:
        """As Fabric's. What ends before it has read its input leaves the rest."""
        with contextlib.suppress(OSError):
            self.write_proc_stdin(input_.read())
            self.close_proc_stdin()


_RUNNERS = {"runners": {"remote": _Runner}}


class Output(NamedTuple):
    """What a command did on a host."""

    host: str
    status: int
    """Its exit status, `LOST` or `TIMED_OUT`."""
    out: str
    err: str

    def last_line(self) -> str:
        """The last line of what it said, fit to be shown."""
        lines = [line for line in f"{self.out}\n{self.err}".splitlines() if line.strip()]
        return printable(lines[-1].strip())[:_LONGEST_LINE] if lines else f"status {self.status}"


class Hosts:
    """Connections to the hosts of a run, in the order of their numbers.

    A context manager that closes them. Connections that were lost are opened again when needed.
    """

    def __init__(self, names: Sequence[str], connections: Sequence[fabric.Connection]):
        # What it logs as errors are the tries of `wait`, with tracebacks.
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)
        self.names = tuple(names)
        """For people: NAME-0, NAME-1 …, or as listed."""
        self.addresses = tuple(str(connection.host) for connection in connections)
        """Where SSH finds them."""
        self._connections = tuple(connections)
        self._closed = threading.Event()
        self._worked = [0.0] * len(self.names)
        self._began: dict[int, float] = {}

    @staticmethod
    def of(run: Run, key_path: Path, private: bool) -> "Hosts":
        """The hosts of a run on AWS, by the keys in their tags; `private`: by private address.

        Nothing of the user's own settings of SSH is used.

        Raises UserError for a host without a key or an address.
        """
        names = [f"{run.name}-{host.index}" for host in run.hosts]
        connections = []
        for name, host in zip(names, run.hosts, strict=True):
            address = run.address(host, private)
            connection = fabric.Connection(
                address,
                user=host.user,
                port=22,
                config=fabric.Config(lazy=True, overrides=_RUNNERS),
                connect_kwargs={
                    "key_filename": str(key_path),
                    "allow_agent": False,
                    "look_for_keys": False,
                },
            )
            _strict(connection).get_host_keys().add(address, *_public_key(name, host.host_key))
            connections.append(connection)
        return Hosts(names, connections)

    @staticmethod
    def listed(text: str) -> "Hosts":
        """Hosts that run already: `user@a,user@b`, or a file with one a line.

        The user's own settings of SSH hold: ~/.ssh/config, keys, agent. A host's key has to stand
        in a known_hosts file.

        Raises UserError: none is listed, one is there twice, one cannot be a host.
        """
        names = _listed(text)
        connections: dict[Any, fabric.Connection] = {}
        twice: list[str] = []
        for name in names:
            connection = fabric.Connection(name, config=fabric.Config(overrides=_RUNNERS))
            where = (connection.host, connection.port)  # whoever logs in: they share its devices
            if where in connections:
                twice.append(name)
            connections[where] = connection
        if twice:
            listed = ", ".join(dict.fromkeys(twice))
            raise UserError(f"--hosts has {listed} twice; a host can be in a run once")
        for connection in connections.values():
            hop: Any = connection
            while isinstance(hop, fabric.Connection):
                client = _strict(hop)
                client.load_system_host_keys()
                if Path("/etc/ssh/ssh_known_hosts").exists():
                    client.load_system_host_keys("/etc/ssh/ssh_known_hosts")
                hop = hop.gateway
        return Hosts(names, list(connections.values()))

    def wait(self, timeout: float) -> None:
        """Until all hosts answer, for `timeout` seconds.

        Raises UserError: names the hosts that do not, and why; at once if a host has another key
        than it should have, or one that is not known.
        """
        deadline = time.monotonic() + timeout
        failed = threading.Event()

        def answer(index: int) -> str:
            while not self._closed.is_set():
                try:
                    self._open(index, deadline - time.monotonic())
                    return ""
                except BadHostKeyException:
                    failed.set()
                    return (
                        "its key is not the one that it should have: it is another machine, or "
                        "somebody is in between; do not go on"
                    )
                except (OSError, EOFError, SSHException) as error:
                    reason = _reason(error)
                    if "known_hosts" in reason:
                        failed.set()
                        return "its key is not known: connect once with ssh, and check the key"
                left = deadline - time.monotonic()
                if left <= 0:
                    return f"no answer in {timeout:.0f} s ({reason})"
                if failed.wait(min(_PAUSE_SECONDS, left)):
                    break
            return ""

        self._raise(self._each(answer), "cannot reach")

    def run(
        self,
        command: str | Sequence[str],
        timeout: float,
        *,
        quiet: bool = True,
        check: bool = True,
        input: str = "",
    ) -> list[Output]:
        """Runs a shell command on all hosts, or on each its own; all finish before this returns.

        Args:
          timeout: seconds after which a command is given up; it may go on on its host.
          quiet: print nothing; otherwise lines as they come, each with its host's name.
          check: raise if any fails.
          input: what the commands read; secrets go here, as no list of processes shows it.

        Raises UserError: names every host where the command failed, with the last line it said.
        """
        commands = [command] * len(self.names) if isinstance(command, str) else command
        if len(commands) != len(self.names):
            raise ValueError(f"{len(commands)} commands for {len(self.names)} hosts")

        def do(index: int) -> Output:
            return self._run(index, commands[index], timeout, quiet, input)

        outputs = self._each(do)
        if check:
            self._raise([output.last_line() if output.status else "" for output in outputs])
        return outputs

    def put(self, content: bytes | Path | Sequence[bytes], path: str, mode: int = 0o600) -> None:
        """Writes a file on all hosts, or on each its own; whole or not at all.

        `path` is relative to the login's home; its folder has to be there.

        Raises UserError: names the hosts where that failed.
        """

        def do(index: int) -> str:
            try:
                self._put(index, _content(content, index), path, mode)
            except TimeoutError:
                return f"{path}: no answer in {_SILENT_SECONDS:.0f} s"
            except (OSError, EOFError, SSHException) as error:
                return f"{path}: {_reason(error)}"
            return ""

        self._raise(self._each(do))

    def seconds(self) -> list[float]:
        """For how long each host has been at work for us so far; any thread may ask."""
        now, began = time.monotonic(), dict(self._began)
        return [done + now - began.get(index, now) for index, done in enumerate(self._worked)]

    def close(self) -> None:
        """Closes all connections; what is under way on them fails."""
        self._closed.set()
        self.close_connections()

    def close_connections(self) -> None:
        """Has the next use log in anew; nothing may be under way."""
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _each(self, do: Callable[[int], _T]) -> list[_T]:
        """What `do` returns for each host's number; all are done at the same time."""

        def timed(index: int) -> _T:
            self._began[index] = began = time.monotonic()
            try:
                return do(index)
            finally:
                self._worked[index] += time.monotonic() - began
                del self._began[index]

        with ThreadPoolExecutor(len(self.names)) as pool:
            try:
                started = [pool.submit(timed, index) for index in range(len(self.names))]
                # A wait without a timeout never sees a Ctrl-C that came just as it began.
                while wait(started, _GLANCE_SECONDS).not_done:
                    pass
                return [future.result() for future in started]
            except BaseException:  # Ctrl-C among others: the threads would wait on
                self.close()
                raise

    def _open(self, index: int, patience: float = _CONNECT_SECONDS) -> fabric.Connection:
        connection: Any = self._connections[index]
        if not connection.is_connected:
            connection.connect_timeout = min(max(patience, 1.0), _CONNECT_SECONDS)
            try:
                connection.open()
            except BaseException:
                connection.client.close()  # a transport that was begun has a thread
                raise
            connection.transport.set_keepalive(_KEEPALIVE_SECONDS)
            connection.transport.channel_timeout = _SILENT_SECONDS
        return connection

    def _run(self, index: int, command: str, timeout: float, quiet: bool, input: str) -> Output:
        name = self.names[index]
        streams = {stream: _Prefixed(name) for stream in ("out_stream", "err_stream")}
        shown = {} if quiet else streams
        try:
            done = self._open(index).run(
                command,
                hide=quiet,
                warn=True,
                timeout=timeout,
                in_stream=io.StringIO(input),
                encoding="utf-8",
                **shown,
            )
        except CommandTimedOut as error:
            done = error.result
            reason = f"took longer than {timeout:.0f} s"
            return Output(name, TIMED_OUT, done.stdout, f"{done.stderr}\n{reason}")
        except (OSError, EOFError, SSHException, ThreadException) as error:
            return Output(name, LOST, "", f"the connection was lost: {_reason(error)}")
        finally:
            for stream in streams.values():
                stream.end()
        lost = "\nthe connection was lost" if done.exited == LOST else ""
        return Output(name, done.exited, done.stdout, done.stderr + lost)

    def _put(self, index: int, content: io.BufferedIOBase, path: str, mode: int) -> None:
        client: Any = self._open(index).client
        draft = f"{path}.tmp"
        with content, client.open_sftp() as sftp:
            sftp.get_channel().settimeout(_SILENT_SECONDS)
            sftp.open(draft, "w").close()
            sftp.chmod(draft, mode)
            sftp.putfo(content, draft)
            sftp.posix_rename(draft, path)

    def _raise(self, problems: Sequence[str], what: str = "failed on") -> None:
        """Raises UserError if any host has a problem; it names them all."""
        named = [
            f"{name}: {problem}"
            for name, problem in zip(self.names, problems, strict=True)
            if problem
        ]
        if named:
            raise UserError(f"{what} {len(named)} of {len(self.names)} hosts: {'; '.join(named)}")


class _Prefixed(io.TextIOBase):
    """Prints whole lines, each after a host's name."""

    def __init__(self, name: str):
        self._name, self._rest = name, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            # In one write, as other hosts print at the same time.
            sys.stdout.write(f"{self._name}: {printable(line)}\n")
        return len(text)

    def end(self) -> None:
        """Prints what came last, if no end of a line came with it."""
        if self._rest:
            self.write("\n")
            self.flush()

    def flush(self) -> None:
        sys.stdout.flush()


def _listed(text: str) -> list[str]:
    path = Path(text)
    try:
        whole = path.read_text("utf-8") if "," not in text and path.is_file() else None
    except OSError as error:
        raise UserError(f"--hosts {printable(text)}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--hosts {printable(text)}: no text in UTF-8; write one user@host a line"
        ) from error
    if whole is None:
        lines = (word.strip() for word in text.split(","))
    else:
        lines = (line.partition("#")[0].strip() for line in whole.splitlines())
    names = [line for line in lines if line]
    if not names:
        raise UserError(f"--hosts {text}: no host is listed; write user@a,user@b or a file of them")
    for name in names:
        if not _LISTED.fullmatch(name):
            raise UserError(f"--hosts: {printable(name)} is no host; write user@host")
    return names


def _strict(connection: fabric.Connection) -> paramiko.SSHClient:
    """The connection's client, which from now on takes no key that it does not know."""
    client: Any = connection.client
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    return client


def _public_key(name: str, text: str) -> tuple[str, paramiko.PKey]:
    """Type and key from `ssh-ed25519 AAAA…`, as a tag holds it."""
    kind, _, content = text.partition(" ")
    try:
        if kind == "ssh-ed25519":
            return kind, paramiko.Ed25519Key(data=base64.b64decode(content, validate=True))
    except (binascii.Error, SSHException, ValueError, IndexError):
        pass
    raise UserError(f"{name} has no SSH key in its tags, so that it cannot be told from others")


def _content(content: bytes | Path | Sequence[bytes], index: int) -> io.BufferedIOBase:
    if isinstance(content, Path):
        return content.open("rb")
    return io.BytesIO(content if isinstance(content, bytes) else content[index])


def _reason(error: BaseException) -> str:
    """Why a connection failed, in a few words."""
    if isinstance(error, NoValidConnectionsError):
        error = next(iter(error.errors.values()))
    if isinstance(error, AuthenticationException):
        return "it does not take our key"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return printable(str(error) or type(error).__name__)[:_LONGEST_LINE]
