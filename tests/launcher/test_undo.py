"""What becomes of a launch's hosts when it does not come to its end."""

import dataclasses
import errno
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from launcher import ec2, hold, names, record, runs
from launcher.aws import Account
from launcher.hold import Hold, Superseded
from launcher.record import Record
from launcher.request import LaunchCommand, parse
from launcher.undo import Undo
from tests.launcher.cloud import ACCOUNT, Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

BUCKET = f"txl-{ACCOUNT}-us-east-1"
LAUNCH = "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ec2, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ec2, "_LATE_SECONDS", 0.05)
    yield


def command(*words: str) -> LaunchCommand:
    return parse(["--config=quickstart", "--name=a", *words]).command


def start(aws: Cloud, account: Account) -> runs.Run:
    """Two hosts, as the launch starts them."""
    tags = {
        names.TAG_MADE_BY: names.MADE_BY,
        names.TAG_RUN: "a",
        names.TAG_LAUNCH: LAUNCH,
        names.TAG_OWNER: account.caller,
    }
    aws.client("ec2").run_instances(
        ImageId=aws.image(),
        MinCount=2,
        MaxCount=2,
        ClientToken=LAUNCH,
        TagSpecifications=[
            {
                "ResourceType": "instance",
                "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
            }
        ],
    )
    (run,) = runs.find(account, "a")
    return run


def note(account: Account, attempt: str) -> Hold:
    """Writes the record as a command does that goes on with the launch."""
    _, version = record.read(account, BUCKET, "a")
    asked = command()
    written = Record(
        launch=LAUNCH,
        owner=account.caller,
        started=datetime.now(UTC),
        config=asked.experiment,
        words=("--config=quickstart",),
        options=record.options(asked),
        zones=("us-east-1a",),
        source="0" * 64,
        corpus="",
        revision="",
        attempt=attempt,
    )
    record.write(account, BUCKET, "a", written, version)
    return Hold(account, BUCKET, "a", attempt)


@pytest.fixture
def held(aws: Cloud, account: Account) -> Hold:
    account.client("s3").create_bucket(Bucket=BUCKET)
    return note(account, hold.new_attempt())


def states(aws: Cloud) -> set[str]:
    return {instance.state for instance in aws.instances()}


def leave(account: Account, held: Hold | None, run: runs.Run, how: Any, say: Any = None) -> str:
    """What is said when a launch of these hosts ends so."""
    said: list[str] = []
    undo = Undo(account, command(), LAUNCH, say or said.append)
    with pytest.raises(type(how)), undo:
        undo.started(run.hosts)
        if held:
            undo.holds(held)
        raise how
    return "\n".join(said)


def test_what_a_launch_has_started_is_terminated_and_named(aws, account, held):
    run = start(aws, account)
    said = leave(account, held, run, KeyboardInterrupt())
    assert states(aws) == {"terminated"}
    assert said.splitlines()[0] == "terminating the hosts of a …"
    assert all(host.instance_id in said for host in run.hosts)


@pytest.mark.parametrize("broken", [OSError(errno.EIO, "no terminal"), SystemExit(1)])
def test_hosts_are_terminated_when_nobody_can_be_told(broken, aws, account, held):
    """A terminal that was closed, a full disk, and a pipe without a reader, which rich ends for."""

    def say(_: str) -> None:
        raise broken

    leave(account, held, start(aws, account), KeyboardInterrupt(), say)
    assert states(aws) == {"terminated"}


def test_hosts_that_another_command_goes_on_with_are_left_to_it(aws, account, held):
    run = start(aws, account)
    note(account, hold.new_attempt())
    for how in (KeyboardInterrupt(), UserError("no answer"), RuntimeError()):
        assert "another command goes on with the hosts of a" in leave(account, held, run, how)
    with pytest.raises(Superseded, match="another command goes on with the launch of a"):
        held.check()
    leave(account, held, run, Superseded("another"))
    assert states(aws) == {"running"}


def test_a_hold_lasts_until_another_attempt_is_on_record(aws, account, held):
    held.check()
    known, version = record.read(account, BUCKET, "a")
    assert known and known.attempt == held.attempt
    # What a launcher of before wrote had none.
    record.write(account, BUCKET, "a", dataclasses.replace(known, attempt=""), version)
    assert held.lost()
    account.client("s3").delete_object(Bucket=BUCKET, Key=record.key("a"))
    assert not held.lost()
    assert not Hold(account, "no-such-bucket", "a", "x").lost()


def test_hosts_that_were_there_before_stand_until_this_command_holds_them(aws, account):
    run = start(aws, account)
    said = leave(account, None, run, UserError("the bucket is gone"))
    assert states(aws) == {"running"}
    assert all(f"{host.instance_id} running" in said for host in run.hosts)
    assert "terminate them: `python -m launcher kill a`" in said


def test_hosts_that_somebody_stops_are_kept(aws, account, held):
    run = start(aws, account)
    ids = [host.instance_id for host in run.hosts]
    aws.client("ec2").stop_instances(InstanceIds=ids)
    said = leave(account, held, run, UserError("the connection was lost"))
    assert states(aws) == {"stopped"}
    assert f"stopped by somebody, and kept: {', '.join(ids)}; `python -m launcher start a`" in said
    leave(account, held, run, ec2.Stopped("stopped"))
    assert states(aws) == {"stopped"}


def test_hosts_that_train_stay_and_how_to_end_them_is_said(aws, account, held):
    run, said = start(aws, account), []
    with pytest.raises(KeyboardInterrupt), Undo(account, command(), LAUNCH, said.append) as undo:
        undo.started(run.hosts)
        undo.holds(held)
        undo.release()
        raise KeyboardInterrupt
    assert states(aws) == {"running"}
    assert said == ["a trains all the same; `python -m launcher kill a` ends it"]
