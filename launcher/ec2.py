"""Starts, stops and terminates the hosts of a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from launcher.aws import Account
from launcher.hardware import Image, InstanceType
from launcher.runs import Host, Run
from launcher.standing import Standing


@dataclass(frozen=True)
class Order:
    """What is to be started."""

    name: str
    launch: str
    kind: InstanceType
    image: Image
    count: int
    standing: Standing
    zones: tuple[str, ...]
    """In the order in which they are tried."""
    spot: bool
    max_price: float | None
    """Of one spot host, US dollars an hour; None: up to the on-demand price."""
    user_data: str
    tags: dict[str, str]
    """Of every host, beside those that this module adds: made-by, run, launch, owner, price, spot,
    user, and at the end host and Name."""
    reservation: str = ""
    capacity_block: str = ""
    private_ip: bool = False
    prices: dict[str, float] = field(default_factory=dict)
    """US dollars an hour of one host, by zone, for the tag."""


def start(account: Account, order: Order, say: Callable[[str], None]) -> Run:
    """All hosts or none; returns when all are running."""
    raise NotImplementedError


def undo(account: Account, name: str, launch: str) -> list[Host]:
    """Terminates whatever a launch has started, also what EC2 shows only a moment later."""
    raise NotImplementedError


def stop(account: Account, hosts: Iterable[Host]) -> None:
    """Stops on-demand hosts; their disks stay and cost a little."""
    raise NotImplementedError


def start_again(account: Account, hosts: Iterable[Host]) -> None:
    """Starts stopped hosts."""
    raise NotImplementedError


def terminate(account: Account, hosts: Iterable[Host]) -> None:
    """Terminates hosts for good."""
    raise NotImplementedError


def wait(account: Account, run: Run, state: str) -> Run:
    """The run when all its hosts are in a state."""
    raise NotImplementedError
