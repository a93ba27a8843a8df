"""A look at a run: what EC2 and S3 tell of it at one moment. No host is asked.

All times are those of AWS' clocks, as this machine's may be wrong.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from launcher import objects, record, runs, status
from launcher.aws import Account, explained
from launcher.record import Record
from launcher.runs import Host, Run
from launcher.status import Status
from txl_jax.errors import UserError

DIGITS = 9
"""Of US dollars: three times 0.1 is 0.3."""


@dataclass(frozen=True)
class Look:
    """What was seen."""

    now: datetime
    record: Record
    version: str
    """Of the record in the bucket."""
    run: Run | None
    """The hosts of the launch that EC2 remembers, gone ones too; None: there are none."""
    status: Status
    """What the trainers tell in S3."""
    impaired: frozenset[str]
    """Ids of instances that fail EC2's own checks."""
    spot: Mapping[str, float] = field(default_factory=dict)
    """US dollars an hour of a spot host now, by zone, as far as they were asked for."""

    @property
    def machines(self) -> int:
        """Hosts that the run trains on."""
        return self.record.config.cluster.machines

    def of_state(self, *states: str) -> tuple[Host, ...]:
        """The hosts that are in one of these states, by number; no two of one number."""
        hosts = self.run.current().hosts if self.run else ()
        return tuple(host for host in hosts if host.state in states)

    @property
    def alive(self) -> tuple[Host, ...]:
        """The hosts that run or come up."""
        return self.of_state("pending", "running")

    @property
    def standing(self) -> tuple[Host, ...]:
        """The hosts that cost, or will when they are started again."""
        return self.of_state(*runs.STANDING)

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of hosts of which none runs, comes up, stops or is stopped."""
        there = {host.index for host in self.standing}
        return tuple(sorted(set(range(self.machines)) - there))

    @property
    def silence(self) -> timedelta:
        """For how long no process has shown that it lives, since the last host's start."""
        shown = [host.launched for host in self.alive]
        if self.status.seen:
            shown.append(self.status.seen)
        return self.now - max(shown) if shown else timedelta()

    def hourly(self, hosts: Iterable[Host]) -> float | None:
        """US dollars an hour of hosts, no less than when they were started; None: not known."""
        known = [
            None if host.price is None else host.price + host.rise(self.spot) for host in hosts
        ]
        return None if None in known else round(sum(price or 0.0 for price in known), DIGITS)

    def without(self, gone: Iterable[Host]) -> "Look":
        """The same as if these hosts were gone already."""
        if not self.run:
            return self
        ids = {host.instance_id for host in gone}
        hosts = tuple(host for host in self.run.hosts if host.instance_id not in ids)
        return dataclasses.replace(self, run=dataclasses.replace(self.run, hosts=hosts))


def look(account: Account, bucket: str, name: str) -> Look:
    """Looks at the run `name`.

    Raises UserError if AWS is away, or if what the run was launched with is not known any more.
    """
    with ThreadPoolExecutor() as threads:
        known = threads.submit(record.read, account, bucket, name)
        found = threads.submit(runs.find, account, name, all_users=True, gone=True)
        told = threads.submit(status.read, account, bucket, name)
        now = threads.submit(objects.clock, account, bucket)
        impaired = threads.submit(_impaired, account)
    launched, version = known.result()
    if launched is None:
        raise UserError(
            f"what {name} was launched with is not known any more: s3://{bucket}/"
            f"{record.key(name)} is gone, or damaged"
        )
    ours = [run for run in found.result() if run.launch == launched.launch]
    return Look(
        now=now.result(),
        record=launched,
        version=version,
        run=ours[-1] if ours else None,
        status=told.result(),
        impaired=impaired.result(),
    )


@explained()
def _impaired(account: Account) -> frozenset[str]:
    """Of all running instances in the region, those that fail a check."""
    pages = account.client("ec2").get_paginator("describe_instance_status")
    kinds = {"instance-status.status": "InstanceStatus", "system-status.status": "SystemStatus"}
    return frozenset(
        told["InstanceId"]
        for name, kind in kinds.items()
        for page in pages.paginate(Filters=[{"Name": name, "Values": ["impaired"]}])
        for told in page["InstanceStatuses"]
        # What looks like EC2 may not know the filters, and hosts would be given up that are well.
        if told[kind]["Status"] == "impaired"
    )
