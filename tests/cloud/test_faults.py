"""Faults while hosts are set up and while they train: what runs afterwards, and what was said.

Faults before that are in tests/launcher/test_launch.py: capacity, quotas, throttling, hosts that do
not answer or have another key, Ctrl-C and SIGKILL in the steps up to the first login.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.cloud import LocalCloud, missing
from tests.cloud.typed import OPEN, TINY, Typed

pytest_plugins = ["tests.cloud.fixtures"]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.cloud,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
BUCKET = "txl-123456789012-us-east-1"
WORDS = ["--config=quickstart", "--name=a", "--machines=2", "--max-tokens=6400000", *TINY, OPEN]
"""A run that is long enough to be disturbed."""
SET_UP = ["packages", "driver", "EFA", "source", "Python", "data", "health check"]
"""Phases on hosts with GPUs, for a run that brings its text."""


@pytest.fixture
def gpu_words(tmp_path: Path) -> list[str]:
    """What makes the run go through every phase of `SET_UP`."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(300):
        (text / f"{number}.txt").write_text("once upon a time\n" * 30)
    words = ["--instance-type=p3dn.24xlarge", "--dataset=text", f"--text-dir={text}"]
    return [*words, "--batch=16", "--eval-batch=16"]


@pytest.fixture
def typed(cloud: LocalCloud) -> Iterator[Callable[..., Typed]]:
    """Types a launch of two hosts, with further words."""
    commands: list[Typed] = []

    def start(*words: str) -> Typed:
        commands.append(Typed(cloud.environ, *WORDS, "--yes", *words))
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            command.send(signal.SIGKILL)
        command.end()


def refusal(command: Typed) -> str:
    """The one line of a command that could not do what it was asked."""
    assert command.end() == 2, command.text
    assert "Traceback" not in command.text, command.text
    (line,) = [line for line in command.lines if line.startswith("error: ")]
    return line


def until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.1)


def until_scheduled(cloud: LocalCloud, host: str, minutes: int) -> None:
    """Until a host has its shutdown scheduled in so many minutes, and no sooner."""
    until(lambda: f"+{minutes}" in (cloud.recorded(host, "shutdown") or [[]])[-1])


def until_scheduled_by(cloud: LocalCloud, host: str, why: str) -> None:
    """Until a host has its shutdown scheduled for this reason."""
    until(lambda: why in " ".join((cloud.recorded(host, "shutdown") or [[]])[-1]))


def until_training(cloud: LocalCloud, step: int = 1) -> None:
    """Until the trainer's heartbeat in S3 shows so many steps."""

    def trains() -> bool:
        check_trainers(cloud)
        s3 = cloud.client("s3")
        found = s3.list_objects_v2(Bucket=BUCKET, Prefix="runs/a/heartbeats/0.json")
        if not found.get("Contents"):
            return False
        sign = s3.get_object(Bucket=BUCKET, Key="runs/a/heartbeats/0.json")["Body"].read()
        return json.loads(sign)["step"] >= step

    until(trains)


def check_trainers(cloud: LocalCloud) -> None:
    """Fails if a trainer has ended, with what it said."""
    for instance in cloud.instances():
        folder = cloud.home(instance.id) / "txl"
        if (folder / "status").exists():
            raise AssertionError((folder / "output.txt").read_text())


def checkpoints(cloud: LocalCloud) -> list[str]:
    found = cloud.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="runs/a/checkpoints/")
    return [e["Key"] for e in found.get("Contents", []) if e["Key"].endswith("/commit.json")]


def test_a_host_whose_set_up_fails_is_named_and_none_runs(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    cloud.break_program(1, "curl", "curl: (22) The requested URL returned error: 403")
    line = refusal(typed())
    assert line.startswith("error: failed on 1 of 2 hosts: a-1: curl: (22) The requested URL")
    assert not cloud.instances()
    assert not checkpoints(cloud)


def test_a_host_that_dies_in_its_set_up_is_named_and_none_runs(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    launch = typed()
    launch.wait_for("packages: ")
    cloud.crash(cloud.instances()[1].id)
    line = refusal(launch)
    assert "a-1: the connection was lost" in line
    assert "a-0" not in line
    assert not cloud.instances()


def test_a_spot_host_that_is_taken_back_in_its_set_up(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    launch = typed()
    launch.wait_for("SSH: ")
    cloud.interrupt(cloud.instances()[0].id, notice=False)
    assert "a-0" in refusal(launch)
    assert not cloud.instances()


@pytest.mark.slow
@pytest.mark.parametrize("step", SET_UP)
def test_ctrl_c_after_each_phase_of_the_set_up(
    cloud: LocalCloud, typed: Callable[..., Typed], gpu_words: list[str], step: str
) -> None:
    launch = typed(*gpu_words)
    launch.wait_for(f"{step}: ")
    assert len(cloud.instances()) == 2
    launch.send(signal.SIGINT)
    assert launch.end() == 130, launch.text
    assert "terminated: i-" in launch.text
    assert "Traceback" not in launch.text
    assert not cloud.instances()


@pytest.mark.slow
def test_ctrl_c_when_trainers_start_ends_them_or_says_that_they_train(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    launch = typed()
    launch.wait_for("health check: ")
    folders = [cloud.home(instance.id) / "txl" for instance in cloud.instances()]
    until(lambda: any((folder / "pid").exists() for folder in folders))
    launch.send(signal.SIGINT)
    status = launch.end()
    assert "Traceback" not in launch.text
    if status == 130 and "terminated: i-" in launch.text:
        assert not cloud.instances()
    else:
        assert "a trains" in launch.text
        assert len(cloud.instances()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("step", SET_UP)
def test_sigkill_after_each_phase_of_the_set_up_and_typed_again(
    cloud: LocalCloud, typed: Callable[..., Typed], gpu_words: list[str], step: str
) -> None:
    launch = typed(*gpu_words)
    launch.wait_for(f"{step}: ")
    launch.send(signal.SIGKILL)
    launch.end()
    hosts = [instance.id for instance in cloud.instances()]
    assert len(hosts) == 2
    again = typed(*gpu_words)
    assert again.end() == 0, again.text
    assert "a stands already: going on with it" in again.text
    assert [instance.id for instance in cloud.ec2.instances()] == hosts
    assert [instance.state for instance in cloud.instances()] == ["running"] * 2
    until_training(cloud)
    third = typed(*gpu_words)
    assert third.end() == 0, "a run that trains is adopted as it is"
    assert [instance.id for instance in cloud.ec2.instances()] == hosts


@pytest.mark.slow
def test_a_run_on_a_folder_of_text_goes_on_without_that_folder(
    cloud: LocalCloud, typed: Callable[..., Typed], gpu_words: list[str], tmp_path: Path
) -> None:
    """A lost laptop: everything that hosts need is in the bucket."""
    launch = typed(*gpu_words, "--nospot")
    assert launch.end() == 0, launch.text
    until_training(cloud)
    assert Typed(cloud.environ, "stop", "a").end() == 0
    assert checkpoints(cloud)
    moved = tmp_path / "moved"
    (tmp_path / "text").rename(moved)
    start = Typed(cloud.environ, "start", "a")
    assert start.end() == 0, start.text
    sync = Typed(cloud.environ, "sync", "a")
    assert sync.end() == 0, sync.text
    until_training(cloud)
    hosts = [instance.id for instance in cloud.instances()]
    assert Typed(cloud.environ, "kill", "a", "--yes").end() == 0
    # From wherever the text lies: its content says that it is the same run.
    words = [f"--text-dir={moved}" if "--text-dir" in word else word for word in gpu_words]
    again = typed(*words, "--nospot")
    assert again.end() == 0, again.text
    assert not {instance.id for instance in cloud.instances()} & set(hosts)
    (moved / "1.txt").write_text("another text\n")
    assert Typed(cloud.environ, "kill", "a", "--yes").end() == 0
    assert "belongs to a run of another config (data.text_dir: " in refusal(typed(*words))
    assert not cloud.instances()


@pytest.mark.slow
def test_hosts_end_themselves_when_the_laptop_is_lost_in_the_set_up(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    launch = typed()
    launch.wait_for("packages: ")
    launch.send(signal.SIGKILL)
    launch.end()
    hosts = [instance.id for instance in cloud.instances()]
    assert len(hosts) == 2
    for host in hosts:
        until_scheduled(cloud, host, 30)
    cloud.pass_minutes(29)
    time.sleep(1)
    assert len(cloud.instances()) == 2
    cloud.pass_minutes(1)
    until(lambda: not cloud.instances())


@pytest.mark.slow
def test_hosts_go_on_when_the_laptop_is_lost_after_the_set_up(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    """Whatever part of the launch's end it has missed."""
    launch = typed()
    launch.wait_for("trainer: ")
    launch.send(signal.SIGKILL)
    launch.end()
    until_training(cloud)
    assert len(cloud.instances()) == 2


@pytest.mark.slow
def test_a_host_stops_an_hour_after_the_last_step_and_after_an_error(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    launch = typed("--nospot")
    assert launch.end() == 0, launch.text
    until_training(cloud)
    first, second = (instance.id for instance in cloud.instances())
    # A trainer that was asked to end has not succeeded; its peer makes no step without it.
    name = str(cloud.ec2.instance(first).private_ip).replace(".", "-")
    run = Typed(
        cloud.environ, "run", "a", "--", f"[ $(hostname) != ip-{name} ] || kill $(cat txl/pid)"
    )
    assert run.end() == 0, run.text
    until((cloud.home(first) / "txl" / "status").exists)
    assert (cloud.home(first) / "txl" / "status").read_text().strip() != "0"
    for host in (first, second):
        until_scheduled(cloud, host, 60)
    cloud.pass_minutes(60)
    until(lambda: not cloud.instances())
    assert [instance.state for instance in cloud.ec2.instances()] == ["stopped"] * 2
    assert checkpoints(cloud)


@pytest.mark.slow
def test_spot_hosts_save_when_they_get_notice(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    launch = typed()
    assert launch.end() == 0, launch.text
    until_training(cloud, 20)
    taken, left = (instance.id for instance in cloud.instances())
    cloud.interrupt(taken, seconds=60)
    until(lambda: checkpoints(cloud))
    until(lambda: "spot notice" in (cloud.home(taken) / "txl/output.txt").read_text())
    until(lambda: len(cloud.instances()) == 1)
    listed = Typed(cloud.environ, "ls", "--json")
    listed.end()
    (told,) = json.loads(listed.text)
    assert told["state"] == "1 terminated, 1 running" or told["state"] == "1 running, 1 terminated"
    again = typed()
    line = refusal(again)
    assert "1 of 2 hosts of a are gone" in line
    assert "`python -m launcher kill a`" in line
    assert [instance.id for instance in cloud.instances()] == [left]
    assert Typed(cloud.environ, "kill", "a", "--yes").end() == 0
    assert not cloud.instances()
    once_more = typed()
    assert once_more.end() == 0, once_more.text

    def goes_on() -> bool:
        check_trainers(cloud)
        s3 = cloud.client("s3")
        content = s3.get_object(Bucket=BUCKET, Key="runs/a/run.json")["Body"].read()
        return len(json.loads(content)["starts"]) == 2

    until(goes_on)


@pytest.mark.slow
def test_max_hours_end_a_run_that_makes_steps(
    cloud: LocalCloud, typed: Callable[..., Typed]
) -> None:
    cloud.grace = 60.0  # as long as systemd's, or nearly
    launch = typed("--max-hours=0.5")
    assert launch.end() == 0, launch.text
    until_training(cloud)
    for instance in cloud.instances():
        until_scheduled_by(cloud, instance.id, "hours are over")
    cloud.pass_minutes(30)
    until(lambda: not cloud.instances())
    assert checkpoints(cloud), "the trainers saved while their hosts turned off"


@pytest.mark.slow
def test_keep_holds_hosts_that_train(cloud: LocalCloud, typed: Callable[..., Typed]) -> None:
    launch = typed("--keep")
    assert launch.end() == 0, launch.text
    for instance in cloud.instances():
        until_scheduled_by(cloud, instance.id, "hours are over")
    cloud.pass_minutes(10_000)
    assert Typed(cloud.environ, "run", "a", "--", "true").end() == 0
    assert len(cloud.instances()) == 2
