"""What launches share: made once in the account, used by every launch, removed by `clean`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.aws import Account


@dataclass(frozen=True)
class Standing:
    """What stands ready for a launch."""

    bucket: str
    key_name: str
    key_path: Path
    """The private half on this machine."""
    security_group: str
    """Id."""
    profile: str
    """Name of the instance profile."""
    subnets: dict[str, str]
    """Subnet id by zone."""
    placement_groups: dict[str, str]
    """Name of the cluster placement group by zone (a group with instances is bound to one zone);
    empty if the run has no use for one."""


@dataclass(frozen=True)
class Thing:
    """Something that the launcher made in the account."""

    kind: str
    name: str


def missing(account: Account, command: Any) -> list[str]:
    """What `ensure` would make, in words."""
    raise NotImplementedError


def ensure(account: Account, command: Any) -> Standing:
    """Makes what is missing. Two launches may do it at once."""
    raise NotImplementedError


def unused(account: Account) -> list[Thing]:
    """What the launcher made for this caller or for all, and nothing uses."""
    raise NotImplementedError


def remove(account: Account, things: list[Thing]) -> None:
    """Removes them."""
    raise NotImplementedError
