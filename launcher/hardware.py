"""What EC2 says of an instance type: its parts, where it is offered, image and prices."""

from dataclasses import dataclass

from launcher.aws import Account


@dataclass(frozen=True)
class InstanceType:
    """An instance type in one region, as EC2 describes it."""

    name: str
    gpus: int
    """NVIDIA GPUs."""
    gpu_name: str
    """As EC2 says, `V100`; empty without GPUs."""
    gpu_memory_gib: float
    """Of one GPU."""
    memory_gib: float
    vcpus: int
    efa_interfaces: int
    network_cards: int
    network_gbps: float
    architecture: str
    """x86_64 or arm64."""
    zones: tuple[str, ...]
    """Availability zones that offer it, sorted."""
    efa_cards: tuple[int, ...] = ()
    """Numbers of the network cards that take an EFA interface."""


@dataclass(frozen=True)
class Image:
    """A machine image that an instance type can start from."""

    id: str
    name: str
    user: str
    """Login name."""
    root_device: str
    needs_driver: bool
    """The image has no NVIDIA driver and the instance type has GPUs."""
    root_gib: int = 0
    """Size of the image's own root volume, which a host's cannot go below."""


@dataclass(frozen=True)
class Prices:
    """US dollars an hour of one host."""

    on_demand: float | None
    """None: not to be had."""
    spot: dict[str, float]
    """By zone, now."""


def describe(account: Account, name: str) -> InstanceType:
    """Raises UserError for a type that the region does not offer, with the nearest names."""
    raise NotImplementedError


def image(account: Account, kind: InstanceType, wanted: str = "") -> Image:
    """The image that is wanted: an AMI's id or the name of an SSM parameter; empty: by GPU."""
    raise NotImplementedError


def prices(account: Account, kind: InstanceType) -> Prices:
    """What a host costs now."""
    raise NotImplementedError
