"""An AWS account in one region, and what its errors mean to the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Account:
    """Whose credentials are used, and where."""

    region: str
    id: str
    """The account's twelve digits."""
    caller: str
    """ARN of the caller; of the role alone where the session's name is made up each time."""
    user: str
    """The caller's short name: letters, digits, `.`, `_` and `-`."""

    @classmethod
    def open(cls, region: str = "") -> "Account":
        """The account that boto3 finds; `region` goes before the configured one."""
        raise NotImplementedError

    def client(self, service: str, region: str = "") -> Any:
        """boto3's client of a service, made once. Threads may share it."""
        raise NotImplementedError


@contextmanager
def explained() -> Iterator[None]:
    """Turns whatever botocore raises in the block into a UserError that says what to do."""
    yield
