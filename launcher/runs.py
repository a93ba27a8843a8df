"""Runs and their hosts, as the tags of EC2 tell of them."""

from dataclasses import dataclass
from datetime import datetime

from launcher.aws import Account


@dataclass(frozen=True)
class Host:
    """One instance of a run."""

    index: int
    instance_id: str
    private_ip: str
    """Empty: none (any more)."""
    public_ip: str
    """Empty: none."""
    state: str
    """As EC2 says: pending, running, shutting-down, terminated, stopping, stopped."""
    zone: str
    kind: str
    """Instance type."""
    spot: bool
    price: float | None
    """US dollars an hour when it was started; None: not known."""
    launched: datetime
    """Time of the latest start."""
    ended: datetime | None
    """When it stopped or was terminated; None: it runs, or EC2 does not say."""
    host_key: str
    """Public half of its SSH key; empty: not known."""
    user: str
    """Login name."""
    key_name: str
    """Key pair that opens it."""
    reason: str
    """Why it is in its state, where EC2 says so."""


@dataclass(frozen=True)
class Run:
    """The instances of one launch."""

    name: str
    owner: str
    config: str
    launch: str
    logdir: str
    started: datetime
    hosts: tuple[Host, ...]
    """By number."""

    def cost_so_far(self, now: datetime) -> float:
        """US dollars for the hosts since their latest start."""
        raise NotImplementedError

    def address(self, host: Host, private: bool) -> str:
        """Where SSH finds a host."""
        raise NotImplementedError


def find(
    account: Account, name: str | None = None, all_users: bool = False, gone: bool = False
) -> list[Run]:
    """Runs of the caller, or of everybody; `gone`: also what was terminated within the hour."""
    raise NotImplementedError
