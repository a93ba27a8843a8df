"""What launches share: made once in the account, used by every launch, removed by `clean`.

Each thing has a module of its own. All of them may be asked twice, and by two launches at once.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher import host_role, key_pair, log_bucket, network, placement_group, security_group
from launcher.aws import Account, explained
from launcher.names import TAG_LOGDIR
from launcher.runs import STANDING
from launcher.security_group import Source
from launcher.things import Thing
from txl_jax.config import Config
from txl_jax.errors import UserError


class Wishes(Protocol):
    """What of a launch's command line matters here."""

    @property
    def experiment(self) -> Config: ...
    @property
    def bucket(self) -> str: ...
    @property
    def subnet(self) -> str: ...
    @property
    def reservation(self) -> str: ...
    @property
    def capacity_block(self) -> str: ...


@dataclass(frozen=True)
class Standing:
    """What stands ready for a launch."""

    bucket: str
    key_name: str
    key_path: Path
    """The private half on this machine."""
    security_group: str
    """Its id."""
    profile: str
    """Name of the instance profile."""
    subnets: dict[str, str]
    """Subnet id by zone."""
    placement_groups: dict[str, str]
    """Name of the cluster placement group by zone; empty if the hosts are not to be in one."""


def missing(account: Account, command: Wishes, zones: Iterable[str]) -> list[str]:
    """What `ensure` would make, in words; nothing is made.

    `zones`: as for `ensure`.

    Raises UserError for a bucket or subnet that cannot be used, and whatever AWS refuses.
    """
    bucket = log_bucket.bucket_name(account, command.bucket)

    def in_the_network() -> list[str]:
        found = network.find(account, command.subnet)
        near = _near(command, zones, found)
        return [
            *network.missing(account, command.subnet),
            *security_group.missing(account, found),
            *placement_group.missing(account, near),
        ]

    with ThreadPoolExecutor() as threads:
        words = [
            threads.submit(log_bucket.missing, account, bucket),
            threads.submit(key_pair.missing, account),
            threads.submit(host_role.missing, account, bucket),
            threads.submit(in_the_network),
        ]
    return [word for waited in words for word in waited.result()]


def ensure(
    account: Account, command: Wishes, allowed: Iterable[Source] | None, zones: Iterable[str]
) -> Standing:
    """Makes what is missing.

    Args:
      allowed: where SSH may come from; None: from where it may already.
      zones: where hosts may be started that can stand in a cluster placement group.

    Raises UserError as `missing`, and if something of the same name is not the launcher's.
    """
    bucket = log_bucket.bucket_name(account, command.bucket)

    def in_the_network() -> tuple[network.Network, str, dict[str, str]]:
        found = network.ensure(account, command.subnet)
        return (
            found,
            security_group.ensure(account, found, allowed),
            placement_group.ensure(account, _near(command, zones, found)),
        )

    with ThreadPoolExecutor() as threads:
        made = threads.submit(log_bucket.ensure, account, bucket)
        key_path = threads.submit(key_pair.ensure, account)
        profile = threads.submit(host_role.ensure, account, bucket)
        placed = threads.submit(in_the_network)
    made.result()
    where, group, placement_groups = placed.result()
    return Standing(
        bucket=bucket,
        key_name=key_pair.key_name(account),
        key_path=key_path.result(),
        security_group=group,
        profile=profile.result(),
        subnets=where.subnets,
        placement_groups=placement_groups,
    )


def unused(account: Account) -> list[Thing]:
    """What the launcher made for the caller, or for everybody's hosts, and no instance uses.

    A bucket only if it is empty. A default VPC that was made stays: others may use it.
    """
    keys, profiles, groups, buckets = _used_by_instances(account)
    return [
        *security_group.unused(account),
        *placement_group.unused(account, groups),
        *key_pair.unused(account, keys),
        *host_role.unused(account, profiles),
        *(thing for thing in log_bucket.unused(account) if thing.name not in buckets),
    ]


def remove(account: Account, things: list[Thing]) -> list[tuple[Thing, str]]:
    """Removes what `unused` found; what is gone already is no error.

    Returns what stays, and why: it has come into use since, or AWS refuses.
    """
    removers = {
        "bucket": log_bucket.remove,
        "key pair": key_pair.remove,
        "placement group": placement_group.remove,
        "role": host_role.remove,
        "security group": security_group.remove,
    }
    stay = []
    for thing in things:
        try:
            removers[thing.kind](account, thing.name)
        except UserError as error:
            stay.append((thing, str(error)))
    return stay


def _near(command: Wishes, zones: Iterable[str], where: network.Network | None) -> list[str]:
    """Zones where the hosts are to stand close together, as far as hosts can be there.

    A reservation or capacity block has its own place, and one host is close to itself.
    """
    alone = command.experiment.cluster.machines == 1
    if alone or command.reservation or command.capacity_block:
        return []
    return [zone for zone in zones if where is None or zone in where.subnets]


@explained()
def _used_by_instances(account: Account) -> tuple[set[str], set[str], set[str], set[str]]:
    """Names of key pairs, profiles, placement groups and, by their tags, buckets of instances."""
    pages = account.client("ec2").get_paginator("describe_instances")
    instances = [
        instance
        for page in pages.paginate(
            # What is still shutting down holds its group.
            Filters=[{"Name": "instance-state-name", "Values": [*STANDING, "shutting-down"]}]
        )
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
    ]
    profiles = [instance.get("IamInstanceProfile", {}).get("Arn", "") for instance in instances]
    return (
        {instance.get("KeyName", "") for instance in instances},
        {arn.rpartition("/")[2] for arn in profiles},
        {instance["Placement"].get("GroupName", "") for instance in instances},
        {
            tag["Value"].removeprefix("s3://").split("/")[0]
            for instance in instances
            for tag in instance.get("Tags", [])
            if tag["Key"] == TAG_LOGDIR
        },
    )
