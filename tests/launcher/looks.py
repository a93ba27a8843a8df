"""Looks at a run and books of it, made in memory: two spot hosts that train, with changes."""

import dataclasses
import functools
from datetime import UTC, datetime, timedelta
from typing import Any

from launcher import record
from launcher.look import Look
from launcher.record import Record
from launcher.request import LaunchCommand, parse
from launcher.runs import Host, Run
from launcher.status import Status
from launcher.watch_book import Book, Event

NAME = "trial"
BUCKET = "txl-123456789012-us-east-1"
LAUNCH = "0123456789abcdef"
OWNER = "arn:aws:sts::123456789012:user/moto"
NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
SPOT_ENDED, BY_HAND, BY_ITSELF = (
    "Server.SpotInstanceTermination",
    "Client.UserInitiatedShutdown",
    "Client.InstanceInitiatedShutdown",
)
"""Why hosts end, as EC2 says it."""


@functools.cache
def command(*words: str) -> LaunchCommand:
    """A launch of two small hosts, with further words."""
    typed = ["--config=quickstart", "--machines=2", "--instance-type=c7i.large", f"--name={NAME}"]
    return parse([*typed, *words]).command


def host(index: int = 0, state: str = "running", generation: int = 0, **changed: Any) -> Host:
    """One that was started two hours ago for a dollar an hour; `generation` tells two apart."""
    told: dict[str, Any] = {
        "index": index,
        "instance_id": f"i-{generation:04x}{index:04x}",
        "private_ip": f"10.0.0.{index}",
        "public_ip": f"203.0.113.{index}",
        "state": state,
        "zone": "us-east-1a",
        "kind": "c7i.large",
        "spot": True,
        "price": 1.0,
        "launched": NOW - timedelta(hours=2),
        "ended": None,
        "host_key": "",
        "user": "ubuntu",
        "key_name": "txl-moto",
        "reason": "",
        "reason_code": "",
        "hours_before": 0.0,
    }
    return Host(**told | changed)


def lost(index: int = 0, code: str = SPOT_ENDED, **changed: Any) -> Host:
    """A host that is terminated."""
    return host(index, "terminated", reason_code=code, **changed)


def some_run(*hosts: Host, launch: str = LAUNCH) -> Run:
    return Run(
        name=NAME,
        owner=OWNER,
        config="quickstart",
        launch=launch,
        logdir=f"s3://{BUCKET}/runs/{NAME}",
        started=NOW - timedelta(hours=2),
        hosts=tuple(sorted(hosts, key=lambda host: (host.index, host.launched))),
    )


def some_record(*words: str, **changed: Any) -> Record:
    """Of the launch that `command` with these words makes."""
    known = Record(
        launch=LAUNCH,
        owner=OWNER,
        started=NOW - timedelta(hours=2),
        config=command(*words).experiment,
        words=("--config=quickstart", "--machines=2", "--instance-type=c7i.large"),
        options=record.options(command(*words)),
        zones=("us-east-1a", "us-east-1b"),
        source="5" * 64,
        corpus="",
        revision="",
        attempt="of the launch",
    )
    return dataclasses.replace(known, **changed)


def look(
    *hosts: Host,
    silent: timedelta | None = timedelta(seconds=10),
    impaired: tuple[Host, ...] = (),
    finished: bool = False,
    known: Record | None = None,
) -> Look:
    """A look at these hosts.

    Args:
      silent: since the last sign of life; None: there was none yet.
    """
    seen = None if silent is None else NOW - silent
    return Look(
        now=NOW,
        record=known or some_record(),
        version='"1"',
        run=some_run(*hosts) if hosts else None,
        status=Status(step=7 if seen else None, seen=seen, finished=finished),
        impaired=frozenset(host.instance_id for host in impaired),
    )


def event(kind: str, minutes_ago: float = 1.0, **changed: Any) -> Event:
    told = {"text": "as the test wants it", "launch": LAUNCH, **changed}
    return Event(time=NOW - timedelta(minutes=minutes_ago), kind=kind, **told)


def book_of(seen: Look, *events: Event, given_up: tuple[Host, ...] = ()) -> Book:
    """What a watcher has written that has made this look, after these events."""
    book = Book().with_hosts(seen.run, seen.now, seen.status.seen).giving_up(*given_up)
    for each in events:
        book = book.with_event(each)
    return book
