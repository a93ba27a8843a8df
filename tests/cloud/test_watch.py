"""`launcher watch` beside real training: interruptions, and the run as if there had been none."""

import contextlib
import itertools
import json
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.cloud.cloud import LocalCloud, missing
from tests.cloud.typed import OPEN, TINY, Typed

pytest_plugins = ["tests.cloud.fixtures"]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.cloud,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
BUCKET = "txl-123456789012-us-east-1"
TOKENS_PER_STEP = 64
OFTEN = "--checkpoint-minutes=0.1"
INTERRUPTIONS = 10
STEPS_BETWEEN = 60
"""Which training makes from one interruption to the next, at least."""
LAST_STEPS = 1500
"""After the last one: time for several signs of life."""
SIGN_SECONDS = 30.0
"""Two signs of life a minute."""


def read(cloud: LocalCloud, key: str) -> Any:
    """What an object says in JSON; None if it is not there."""
    with contextlib.suppress(ClientError):
        return json.loads(cloud.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read())
    return None


def step(cloud: LocalCloud, name: str = "a") -> int:
    """The step of the latest sign of life; -1: there is none."""
    sign = read(cloud, f"runs/{name}/heartbeats/0.json")
    return sign["step"] if sign else -1


def events(cloud: LocalCloud, *kinds: str) -> list[dict[str, Any]]:
    """What watchers have written down, of these kinds or of all."""
    book = read(cloud, "launches/a.watch.json") or {"events": []}
    return [event for event in book["events"] if not kinds or event["kind"] in kinds]


def losses(cloud: LocalCloud, name: str) -> dict[int, float]:
    """Loss by step, of every line that a run has logged."""
    content = cloud.client("s3").get_object(Bucket=BUCKET, Key=f"runs/{name}/metrics.jsonl")
    lines = map(json.loads, content["Body"].read().splitlines())
    return {line["step"]: line["learning/loss"] for line in lines if "learning/loss" in line}


class Watchers:
    """`launcher watch a`, typed once or several times."""

    def __init__(self, cloud: LocalCloud):
        self._cloud = cloud
        self.typed: list[Typed] = []

    def start(self, *words: str) -> Typed:
        self.typed.append(Typed(self._cloud.environ, "watch", "a", *words))
        return self.typed[-1]

    @property
    def text(self) -> str:
        return "\n".join(watcher.text for watcher in self.typed)

    def until(self, condition: Callable[[], Any]) -> None:
        """Waits; fails if no watcher is left, with all that they said."""
        while not condition():
            alive = any(watcher.process.poll() is None for watcher in self.typed)
            assert alive, self.text
            time.sleep(0.2)


@pytest.fixture
def watchers(cloud: LocalCloud) -> Iterator[Watchers]:
    opened = Watchers(cloud)
    yield opened
    for watcher in opened.typed:
        if watcher.process.poll() is None:
            watcher.send(signal.SIGKILL)
        watcher.end()


def launch(cloud: LocalCloud, name: str, machines: int, steps: int, *words: str) -> None:
    tokens = f"--max-tokens={steps * TOKENS_PER_STEP}"
    typed = Typed(
        cloud.environ,
        *("--config=quickstart", f"--name={name}", f"--machines={machines}", tokens),
        *(*TINY, OFTEN, OPEN, "--yes", *words),
    )
    assert typed.end() == 0, typed.text


def instance(cloud: LocalCloud, number: int) -> str:
    """Id of the running host of that number."""
    (found,) = [
        host.id
        for host in cloud.instances()
        for tag in host.get_tags()
        if (tag["key"], tag["value"]) == ("txl:host", str(number))
    ]
    return found


class Observed:
    """What is seen of a cloud from its thread: hosts that cost, and signs of life in S3."""

    def __init__(self, cloud: LocalCloud, steps: int):
        self._cloud, self._steps = cloud, steps
        self.most = 0
        self.signs: dict[str, set[float]] = defaultdict(set)
        """Until training has ended; what is compiled for the final evaluation shows none."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        s3 = self._cloud.client("s3")
        while not self._ended.wait(0.3):
            self.most = max(self.most, len(self._cloud.instances()))
            if step(self._cloud) >= self._steps:
                continue
            found = s3.list_objects_v2(Bucket=BUCKET, Prefix="runs/a/heartbeats/")
            for entry in found.get("Contents", []):
                self.signs[entry["Key"]].add(entry["LastModified"].timestamp())

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def until_off(cloud: LocalCloud) -> None:
    """Until the hosts of a run that has finished have turned themselves off."""
    for host in [instance.id for instance in cloud.instances()]:
        while "+10" not in (cloud.recorded(host, "shutdown") or [[]])[-1]:
            time.sleep(0.1)
    cloud.pass_minutes(10)
    while cloud.instances():
        time.sleep(0.05)


@pytest.mark.slow
def test_ten_interruptions_leave_the_losses_as_they_are(
    cloud: LocalCloud, watchers: Watchers, tmp_path: Path
) -> None:
    """Four hosts; with notice and without, a zone without room, and watchers that are killed."""
    steps = INTERRUPTIONS * STEPS_BETWEEN + LAST_STEPS
    launch(cloud, "b", 4, steps)
    while read(cloud, "runs/b/results.json") is None:
        time.sleep(0.5)
    until_off(cloud)
    undisturbed = losses(cloud, "b")
    assert max(undisturbed) == steps

    launch(cloud, "a", 4, steps)
    zone = str(cloud.instances()[0].placement.zone)
    watcher = watchers.start()
    observed = Observed(cloud, steps)
    for number in range(INTERRUPTIONS):
        wanted = (number + 1) * STEPS_BETWEEN
        watchers.until(lambda wanted=wanted: step(cloud) >= wanted)
        watchers.until(lambda number=number: len(events(cloud, "restarted")) == number)
        if number == 5:
            cloud.full(zone)
        # Of every number, host 0 among them, which is the coordinator.
        cloud.interrupt(instance(cloud, number % 4), notice=number % 3 == 1, seconds=15)
        if number == 2:  # before it has seen anything
            watcher.send(signal.SIGKILL)
            watcher = watchers.start()
        if number == 7:  # in the midst of a recovery
            watchers.until(lambda: watchers.typed[-1].text.count("preempted:") == 6)
            watchers.until(lambda: len(cloud.instances()) == 4)
            watcher.send(signal.SIGKILL)
            watcher = watchers.start()
    assert watcher.end() == 0, watchers.text
    observed.close()
    until_off(cloud)

    told = losses(cloud, "a")
    assert told == undisturbed
    assert observed.most == 4
    assert not cloud.instances("pending", "running", "stopping", "stopped")
    assert len(events(cloud, "preempted")) == INTERRUPTIONS
    assert not events(cloud, "failed", "stalled", "budget")
    assert len(events(cloud, "moved")) == 1
    assert {str(i.placement.zone) for i in cloud.ec2.instances()} == {zone, f"{zone[:-1]}b"}
    restarted = events(cloud, "restarted")
    assert len(restarted) == INTERRUPTIONS
    assert all(event["lost_seconds"] > 0 for event in restarted)
    check_signs(observed, events(cloud))
    report = Typed(cloud.environ, "report", "a", "--out", str(tmp_path / "report"))
    assert report.end() == 0, report.text
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("Server.SpotInstanceTermination") >= INTERRUPTIONS
    seconds = [round(event["lost_seconds"]) for event in restarted]
    print(f"\n{watchers.text}\nseconds lost: {seconds}\nreport: {tmp_path / 'report'}")


def check_signs(observed: Observed, told: list[dict[str, Any]]) -> None:
    """While training was not interrupted, every host has shown two signs a minute."""
    assert len(observed.signs) == 4
    since = [_seconds(event["since"]) for event in told if event["since"]]
    back = [_seconds(event["time"]) for event in told if event["kind"] == "restarted"]
    pauses = list(zip(since, back, strict=True))
    for signs in observed.signs.values():
        times = sorted(signs)
        gaps = [
            (before, after)
            for before, after in itertools.pairwise(times)
            if not any(begin - 1 <= after and before <= end + 1 for begin, end in pauses)
        ]
        assert gaps
        assert not [gap for gap in gaps if gap[1] - gap[0] > SIGN_SECONDS], (gaps, pauses)


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


@pytest.mark.slow
def test_trainers_that_fail_start_again_until_the_budget_is_used_up(
    cloud: LocalCloud, watchers: Watchers
) -> None:
    launch(cloud, "a", 2, 1_000_000)
    watcher = watchers.start("--failures=1")
    watchers.until(lambda: step(cloud) > 0)
    for _ in range(2):
        hosts = [found.id for found in cloud.instances()]
        # As a bug would: the supervisor starts nothing again after another status than 75.
        run = Typed(cloud.environ, "run", "a", "--", "pkill -KILL -f txl_jax[.]supervise; true")
        assert run.end() == 0, run.text
        if not events(cloud, "restarted"):
            watchers.until(lambda: events(cloud, "restarted"))
            assert [found.id for found in cloud.instances()] == hosts, watchers.text
    assert watcher.end() == 1, watcher.text
    assert not cloud.instances()
    assert [event["kind"] for event in events(cloud)] == [
        *("failed", "restarted", "failed", "budget"),
    ]
    assert "--failures" in events(cloud, "budget")[0]["text"]


@pytest.mark.slow
def test_what_people_do_is_respected(cloud: LocalCloud, watchers: Watchers) -> None:
    launch(cloud, "a", 2, 1_000_000, "--nospot")
    watcher = watchers.start()
    watchers.until(lambda: step(cloud) > 0)
    assert Typed(cloud.environ, "stop", "a").end() == 0
    watcher.wait_for_part("stopped by a person")
    time.sleep(15)  # a look later
    assert [found.state for found in cloud.ec2.instances()] == ["stopped"] * 2
    before = step(cloud)
    start = Typed(cloud.environ, "start", "a")
    assert start.end() == 0, start.text
    watchers.until(lambda: step(cloud) > before)
    sync = Typed(cloud.environ, "sync", "a")
    assert sync.end() == 0, sync.text
    assert not events(cloud)
    assert Typed(cloud.environ, "kill", "a", "--yes").end() == 0
    assert watcher.end() == 1, watcher.text
    assert not cloud.instances()
    assert not events(cloud)


@pytest.mark.slow
def test_a_budget_is_never_exceeded(cloud: LocalCloud, watchers: Watchers) -> None:
    launch(cloud, "a", 2, 1_000_000)
    price = 2 * 0.06  # an hour; five minutes of it are kept back for the end
    most = price * (5 + 1.5) / 60
    watcher = watchers.start(f"--max-cost={most:.5f}")
    assert watcher.end() == 1, watcher.text
    assert not cloud.instances()
    (budget,) = events(cloud, "budget")
    assert "--max-cost" in budget["text"]
    assert 0 < read(cloud, "launches/a.watch.json")["cost"] < most
    keys = cloud.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="runs/a/checkpoints/")
    saved = [entry["Key"] for entry in keys["Contents"] if entry["Key"].endswith("commit.json")]
    assert saved, "the trainers saved before their hosts ended"
    again = watchers.start()
    assert again.end() == 1, again.text
    assert not cloud.instances()


@pytest.mark.slow
def test_zones_that_are_too_dear_are_not_moved_to(cloud: LocalCloud, watchers: Watchers) -> None:
    launch(cloud, "a", 2, 1_000_000)
    zone = str(cloud.instances()[0].placement.zone)
    watcher = watchers.start("--max-hourly-cost=0.121")  # twice 0.06 in this zone
    watchers.until(lambda: step(cloud) > 0)
    cloud.full(zone)
    cloud.interrupt(instance(cloud, 1), notice=False)
    watcher.wait_for_part("asking again every 60 s")
    assert not cloud.instances()
    before = step(cloud)
    cloud.full()
    watchers.until(lambda: events(cloud, "restarted"))
    assert {str(found.placement.zone) for found in cloud.ec2.instances()} == {zone}
    assert step(cloud) >= before
    assert Typed(cloud.environ, "kill", "a", "--yes").end() == 0
    assert watcher.end() == 1


@pytest.mark.slow
def test_detached_it_goes_on_and_ctrl_c_leaves_the_run(
    cloud: LocalCloud, watchers: Watchers
) -> None:
    launch(cloud, "a", 2, 1_000_000)
    detached = Typed(cloud.environ, "watch", "a", "--detach")
    tmux = ["tmux", "-L", "txl-watch-a"]
    try:
        assert detached.end() == 0, detached.text
        assert "`tmux -L txl-watch-a attach`" in detached.text
        while not (read(cloud, "launches/a.watch.json") or {}).get("holder"):
            time.sleep(0.2)
        twice = Typed(cloud.environ, "watch", "a", "--detach")
        assert twice.end() == 2
        assert "in tmux already" in twice.text
        second = watchers.start()
        second.wait_for_part("another watcher looks after a")
        subprocess.run([*tmux, "send-keys", "C-c"], check=True, env=cloud.environ)
        second.wait_for_part("looking after a")
        second.send(signal.SIGINT)
        assert second.end() == 130, second.text
        assert "a goes on as it is" in second.text
        assert len(cloud.instances()) == 2
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, env=cloud.environ)
    assert Typed(cloud.environ, "kill", "a", "--yes").end() == 0
