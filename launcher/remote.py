"""SSH to all hosts of a run at once (Fabric); a host is known by its key, or is not talked to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from launcher.runs import Run

USER_HOME = "txl"
"""Folder in the login's home that holds all that the launcher puts on a host."""


class Output(NamedTuple):
    """What a command did on a host."""

    host: str
    status: int
    out: str
    err: str


class Hosts:
    """Connections to hosts, numbered as in the run; a context manager that closes them."""

    names: tuple[str, ...]
    """For people: NAME-0, NAME-1 …, or user@host."""
    addresses: tuple[str, ...]
    """Where SSH finds them."""

    @staticmethod
    def of(run: Run, key_path: Path, private: bool) -> "Hosts":
        """The hosts of a run on AWS, by the keys in their tags; `private`: by private address."""
        raise NotImplementedError

    @staticmethod
    def listed(text: str) -> "Hosts":
        """Hosts that run already: `user@a,user@b`, or a file with one a line.

        Their keys have to stand in the user's known_hosts. Raises UserError: one is there twice …
        """
        raise NotImplementedError

    def wait(self, timeout: float) -> None:
        """Until all answer; UserError names those that do not, at once if a key is wrong."""
        raise NotImplementedError

    def run(self, command: str | Sequence[str], timeout: float, quiet: bool = True) -> list[Output]:
        """Runs a shell command on all hosts, or each its own; all finish before anything raises.

        `quiet`: nothing is printed meanwhile; otherwise lines, each with its host's name.
        Raises UserError: names every host where it failed, with its last line.
        """
        raise NotImplementedError

    def put(self, content: bytes | Path, path: str, mode: int = 0o600) -> None:
        """Writes a file below the login's home on all hosts, whole or not at all."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
