"""A command's hold on a launch: of several that drive the same hosts, the latest one goes on.

Each notes an attempt of its own in the launch record before it touches the hosts. One that finds
another's there lets go of them, and leaves them as they are.
"""

import contextlib
import secrets
from dataclasses import dataclass

from launcher import record
from launcher.aws import Account
from txl_jax.errors import UserError


class Superseded(UserError):
    """Another command goes on with the launch."""


def new_attempt() -> str:
    """What no other command has noted."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Hold:
    """The hold of a command that has noted its attempt."""

    account: Account
    bucket: str
    name: str
    """Of the run."""
    attempt: str

    def lost(self) -> bool:
        """Whether the record is another command's; where it cannot be read, it is not."""
        with contextlib.suppress(UserError):
            known, _ = record.read(self.account, self.bucket, self.name)
            return known is not None and known.attempt != self.attempt
        return False

    def check(self) -> None:
        """Raises Superseded if it is lost."""
        if self.lost():
            raise Superseded(
                f"another command goes on with the launch of {self.name}: this one ends, and "
                "leaves the hosts to it"
            )
