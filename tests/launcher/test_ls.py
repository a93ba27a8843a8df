"""How `ls` shows runs that stand still, and hosts that are slower than the others."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from moto.s3.models import s3_backends

from launcher.commands.ls import _Row
from launcher.status import Status
from tests.cloud.cloud import missing
from tests.launcher.cloud import ACCOUNT
from tests.launcher.desk import BUCKET, Desk, heartbeat
from tests.launcher.test_slow import NOW, a_run

pytest_plugins = ["tests.cloud.fixtures"]


@pytest.mark.parametrize(
    ("silence", "state"),
    [
        (timedelta(minutes=2), "training"),
        (timedelta(minutes=2, seconds=1), "silent for 2 min"),
        (timedelta(minutes=9, seconds=59), "silent for 9 min"),
        (timedelta(minutes=10), "stalled for 10 min"),
        (timedelta(hours=1, minutes=12), "stalled for 1 h 12 min"),
    ],
)
def test_a_run_without_signs_is_silent_and_then_stalled(silence, state):
    run, now = a_run("10.0.0.4", "10.0.0.5"), NOW + timedelta(hours=2)
    row = _Row(run, Status(step=7, seen=now - silence), True, now)
    assert row.state == state
    assert replace(row, status=replace(row.status, finished=True)).state == "finished"
    stopped = tuple(replace(host, state="stopped") for host in run.hosts)
    assert replace(row, run=replace(run, hosts=stopped)).state == "stopped"


def tell(desk: Desk, signs: dict[str, float], age: timedelta) -> None:
    """Signs of life of hosts by their names, with their own times, written some time ago."""
    for process, (host, own) in enumerate(signs.items()):
        name = f"runs/a/heartbeats/{process}.json"
        desk.put(name, heartbeat(host=host, own_ms=own))
        s3_backends[ACCOUNT]["aws"].buckets[BUCKET].keys[name].last_modified -= age


@pytest.mark.processes
@pytest.mark.cloud
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_slow_hosts_are_named_while_the_run_trains(desk):
    hosts = desk.rent("a", 3).hosts
    names = ["ip-" + host.private_ip.replace(".", "-") for host in hosts]
    signs = dict(zip(names, (10.0, 10.0, 14.0), strict=True))
    tell(desk, signs, timedelta(hours=1))  # by an earlier launch of the name
    (told,) = json.loads(desk("ls", "--json"))
    assert (told["state"], told["slow"]) == ("setting up", [])
    assert "slower" not in desk("ls")

    tell(desk, signs, timedelta(0))
    (told,) = json.loads(desk("ls", "--json"))
    assert (told["state"], told["slow"]) == ("training", [{"host": 2, "ratio": 1.4}])
    assert "a: slower than the others: host 2 (1.4 x)" in [
        line.rstrip() for line in desk("ls").splitlines()
    ]

    desk.put("runs/a/results.json", {})
    (told,) = json.loads(desk("ls", "--json"))
    assert (told["state"], told["slow"]) == ("finished", [])
    assert "slower" not in desk("ls")
