"""What watchers write down: for one another, and for the report."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from launcher import objects, watch_book
from launcher.aws import Account
from launcher.watch_book import Book, Event, Paid
from tests.launcher.looks import (
    BUCKET,
    LAUNCH,
    NAME,
    NOW,
    book_of,
    event,
    host,
    look,
    lost,
    some_run,
)
from txl_jax import story

pytest_plugins = ["tests.launcher.fixtures"]

HOUR = timedelta(hours=1)
OTHER = "f" * 16


@pytest.fixture
def bucket(aws, account: Account) -> str:
    aws.client("s3").create_bucket(Bucket=BUCKET)
    return BUCKET


def full_book() -> Book:
    """One in which every field says something."""
    preempted = event(
        "preempted", 9, text="host 1 lost", hosts=(1,), step=7, since=NOW - timedelta(minutes=10)
    )
    restarted = event("restarted", 2, step=8, lost_seconds=61.5)
    seen = look(host(0), lost(1, ended=NOW - HOUR), host(1, generation=1))
    book = book_of(seen, preempted, restarted, given_up=(lost(1),))
    return dataclasses.replace(book, holder="me", beat=12, attempt="a1")


def test_it_is_read_as_it_was_written(account, bucket):
    assert watch_book.read(account, bucket, NAME) == (Book(), "")
    first = watch_book.write(account, bucket, NAME, Book(), "")
    assert watch_book.read(account, bucket, NAME) == (Book(), first)
    version = watch_book.write(account, bucket, NAME, full_book(), first)
    assert version != first
    assert watch_book.read(account, bucket, NAME) == (full_book(), version)
    for field in dataclasses.fields(Book):
        assert getattr(full_book(), field.name) != getattr(Book(), field.name), field.name


def test_of_two_watchers_at_the_same_moment_one_is_refused(account, bucket):
    first = watch_book.write(account, bucket, NAME, Book(), "")
    with pytest.raises(objects.Changed):
        watch_book.write(account, bucket, NAME, full_book(), "")
    watch_book.write(account, bucket, NAME, Book(holder="a"), first)
    with pytest.raises(objects.Changed):
        watch_book.write(account, bucket, NAME, full_book(), first)
    assert watch_book.read(account, bucket, NAME)[0] == Book(holder="a")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"5", b'"a"', b"\xff", b"[" * 99_999]
)
def test_what_is_no_book_is_an_empty_one_and_can_be_replaced(content, account, bucket):
    objects.write(account, bucket, watch_book.key(NAME), content)
    found, version = watch_book.read(account, bucket, NAME)
    assert found == Book()
    watch_book.write(account, bucket, NAME, full_book(), version)
    assert watch_book.read(account, bucket, NAME)[0] == full_book()


def written(account: Account, bucket: str) -> dict[str, Any]:
    """A full book, as JSON says it."""
    objects.write_json(account, bucket, watch_book.key(NAME), {})
    _, version = watch_book.read(account, bucket, NAME)
    watch_book.write(account, bucket, NAME, full_book(), version)
    return objects.read_json(account, bucket, watch_book.key(NAME))


def read(account: Account, bucket: str, content: Any) -> Book:
    objects.write_json(account, bucket, watch_book.key(NAME), content)
    return watch_book.read(account, bucket, NAME)[0]


JUNK = [None, True, -1, 1.5, 1 << 70, "\x1b[31m", "text", [], [5, None, "a"], {}, {"a": {"b": 1}}]


def test_of_a_damaged_field_the_rest_is_kept(account, bucket):
    content, good = written(account, bucket), full_book()
    empty = Book()
    for field in dataclasses.fields(Book):
        for junk in JUNK:
            found = read(account, bucket, content | {field.name: junk})
            others = dataclasses.replace(good, **{field.name: getattr(empty, field.name)})
            if field.name in ("holder", "attempt") and isinstance(junk, str):
                others = dataclasses.replace(good, **{field.name: junk})
            assert found == others, (field.name, junk)


BAD_HOST = [
    {"number": None},
    {"number": "1"},
    {"number": -1},
    {"number": True},
    {"number": 1.0},
    {"hours": None},
    {"hours": "2"},
    {"hours": -0.1},
    {"hours": True},
    {"price": -1.0},
]


def test_damaged_hosts_are_left_out(account, bucket):
    content, good = written(account, bucket), full_book()
    name = host(0).instance_id
    del good.hosts[name]
    for change in BAD_HOST:
        hosts = content["hosts"] | {name: content["hosts"][name] | change}
        assert read(account, bucket, content | {"hosts": hosts}) == good, change
    for junk in JUNK:
        hosts = content["hosts"] | {name: junk}
        assert read(account, bucket, content | {"hosts": hosts}) == good, junk
    no_names = ("", "i-", "i-1234567", "i-0000000g", "i-00000000\n", "../i-00000000")
    for other in (*no_names, "i-" + "0" * 18):
        hosts = content["hosts"] | {other: content["hosts"][name]}
        assert other not in read(account, bucket, content | {"hosts": hosts}).hosts, other


@pytest.mark.parametrize(
    ("field", "values", "becomes"),
    [
        ("price", [None, "a", True, [], 1e999], None),
        ("launch", [None, 5, [], {}], ""),
        ("given_up", [None, 1, "true", [True]], False),
    ],
)
def test_what_a_host_does_not_say_is_not_known(field, values, becomes, account, bucket):
    content, name = written(account, bucket), lost(1).instance_id
    before = full_book().hosts[name]
    assert before.given_up and before.price and before.launch
    for value in values:
        hosts = content["hosts"] | {name: content["hosts"][name] | {field: value}}
        found = read(account, bucket, content | {"hosts": hosts}).hosts[name]
        assert found == dataclasses.replace(before, **{field: becomes}), value


def test_damaged_events_are_left_out(account, bucket):
    content, good = written(account, bucket), full_book()
    first, second = content["events"]
    for change in (
        *({"time": value} for value in (None, 5, "yesterday", "", "9999999-01-01", [])),
        *({"kind": value} for value in (None, "", "exploded", 5, ["failed"])),
    ):
        found = read(account, bucket, content | {"events": [first | change, second]})
        assert found == dataclasses.replace(good, events=good.events[1:]), change
    for junk in JUNK:
        found = read(account, bucket, content | {"events": [junk, first, second]})
        assert found == good, junk


@pytest.mark.parametrize(
    ("field", "values", "becomes"),
    [
        ("text", [None, 5, [], {}], ""),
        ("text", ["a\x1b[2J\n\x9bb"], "a\\x1b[2J\\n\\x9bb"),
        ("launch", [None, 5, []], ""),
        ("hosts", [None, 5, "01", {}, [None, "1", -1, True, 1.0]], ()),
        ("hosts", [[1, "x", 3]], (1, 3)),
        ("step", [None, "7", -1, 1.5, True, 1 << 70], None),
        ("lost_seconds", [None, "a", True, []], None),
        ("cost", [None, "a", True, []], None),
        ("since", [None, 5, "yesterday", []], None),
        ("time", ["2026-01-02T11:00:00", "2026-01-02T12:00:00+01:00"], NOW - HOUR),
    ],
)
def test_what_an_event_does_not_say_is_not_known(field, values, becomes, account, bucket):
    content = written(account, bucket)
    before = full_book().events[0]
    for value in values:
        events = [content["events"][0] | {field: value}]
        (found,) = read(account, bucket, content | {"events": events}).events
        assert found == dataclasses.replace(before, **{field: becomes}), value


def test_it_costs_what_all_its_hosts_cost():
    book = Book().with_hosts(some_run(host(0), host(1, price=2.5)), NOW, NOW)
    assert book.cost == pytest.approx(2 * 1.0 + 2 * 2.5)
    assert Book().cost == 0.0


def test_a_host_whose_price_is_not_known_makes_the_cost_unknown():
    assert Book().with_hosts(some_run(host(0), host(1, price=None)), NOW, NOW).cost is None


def test_what_ec2_has_forgotten_stays_in_the_sum():
    book = Book().with_hosts(some_run(host(0), lost(1, ended=NOW - HOUR)), NOW, NOW)
    book = book.with_hosts(some_run(host(0)), NOW, NOW)
    assert book.cost == pytest.approx(2.0 + 1.0)
    assert book.with_hosts(None, NOW, NOW) == book
    assert book.with_hosts(some_run(host(0)), NOW + HOUR, NOW).cost == pytest.approx(3.0 + 1.0)


def test_hours_never_shrink():
    """EC2 may not say when a host ended, and the trainers may have been silent before."""
    book = Book().with_hosts(some_run(host(0)), NOW, NOW - HOUR)
    assert book.hosts[host(0).instance_id].hours == 2.0
    book = book.with_hosts(some_run(lost(0)), NOW + HOUR, NOW - HOUR)
    assert book.hosts[host(0).instance_id].hours == 2.0
    book = book.with_hosts(some_run(lost(0, ended=NOW + HOUR / 2)), NOW + HOUR, NOW - HOUR)
    assert book.hosts[host(0).instance_id].hours == 2.5


def test_hours_before_a_stop_count():
    again = host(0, launched=NOW - HOUR, hours_before=3.0)
    assert Book().with_hosts(some_run(again), NOW, NOW).cost == pytest.approx(4.0)


def test_spot_prices_that_rise_are_counted_from_then_on():
    run = some_run(host(0), host(1, spot=False))
    book = Book().with_hosts(run, NOW, NOW)
    assert book.cost == pytest.approx(4.0)
    book = book.with_hosts(run, NOW + HOUR, NOW, {"us-east-1a": 1.5, "us-east-1b": 9.0})
    assert book.cost == pytest.approx(6.0 + 0.5)
    # What has fallen again, or is below what it was at the start, takes nothing back.
    book = book.with_hosts(run, NOW + 2 * HOUR, NOW, {"us-east-1a": 0.5})
    assert book.cost == pytest.approx(8.0 + 0.5)
    assert Book().with_hosts(run, NOW, NOW, {"us-east-1a": 1.25}).cost == pytest.approx(4.5)


def test_what_has_risen_is_read_as_it_was_written(account, bucket):
    book = Book().with_hosts(some_run(host(0)), NOW, NOW, {"us-east-1a": 1.5})
    watch_book.write(account, bucket, NAME, book, "")
    assert watch_book.read(account, bucket, NAME)[0] == book


def test_who_is_given_up_stays_so():
    seen = look(host(0), host(1))
    book = book_of(seen).giving_up(host(1)).with_hosts(seen.run, NOW + HOUR, NOW)
    given_up = {name for name, paid in book.hosts.items() if paid.given_up}
    assert given_up == {host(1).instance_id}
    assert book.hosts[host(1).instance_id].hours == 3.0


def test_it_counts_the_hosts_that_a_launch_has_had():
    first = some_run(lost(0), host(0, generation=1), host(1))
    other = some_run(host(0, generation=2), launch=OTHER)
    book = Book().with_hosts(first, NOW, NOW).with_hosts(other, NOW, NOW)
    book = book.with_hosts(first, NOW + HOUR, NOW)
    assert (book.had(LAUNCH), book.had(LAUNCH, 0), book.had(LAUNCH, 1)) == (3, 2, 1)
    assert (book.had(OTHER), book.had(OTHER, 0), book.had(OTHER, 1)) == (1, 1, 0)
    assert book.had("0" * 16) == 0


def test_it_counts_the_events_of_a_launch():
    kinds = ["preempted", "failed", "restarted", "stalled", "failed"]
    book = Book(events=(*map(event, kinds), event("failed", launch=OTHER)))
    assert book.happened(LAUNCH, "failed") == 2
    assert book.happened(LAUNCH, "failed", "stalled") == 3
    assert book.happened(OTHER, "failed", "preempted") == 1
    assert book.happened(LAUNCH, "moved") == book.happened(LAUNCH) == 0


FIRST, SECOND = event("preempted", 9), event("failed", 8)


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ((), None),
        ((event("moved"), event("budget"), event("finished")), None),
        ((FIRST,), FIRST),
        ((FIRST, SECOND), FIRST),
        ((FIRST, event("moved"), event("restarted", launch=OTHER)), FIRST),
        ((FIRST, event("restarted")), None),
        ((FIRST, event("restarted"), SECOND), SECOND),
        ((event("stalled", launch=OTHER),), None),
        ((event("stalled", launch=OTHER), SECOND), SECOND),
        ((event("restarted"), event("stalled", 3)), event("stalled", 3)),
    ],
)
def test_an_interruption_lasts_until_training_goes_on(events: tuple[Event, ...], found):
    assert Book(events=events).interrupted(LAUNCH) == found


def test_an_event_tells_what_the_run_has_cost_by_then():
    book = book_of(look(host(0), host(1))).with_event(event("preempted", cost=99.0))
    assert book.events[-1].cost == pytest.approx(4.0)
    unknown = book_of(look(host(0, price=None))).with_event(event("preempted"))
    assert unknown.events[-1].cost is None


def test_the_report_reads_what_is_written(account, bucket):
    content = written(account, bucket)
    told = story._watched(content)
    assert told.damaged == 0
    assert told.cost == pytest.approx(full_book().cost)
    assert told.events == tuple(
        story.Event(
            time=each.time,
            kind=each.kind,
            text=each.text,
            hosts=each.hosts,
            step=each.step,
            lost_seconds=each.lost_seconds,
            cost=each.cost,
        )
        for each in full_book().events
    )
    assert told.events[0].time.tzinfo == UTC and isinstance(told.events[0].time, datetime)


def test_the_report_can_say_that_a_cost_is_not_known(account, bucket):
    book = Book(hosts={"i-12345678": Paid(0, LAUNCH, None, 1.0)})
    watch_book.write(account, bucket, NAME, book, "")
    content = objects.read_json(account, bucket, watch_book.key(NAME))
    assert story._watched(content).cost is None
    assert watch_book.read(account, bucket, NAME)[0] == book


def test_it_is_json_without_surprises(account, bucket):
    """Numbers that JSON does not have would make others' readers fail."""
    json.dumps(written(account, bucket), allow_nan=False)
