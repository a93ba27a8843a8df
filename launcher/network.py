"""Where hosts stand in the network: the default VPC, or the one of a subnet that is named."""

import socket
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from botocore.exceptions import ClientError

from launcher.aws import Account, error_code, explained
from launcher.names import printable
from txl_jax.errors import UserError

_DEFAULT_CIDR = "172.31.0.0/16"
"""Addresses of every default VPC."""


@dataclass(frozen=True)
class Network:
    """A VPC and the subnets in which hosts may be."""

    vpc: str
    cidr: str
    """The VPC's addresses."""
    subnets: dict[str, str]
    """Subnet id by zone."""


@explained()
def missing(account: Account, subnet: str) -> list[str]:
    """What `ensure` would make, in words."""
    if subnet or _default_vpc(account):
        return []
    return [f"default VPC of {account.region}, with a subnet in each zone"]


@explained()
def ensure(account: Account, subnet: str) -> Network:
    """The subnet that is named, or the default VPC, which is made if the account has none.

    Raises UserError if there is no such subnet.
    """
    if not subnet and not _default_vpc(account):
        try:
            account.client("ec2").create_default_vpc()
        except ClientError as error:
            if error_code(error) != "DefaultVpcAlreadyExists":
                raise
    network = find(account, subnet)
    if not network:
        raise UserError(f"there is no default VPC in {account.region}: name a --subnet")
    return network


@explained()
def find(account: Account, subnet: str) -> Network | None:
    """As `ensure`, but makes nothing; None: there is no default VPC."""
    if subnet:
        found = [_subnet(account, subnet)]
        vpc = _vpcs(account, [{"Name": "vpc-id", "Values": [found[0]["VpcId"]]}])[0]
    else:
        vpc = _default_vpc(account)
        if not vpc:
            return None
        found = account.client("ec2").describe_subnets(
            Filters=[
                {"Name": "vpc-id", "Values": [vpc["VpcId"]]},
                {"Name": "default-for-az", "Values": ["true"]},
                {"Name": "state", "Values": ["available"]},
            ]
        )["Subnets"]
        if not found:
            raise UserError(f"the default VPC {vpc['VpcId']} has no subnets: name a --subnet")
    by_zone = sorted((known["AvailabilityZone"], known["SubnetId"]) for known in found)
    return Network(vpc["VpcId"], vpc["CidrBlock"], dict(by_zone))


def own_private_address(network: Network | None) -> str:
    """This machine's address towards the VPC: from within it, or through a VPN.

    `network`: None for the default VPC that is yet to be made.

    Raises UserError if there is no way to it.
    """
    cidr = network.cidr if network else _DEFAULT_CIDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting such a socket sends nothing; it only looks the way up.
            probe.connect((str(ip_network(cidr)[1]), 22))
        except OSError as error:
            raise UserError(
                f"this machine has no way to the hosts' network {cidr}: --private-ip works from "
                "within it or through a VPN; or say where SSH comes from with --ssh-cidr"
            ) from error
        return probe.getsockname()[0]


def _vpcs(account: Account, filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return account.client("ec2").describe_vpcs(Filters=filters)["Vpcs"]


def _default_vpc(account: Account) -> dict[str, Any] | None:
    return next(iter(_vpcs(account, [{"Name": "is-default", "Values": ["true"]}])), None)


def _subnet(account: Account, subnet: str) -> dict[str, Any]:
    try:
        return account.client("ec2").describe_subnets(SubnetIds=[subnet])["Subnets"][0]
    except ClientError as error:
        if not error_code(error).startswith("InvalidSubnetI"):
            raise
        raise UserError(f"there is no subnet {printable(subnet)!r} in {account.region}") from error
