"""Hosts that are slower than the others, by signs that anybody could have written."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from launcher import objects, slow
from launcher.aws import Account
from launcher.runs import Host, Run
from launcher.slow import SlowHost
from tests.launcher.cloud import ACCOUNT

pytest_plugins = ["tests.launcher.fixtures"]

BUCKET = f"txl-{ACCOUNT}-us-east-1"
NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def bucket(account: Account) -> None:
    account.client("s3").create_bucket(Bucket=BUCKET)


def a_run(*addresses: str) -> Run:
    hosts = [
        Host(
            index=index,
            instance_id=f"i-{index:08x}",
            private_ip=address,
            public_ip="",
            state="running",
            zone="us-east-1a",
            kind="p3dn.24xlarge",
            spot=True,
            price=9.5,
            launched=NOW,
            ended=None,
            host_key="",
            user="ubuntu",
            key_name="",
            reason="",
            reason_code="",
            hours_before=0.0,
        )
        for index, address in enumerate(addresses)
    ]
    return Run("a", "me", "test_4", "1", f"s3://{BUCKET}/runs/a", NOW, tuple(hosts))


def tell(account: Account, process: int, host: Any, own_ms: Any) -> None:
    sign = {"step": 1, "host": host, "own_ms": own_ms}
    objects.write_json(account, BUCKET, f"runs/a/heartbeats/{process}.json", sign)


def test_of_two_hosts_the_slower_one_is_named(account):
    run = a_run("10.0.0.4", "10.0.0.5")
    tell(account, 0, "ip-10-0-0-4", 14.0)
    tell(account, 1, "ip-10-0-0-5", 10.0)
    assert slow.find(account, BUCKET, run) == (SlowHost(0, 1.4),)


def test_hosts_over_the_median_are_named_the_slowest_first(account):
    run = a_run("10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.7", "10.0.0.8")
    for process, own in enumerate((10.0, 13.0, 10.0, 15.0, 12.0)):
        tell(account, process, f"ip-10-0-0-{4 + process}", own)
    # Of 10, 10, 12, 13 and 15 the median is 12, and 13 is 8 % above it.
    assert slow.find(account, BUCKET, run) == (SlowHost(3, 1.25),)
    tell(account, 4, "ip-10-0-0-8", 10.0)
    assert slow.find(account, BUCKET, run) == (SlowHost(3, 1.5), SlowHost(1, 1.3))


def test_just_20_percent_are_not_named(account):
    run = a_run("10.0.0.4", "10.0.0.5", "10.0.0.6")
    for process, own in enumerate((10.0, 12.0, 10.0)):
        tell(account, process, f"ip-10-0-0-{4 + process}", own)
    assert slow.find(account, BUCKET, run) == ()


def test_of_the_processes_of_a_host_the_slowest_counts(account):
    run = a_run("10.0.0.4", "10.0.0.5", "10.0.0.6")
    for process, own in enumerate((10.0, 10.0, 10.0, 20.0, 10.0, 10.0)):
        tell(account, process, f"ip-10-0-0-{4 + process // 2}", own)
    assert slow.find(account, BUCKET, run) == (SlowHost(1, 2.0),)


def test_what_was_told_long_before_the_others_does_not_count(account, monkeypatch):
    run = a_run("10.0.0.4", "10.0.0.5", "10.0.0.6")
    for process, own in enumerate((10.0, 10.0, 30.0)):
        tell(account, process, f"ip-10-0-0-{4 + process}", own)
    told = objects.written(account, BUCKET, "runs/a/heartbeats/")
    told["runs/a/heartbeats/2.json"] -= timedelta(minutes=3)
    monkeypatch.setattr(objects, "written", lambda *_: told)
    assert slow.find(account, BUCKET, run) == ()


def test_a_host_with_another_address_is_called_as_it_calls_itself(account):
    run = a_run("10.0.0.4", "10.0.0.5")
    for process, (host, own) in enumerate([("x", 10.0), ("y", 10.0), ("gpu\x1b1", 30.0)]):
        tell(account, process, host, own)
    assert slow.find(account, BUCKET, run) == (SlowHost("gpu\\x1b1", 3.0),)


@pytest.mark.parametrize("own_ms", [None, "9", [9], True, -1, 0, 10**400])
def test_what_is_no_time_is_left_out(account, own_ms):
    run = a_run("10.0.0.4", "10.0.0.5")
    assert slow.find(account, BUCKET, run) == ()
    tell(account, 0, 7, own_ms)
    assert slow.find(account, BUCKET, run) == ()
