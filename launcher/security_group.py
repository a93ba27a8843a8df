"""The security group of a caller's hosts: SSH from the caller, anything among the hosts."""

import urllib.request
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from botocore.exceptions import ClientError

from launcher.aws import Account, error_code, explained
from launcher.names import printable
from launcher.network import Network, own_private_address
from launcher.runs import STANDING
from launcher.things import TAGS, Thing, is_ours
from txl_jax.errors import UserError

Source = IPv4Network | IPv6Network
_Rule = tuple[str, int, int, str]
"""Protocol, first and last port, and a CIDR or the id of a group."""

_ALL = "-1"
_ECHO = "https://checkip.amazonaws.com"
_NARROWEST_NETWORK = {4: 8, 6: 16}
"""Bits: who lets in more lets in the world."""


def group_name(account: Account) -> str:
    """Name of the caller's security group."""
    return f"txl-{account.user}"


def own_public_address() -> str:
    """The address from which this machine reaches the internet.

    Raises UserError if AWS does not tell.
    """
    try:
        with urllib.request.urlopen(_ECHO, timeout=10) as answer:
            return str(ip_address(answer.read(64).decode().strip()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot learn this machine's address from {_ECHO} ({error}): say with --ssh-cidr "
            "where SSH may come from"
        ) from error


def sources(
    ssh_cidr: str,
    private_ip: bool,
    network: Network | None,
    own_address: Callable[[], str] = own_public_address,
) -> list[Source]:
    """Where SSH may come from: what is named (several with commas), or this machine alone.

    `network`: of the hosts; None: the default VPC, which is yet to be made.

    Raises UserError for what is no network, or is the world.
    """
    if not ssh_cidr:
        return [ip_network(own_private_address(network) if private_ip else own_address())]
    found = []
    for word in ssh_cidr.split(","):
        try:
            source = ip_network(word.strip(), strict=False)
        except ValueError:
            raise UserError(
                f"--ssh-cidr {printable(ssh_cidr)!r} is no network: 203.0.113.7 or 203.0.113.0/24 "
                "would be"
            ) from None
        if source.prefixlen < _NARROWEST_NETWORK[source.version]:
            raise UserError(f"--ssh-cidr {source} would open the hosts to the world")
        found.append(source)
    return found


@explained()
def missing(account: Account, network: Network | None) -> list[str]:
    """What `ensure` would make, in words."""
    if network and _find(account, network):
        return []
    return [f"security group {group_name(account)}: from outside only SSH, all within the group"]


@explained()
def ensure(account: Account, network: Network, allowed: Iterable[Source] | None) -> str:
    """Makes the group, lets SSH in from where it is allowed, and returns the group's id.

    `allowed`: None: from where it is let in already.

    What else is open is closed when no host is in the group, so that another launch of the caller,
    from elsewhere, is not cut off; what is open to the world, at once.

    Raises UserError if a group of that name is not the launcher's.
    """
    group = _find(account, network) or _create(account, network)
    if not is_ours(group.get("Tags")):
        raise UserError(
            f"the security group {group['GroupName']} in {network.vpc} was not made by this "
            "launcher: rename it"
        )
    group_id = group["GroupId"]
    among = (_ALL, -1, -1, group_id)
    present = _rules(group["IpPermissions"])
    wanted = {among, *(present if allowed is None else map(_ssh, allowed))}
    ec2 = account.client("ec2")
    for rule in sorted(wanted - present):
        _unless_there(ec2.authorize_security_group_ingress, group_id, rule)
    # EFA asks for the rule, though the group that EC2 makes lets everything out.
    if among not in _rules(group["IpPermissionsEgress"]):
        _unless_there(ec2.authorize_security_group_egress, group_id, among)
    extra = present - wanted
    closed = {rule for rule in present if _is_of_the_world(rule)}
    if extra - closed and not _is_used(account, group_id):
        closed = extra
    for rule in sorted(closed):
        ec2.revoke_security_group_ingress(GroupId=group_id, IpPermissions=[_permission(rule)])
    return group_id


@explained()
def admit(
    account: Account, instance_ids: list[str], allowed: Iterable[Source], mosh: bool = False
) -> None:
    """Lets SSH in to hosts that run, or mosh, from a machine that did not launch them.

    Raises UserError if the hosts are in no group of the launcher's.
    """
    ec2 = account.client("ec2")
    groups = {
        group["GroupId"]
        for reservation in ec2.describe_instances(InstanceIds=instance_ids)["Reservations"]
        for instance in reservation["Instances"]
        for group in instance["SecurityGroups"]
    }
    # For no ids at all EC2 would tell of every group in the region.
    known = ec2.describe_security_groups(GroupIds=sorted(groups)) if groups else {}
    ours = [group for group in known.get("SecurityGroups", []) if is_ours(group.get("Tags"))]
    if not ours:
        raise UserError(
            "the hosts are in no security group that this launcher has made: let this machine in "
            "by SSH yourself"
        )
    for group in ours:
        wanted = {_mosh(source) if mosh else _ssh(source) for source in allowed}
        for rule in wanted - _rules(group["IpPermissions"]):
            _unless_there(ec2.authorize_security_group_ingress, group["GroupId"], rule)


@explained()
def unused(account: Account) -> list[Thing]:
    """The caller's security groups, one in each VPC at most, that no instance is in."""
    return [
        Thing("security group", group["GroupId"])
        for group in _named(account, [])
        if is_ours(group.get("Tags")) and not _is_used(account, group["GroupId"])
    ]


@explained()
def remove(account: Account, group_id: str) -> None:
    """Removes a group that nothing is in."""
    try:
        account.client("ec2").delete_security_group(GroupId=group_id)
    except ClientError as error:
        if error_code(error) != "InvalidGroup.NotFound":
            raise


def _named(account: Account, filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    name = {"Name": "group-name", "Values": [group_name(account)]}
    return account.client("ec2").describe_security_groups(Filters=[name, *filters])[
        "SecurityGroups"
    ]


def _find(account: Account, network: Network) -> dict[str, Any] | None:
    return next(iter(_named(account, [{"Name": "vpc-id", "Values": [network.vpc]}])), None)


def _create(account: Account, network: Network) -> dict[str, Any]:
    try:
        account.client("ec2").create_security_group(
            GroupName=group_name(account),
            Description="Hosts that train Transformer-XL",
            VpcId=network.vpc,
            TagSpecifications=[{"ResourceType": "security-group", "Tags": TAGS}],
        )
    except ClientError as error:
        if error_code(error) != "InvalidGroup.Duplicate":
            raise
    account.client("ec2").get_waiter("security_group_exists").wait(
        Filters=[
            {"Name": "group-name", "Values": [group_name(account)]},
            {"Name": "vpc-id", "Values": [network.vpc]},
        ],
        WaiterConfig={"Delay": 1, "MaxAttempts": 30},
    )
    group = _find(account, network)
    assert group
    return group


def _is_used(account: Account, group_id: str) -> bool:
    found = account.client("ec2").describe_instances(
        Filters=[
            {"Name": "instance.group-id", "Values": [group_id]},
            {"Name": "instance-state-name", "Values": [*STANDING, "shutting-down"]},
        ]
    )
    return bool(found["Reservations"])


def _is_of_the_world(rule: _Rule) -> bool:
    try:
        source = ip_network(rule[3])
    except ValueError:  # a group, or a list of prefixes
        return False
    return source.prefixlen < _NARROWEST_NETWORK[source.version]


def _ssh(source: Source) -> _Rule:
    return ("tcp", 22, 22, str(source))


def _mosh(source: Source) -> _Rule:
    return ("udp", 60000, 61000, str(source))


def _rules(permissions: list[dict[str, Any]]) -> set[_Rule]:
    return {
        (
            permission["IpProtocol"],
            permission.get("FromPort", -1),
            permission.get("ToPort", -1),
            source[key],
        )
        for permission in permissions
        for kind, key in (
            ("IpRanges", "CidrIp"),
            ("Ipv6Ranges", "CidrIpv6"),
            ("UserIdGroupPairs", "GroupId"),
            ("PrefixListIds", "PrefixListId"),
        )
        for source in permission.get(kind, [])
    }


def _permission(rule: _Rule) -> dict[str, Any]:
    protocol, first, last, source = rule
    ports = {} if protocol == _ALL else {"FromPort": first, "ToPort": last}
    if source.startswith("sg-"):
        return {"IpProtocol": protocol, **ports, "UserIdGroupPairs": [{"GroupId": source}]}
    if source.startswith("pl-"):
        return {"IpProtocol": protocol, **ports, "PrefixListIds": [{"PrefixListId": source}]}
    if ":" in source:
        return {"IpProtocol": protocol, **ports, "Ipv6Ranges": [{"CidrIpv6": source}]}
    return {"IpProtocol": protocol, **ports, "IpRanges": [{"CidrIp": source}]}


def _unless_there(authorize: Any, group_id: str, rule: _Rule) -> None:
    try:
        authorize(GroupId=group_id, IpPermissions=[_permission(rule)])
    except ClientError as error:
        if error_code(error) != "InvalidPermission.Duplicate":
            raise
