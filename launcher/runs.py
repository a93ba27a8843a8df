"""Runs and their hosts, as the tags of EC2 tell of them.

Anybody who may tag instances in the account could have written these tags. What is not of the form
that the launcher writes is left out, or shown without its control characters; an instance without
a proper name of a run is not the launcher's.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from launcher import names
from launcher.aws import Account, explained
from txl_jax.errors import UserError

STANDING = ("pending", "running", "stopping", "stopped")
"""States of hosts that cost something, or can be started again."""
_GONE = ("shutting-down", "terminated")
_RUNNING = ("pending", "running")

_LAUNCH = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HOST_NUMBER = re.compile(r"[0-9]{1,5}")
_HOST_KEY = re.compile(r"ssh-ed25519 [A-Za-z0-9+/]{68}")
_LOGIN = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_LOGDIR = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[A-Za-z0-9._/-]+")
_ENDED = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


@dataclass(frozen=True)
class Host:
    """One instance of a run."""

    index: int
    """Number of the host in its run, from 0."""
    instance_id: str
    private_ip: str
    """Empty: it has none, or none any more."""
    public_ip: str
    """Empty: it has none, or none any more."""
    state: str
    """As EC2 says: pending, running, shutting-down, terminated, stopping, stopped."""
    zone: str
    kind: str
    """Name of the instance type."""
    spot: bool
    price: float | None
    """US dollars an hour when it was started; None: not known."""
    launched: datetime
    """Its latest start."""
    ended: datetime | None
    """When it was stopped or terminated; None: it runs, or EC2 does not say."""
    host_key: str
    """Public half of its SSH key; empty: not known."""
    user: str
    """Login name; empty: not known."""
    key_name: str
    """Key pair that opens it; empty: none."""
    reason: str
    """Why it is in its state, where EC2 says so."""
    reason_code: str
    """The same in a word: `Server.SpotInstanceTermination`, `Client.UserInitiatedShutdown` …"""
    hours_before: float
    """For which it ran before it was last stopped, as far as that is known."""

    def rise(self, spot: Mapping[str, float]) -> float:
        """US dollars an hour by which spot prices, by zone, are above what it cost when started."""
        if not self.spot or self.price is None:
            return 0.0
        return max(0.0, spot.get(self.zone, 0.0) - self.price)

    def hours(self, now: datetime, last_seen: datetime | None = None) -> float:
        """Hours for which it has run.

        Args:
          last_seen: when the run was last seen at work. EC2 does not say when a host stopped that
            shut itself down: it is counted up to then; without it, not at all.
        """
        end = now if self.state in _RUNNING else self.ended or last_seen or self.launched
        seconds = (min(end, now) - self.launched).total_seconds()
        return self.hours_before + max(0.0, seconds / 3600)


@dataclass(frozen=True)
class Run:
    """The instances of one launch."""

    name: str
    owner: str
    """ARN of whoever launched it."""
    config: str
    launch: str
    logdir: str
    """Empty: not known."""
    started: datetime
    hosts: tuple[Host, ...]
    """By number; those that are gone before those that took their place."""

    def current(self) -> "Run":
        """The run without hosts that are gone and that others have taken the place of."""
        last = {host.index: host for host in sorted(self.hosts, key=_precedence)}
        return replace(self, hosts=tuple(last[index] for index in sorted(last)))

    def with_host_key(self, public: str) -> "Run":
        """The run with the key that its hosts were given, whatever their tags say by now."""
        return replace(self, hosts=tuple(replace(host, host_key=public) for host in self.hosts))

    @property
    def price(self) -> float | None:
        """US dollars an hour of all hosts, by what they cost when started; None: not known."""
        prices = [host.price for host in self.hosts if host.price is not None]
        return sum(prices) if len(prices) == len(self.hosts) else None

    def cost_so_far(self, now: datetime, last_seen: datetime | None = None) -> float | None:
        """US dollars for the hours of all hosts; None: not every host's price is known.

        `last_seen`: as for `Host.hours`.
        """
        costs = [
            host.hours(now, last_seen) * host.price for host in self.hosts if host.price is not None
        ]
        return sum(costs) if len(costs) == len(self.hosts) else None

    def private(self, wanted: bool) -> bool:
        """Whether its hosts are reached by their private addresses: as wanted, or the only ones."""
        return wanted or not all(host.public_ip for host in self.hosts)

    def address(self, host: Host, private: bool) -> str:
        """Where SSH finds a host, from the internet or within the private network.

        Raises UserError if it has no such address now.
        """
        address = host.private_ip if private else host.public_ip
        if not address:
            raise UserError(
                f"host {host.index} of {self.name} is {host.state} and has no "
                f"{'private' if private else 'public'} address"
                + ("; try --private-ip" if host.private_ip and not private else "")
            )
        return address


@explained()
def find(
    account: Account, name: str | None = None, all_users: bool = False, gone: bool = False
) -> list[Run]:
    """Runs in the account's region, the oldest first.

    Args:
      name: only those of this name.
      all_users: everybody's, not the caller's alone.
      gone: with what was terminated (which EC2 remembers for an hour).

    Raises UserError for a name that no run can have.
    """
    filters = [
        {"Name": f"tag:{names.TAG_MADE_BY}", "Values": [names.MADE_BY]},
        {"Name": "instance-state-name", "Values": [*STANDING, *(_GONE if gone else ())]},
    ]
    if name is not None:
        filters.append(
            {"Name": f"tag:{names.TAG_RUN}", "Values": [names.check_run_name(name)]},
        )
    instances = [
        instance
        for page in account.client("ec2")
        .get_paginator("describe_instances")
        .paginate(Filters=filters)
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
    ]
    return [run for run in read(instances) if all_users or run.owner == account.caller]


def read(instances: list[dict[str, Any]]) -> list[Run]:
    """The runs that EC2's descriptions of instances make up, the oldest first."""
    launches: dict[tuple[str, str], list[tuple[Host, dict[str, str]]]] = defaultdict(list)
    for instance in instances:
        tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
        name, launch = tags.get(names.TAG_RUN, ""), tags.get(names.TAG_LAUNCH, "")
        if names.is_run_name(name) and _LAUNCH.fullmatch(launch):
            launches[name, launch].append((_host(instance, tags), tags))
    found = []
    for (name, launch), hosts in launches.items():
        hosts.sort(key=lambda known: (known[0].index, known[0].launched))
        tags = hosts[0][1]
        found.append(
            Run(
                name=name,
                owner=names.printable(tags.get(names.TAG_OWNER, "")),
                config=names.printable(tags.get(names.TAG_CONFIG, "")),
                launch=launch,
                logdir=_matching(_LOGDIR, tags.get(names.TAG_LOGDIR)),
                started=_time(tags.get(names.TAG_STARTED))
                or min(host.launched for host, _ in hosts),
                hosts=tuple(host for host, _ in hosts),
            )
        )
    return sorted(found, key=lambda run: (run.started, run.name))


def _precedence(host: Host) -> tuple[bool, datetime]:
    """Of hosts with one number, the last by this is the one that counts."""
    return host.state not in _GONE, host.launched


def _host(instance: dict[str, Any], tags: dict[str, str]) -> Host:
    index = _matching(_HOST_NUMBER, tags.get(names.TAG_HOST))
    transition = instance.get("StateTransitionReason") or ""
    reason = instance.get("StateReason", {}).get("Message") or transition
    ended = _ENDED.search(transition)
    return Host(
        # The launcher may have been killed between the start and this tag; EC2 numbers the
        # instances of one request in the same way.
        index=int(index) if index else instance.get("AmiLaunchIndex", 0),
        instance_id=instance["InstanceId"],
        private_ip=instance.get("PrivateIpAddress", ""),
        public_ip=instance.get("PublicIpAddress", ""),
        state=instance["State"]["Name"],
        zone=instance["Placement"]["AvailabilityZone"],
        kind=instance["InstanceType"],
        spot=instance.get("InstanceLifecycle") == "spot",
        price=_not_negative(tags.get(names.TAG_PRICE)),
        launched=instance["LaunchTime"],
        ended=datetime.fromisoformat(ended[1]).replace(tzinfo=UTC) if ended else None,
        host_key=_matching(_HOST_KEY, tags.get(names.TAG_HOST_KEY)),
        user=_matching(_LOGIN, tags.get(names.TAG_USER)),
        key_name=instance.get("KeyName", ""),
        reason=names.printable(reason),
        reason_code=names.printable(instance.get("StateReason", {}).get("Code", "")),
        hours_before=_not_negative(tags.get(names.TAG_HOURS)) or 0.0,
    )


def _matching(form: re.Pattern[str], text: str | None) -> str:
    """The text if it has the form, else an empty one."""
    return text if text and form.fullmatch(text) else ""


def _not_negative(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _time(text: str | None) -> datetime | None:
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
