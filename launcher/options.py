"""Options that several commands have."""

from dataclasses import dataclass
from typing import Annotated

import tyro

RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
"""The name of a run, without an option before it."""
RunNames = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class InRegion:
    """Options of a command that asks AWS."""

    region: str = ""
    """AWS region; empty: the one that `aws configure` or AWS_REGION names."""


@dataclass(frozen=True, kw_only=True)
class OfBucket(InRegion):
    """Options of a command that reads what runs have left in S3."""

    bucket: str = ""
    """S3 bucket of the runs; empty: that of their hosts' tags, or txl-ACCOUNT-REGION."""


@dataclass(frozen=True, kw_only=True)
class OnHosts(InRegion):
    """Options of a command that logs in to hosts."""

    private_ip: bool = False
    """Reach the hosts by their private addresses: from within the VPC, or through a VPN."""


@dataclass(frozen=True, kw_only=True)
class OwnOnly(InRegion):
    """Options of a command that ends or changes a run."""

    force: bool = False
    """Do it to a run that somebody else has launched."""
