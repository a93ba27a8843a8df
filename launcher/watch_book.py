"""What the watchers of a run have to know of one another, in S3: who acts, what was, what it cost.

    launches/NAME.watch.json

A watcher may be killed at any moment: the next one goes on from what stands here, in EC2 and in the
launch record. Whoever may write to the bucket may have written this: what is not of the right form
is left out.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from launcher import objects
from launcher.aws import Account
from launcher.names import printable
from launcher.runs import Host, Run
from txl_jax.json_values import count, listed, mapping, moment, number, parse, text
from txl_jax.story import INTERRUPTIONS, KINDS

_INSTANCE = re.compile(r"i-[0-9a-f]{8,17}")


@dataclass(frozen=True)
class Paid:
    """A host that the run has had."""

    number: int
    launch: str
    price: float | None
    """US dollars an hour; None: not known."""
    hours: float
    """For which it has run, as far as it was seen."""
    given_up: bool = False
    """Its loss is written down, or a watcher has ended it."""
    risen: float = 0.0
    """US dollars that it cost more than that, as spot prices have risen since its start."""


@dataclass(frozen=True)
class Event:
    """What a watcher saw or did."""

    time: datetime
    kind: str
    """One of `story.KINDS`."""
    text: str
    launch: str
    hosts: tuple[int, ...] = ()
    """Numbers of those that it is about."""
    step: int | None = None
    """The last one that was known of."""
    lost_seconds: float | None = None
    """For which training stood still, of an event `restarted`."""
    cost: float | None = None
    """US dollars so far."""
    since: datetime | None = None
    """When training was last seen before an interruption."""


@dataclass(frozen=True)
class Book:
    """What is written down."""

    holder: str = ""
    """The watcher that acts; empty: none does."""
    beat: int = 0
    """Grows while that one lives."""
    attempt: str = ""
    """The watchers' latest hold on the launch (`hold.py`)."""
    hosts: dict[str, Paid] = dataclasses.field(default_factory=dict)
    """By instance id."""
    events: tuple[Event, ...] = ()
    """The oldest first."""

    @property
    def cost(self) -> float | None:
        """US dollars for all hosts so far; None: a host's price is not known."""
        prices = [paid.price for paid in self.hosts.values()]
        if None in prices:
            return None
        return sum(paid.hours * (paid.price or 0.0) + paid.risen for paid in self.hosts.values())

    def had(self, launch: str, host: int | None = None) -> int:
        """How many hosts a launch has had, of one number or in all."""
        return sum(
            paid.launch == launch and host in (None, paid.number) for paid in self.hosts.values()
        )

    def happened(self, launch: str, *kinds: str) -> int:
        """How many events of these kinds a launch has seen."""
        return sum(event.launch == launch and event.kind in kinds for event in self.events)

    def interrupted(self, launch: str) -> Event | None:
        """The event that has interrupted training, until it is seen to go on."""
        found = None
        for event in self.events:
            if event.launch == launch and event.kind in INTERRUPTIONS:
                found = found or event
            elif event.launch == launch and event.kind == "restarted":
                found = None
        return found

    def with_event(self, event: Event) -> "Book":
        return dataclasses.replace(
            self, events=(*self.events, dataclasses.replace(event, cost=self.cost))
        )

    def giving_up(self, *hosts: Host) -> "Book":
        """With these hosts given up; they are in the book."""
        given_up = {
            host.instance_id: dataclasses.replace(self.hosts[host.instance_id], given_up=True)
            for host in hosts
        }
        return dataclasses.replace(self, hosts=self.hosts | given_up)

    def with_hosts(
        self,
        run: Run | None,
        now: datetime,
        last_seen: datetime | None,
        spot: Mapping[str, float] | None = None,
    ) -> "Book":
        """With what EC2 tells now of the hosts of a launch, gone ones too.

        `spot`: US dollars an hour of a spot host now, by zone, as far as known.
        """
        if run is None:
            return self
        found = {
            host.instance_id: self._paid(host, run, now, last_seen, spot or {})
            for host in run.hosts
        }
        return dataclasses.replace(self, hosts={**self.hosts, **found})

    def _paid(
        self,
        host: Host,
        run: Run,
        now: datetime,
        last_seen: datetime | None,
        spot: Mapping[str, float],
    ) -> Paid:
        before = self.hosts.get(host.instance_id)
        # A host that is gone was last seen to run at the latest look, if EC2 does not say when.
        hours = max(host.hours(now, last_seen), before.hours if before else 0.0)
        if before is None:
            return Paid(host.index, run.launch, host.price, hours, risen=hours * host.rise(spot))
        return dataclasses.replace(
            before,
            number=host.index,
            price=host.price,
            hours=hours,
            risen=before.risen + (hours - before.hours) * host.rise(spot),
        )


def key(name: str) -> str:
    """Where the book of a run is in the bucket."""
    return f"launches/{name}.watch.json"


def read(account: Account, bucket: str, name: str) -> tuple[Book, str]:
    """The book of a run, an empty one if there is none to be used, and its version."""
    content, version = objects.read_version(account, bucket, key(name))
    return _parsed(mapping(parse(content))), version


def write(account: Account, bucket: str, name: str, book: Book, replaces: str) -> str:
    """Writes the book in place of the version `replaces`, empty: of none; the new version.

    Raises objects.Changed if another one is there.
    """
    content = {
        "holder": book.holder,
        "beat": book.beat,
        "attempt": book.attempt,
        "cost": book.cost,
        "hosts": {name: dataclasses.asdict(paid) for name, paid in book.hosts.items()},
        "events": [_as_json(event) for event in book.events],
    }
    return objects.write_json(account, bucket, key(name), content, replaces)


def _as_json(event: Event) -> dict[str, Any]:
    times = {"time": event.time.isoformat(), "since": event.since and event.since.isoformat()}
    return dataclasses.asdict(event) | times


def _parsed(told: dict[str, Any]) -> Book:
    hosts = {
        name: paid
        for name, found in mapping(told.get("hosts")).items()
        if _INSTANCE.fullmatch(name) and (paid := _paid(mapping(found)))
    }
    events = [event for found in listed(told.get("events")) if (event := _event(mapping(found)))]
    return Book(
        holder=text(told.get("holder")),
        beat=count(told.get("beat")) or 0,
        attempt=text(told.get("attempt")),
        hosts=hosts,
        events=tuple(events),
    )


def _paid(told: dict[str, Any]) -> Paid | None:
    which, hours, price = count(told.get("number")), number(told.get("hours")), told.get("price")
    if which is None or hours is None or hours < 0:
        return None
    price = number(price)
    if price is not None and price < 0:
        return None
    risen = number(told.get("risen")) or 0.0
    given_up = told.get("given_up") is True
    return Paid(which, text(told.get("launch")), price, hours, given_up, max(0.0, risen))


def _event(told: dict[str, Any]) -> Event | None:
    time, kind = moment(told.get("time")), text(told.get("kind"))
    if time is None or kind not in KINDS:
        return None
    hosts = (count(found) for found in listed(told.get("hosts")))
    return Event(
        time=time.astimezone(UTC),
        kind=kind,
        text=printable(text(told.get("text"))),
        launch=text(told.get("launch")),
        hosts=tuple(host for host in hosts if host is not None),
        step=count(told.get("step")),
        lost_seconds=number(told.get("lost_seconds")),
        cost=number(told.get("cost")),
        since=moment(told.get("since")),
    )
