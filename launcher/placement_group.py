"""Cluster placement groups: the hosts of a run stand close together in the network.

A group that has instances is bound to their zone, so there is one for each zone.
"""

from collections.abc import Iterable
from typing import Any

from botocore.exceptions import ClientError

from launcher.aws import Account, error_code, explained
from launcher.things import TAGS, Thing, is_ours
from txl_jax.errors import UserError


@explained()
def missing(account: Account, zones: Iterable[str]) -> list[str]:
    """What `ensure` would make, in words."""
    absent = sorted({_name(account, zone) for zone in zones} - set(_ours(account)))
    return [f"cluster placement group{'s' * (len(absent) > 1)} {', '.join(absent)}"] * bool(absent)


@explained()
def ensure(account: Account, zones: Iterable[str]) -> dict[str, str]:
    """Makes the groups that are missing; returns the name of each zone's.

    Raises UserError if a group of such a name spreads instances instead.
    """
    wanted = {zone: _name(account, zone) for zone in zones}
    present = _ours(account)
    for name in wanted.values():
        if name not in present:
            _create(account, name)
        elif present[name]["Strategy"] != "cluster":
            raise UserError(
                f"the placement group {name} is of strategy {present[name]['Strategy']}, not "
                "cluster: remove it"
            )
    return wanted


@explained()
def unused(account: Account, in_use: set[str]) -> list[Thing]:
    """The caller's groups that no instance is in (`in_use`: names of those that have some)."""
    return [
        Thing("placement group", name)
        for name, group in sorted(_ours(account).items())
        if is_ours(group.get("Tags")) and name not in in_use
    ]


@explained()
def remove(account: Account, name: str) -> None:
    """Removes a group that nothing is in."""
    try:
        account.client("ec2").delete_placement_group(GroupName=name)
    except ClientError as error:
        if error_code(error) != "InvalidPlacementGroup.Unknown":
            raise


def _name(account: Account, zone: str) -> str:
    return f"{_prefix(account)}{zone}"


def _prefix(account: Account) -> str:
    return f"txl-{account.user}-"


def _ours(account: Account) -> dict[str, dict[str, Any]]:
    """The caller's placement groups, by name."""
    found = account.client("ec2").describe_placement_groups(
        Filters=[{"Name": "state", "Values": ["pending", "available"]}]
    )["PlacementGroups"]
    prefix = _prefix(account)
    return {
        group["GroupName"]: group
        for group in found
        if group["GroupName"].removeprefix(prefix).startswith(account.region)
    }


def _create(account: Account, name: str) -> None:
    try:
        account.client("ec2").create_placement_group(
            GroupName=name,
            Strategy="cluster",
            TagSpecifications=[{"ResourceType": "placement-group", "Tags": TAGS}],
        )
    except ClientError as error:
        if error_code(error) != "InvalidPlacementGroup.Duplicate":
            raise
