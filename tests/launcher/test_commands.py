"""The commands, against the local cloud: hosts with a real sshd, and S3 as trainers leave it."""

import dataclasses
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher import (
    again,
    ec2,
    lookup,
    names,
    objects,
    reach,
    record,
    runs,
    security_group,
    watch_book,
)
from launcher.__main__ import main
from launcher.aws import Account
from launcher.commands import cp, doctor, kill
from launcher.record import Record
from launcher.request import parse
from launcher.runs import Run
from launcher.watch_book import Book, Event
from tests.cloud.cloud import missing
from tests.cloud.server import Call, Refusal
from tests.launcher.desk import BUCKET, Desk, as_user, heartbeat

pytest_plugins = ["tests.cloud.fixtures"]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.cloud,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`; fails only after a minute without one."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not in a minute: {what}")


def test_ls_tells_of_hosts_cost_and_training(desk: Desk) -> None:
    assert desk("ls").startswith("no runs in us-east-1 of yours")
    run = desk.rent("first", 2)
    assert "setting up" in desk("ls")
    desk.put("runs/first/heartbeats/0.json", heartbeat(step=1234))
    desk.put("runs/first/heartbeats/1.json", heartbeat())
    shown = desk("ls")
    for cell in ("first", "2 x c7i.large spot", "training", "1,234", "3.250", "61,000"):
        assert cell in shown, cell
    (told,) = json.loads(desk("ls", "--json"))
    assert told["hosts"][1]["instance"] == run.hosts[1].instance_id
    assert told["tokens_per_s"] == 61000.5
    elapsed = datetime.now(UTC) - min(host.launched for host in run.hosts)
    assert 0 < told["cost"] <= 2 * 36.0 * elapsed.total_seconds() / 3600
    desk.put("runs/first/results.json", {})
    assert json.loads(desk("ls", "--json"))[0]["state"] == "finished"


def test_ls_reads_metrics_where_heartbeats_have_no_loss(desk: Desk) -> None:
    desk.rent("first")
    lines = [
        {"step": 4, "learning/loss": 5.0, "times/tokens_per_sec": 10.0},
        {"step": 5, "learning/loss": 4.5, "times/tokens_per_sec": 11.0},
        {"step": 5, "learning/val_loss": 4.4},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    desk.put("runs/first/metrics.jsonl", content)
    desk.put("runs/first/heartbeats/0.json", heartbeat(step=6, loss=None, tokens_per_s=None))
    (told,) = json.loads(desk("ls", "--json"))
    assert (told["step"], told["loss"], told["tokens_per_s"]) == (6, 4.5, 11.0)


def test_ls_shows_nothing_that_others_could_have_planted(desk: Desk) -> None:
    run = desk.rent("first")
    account = Account.open()
    account.client("ec2").create_tags(
        Resources=[run.hosts[0].instance_id],
        Tags=[
            {"Key": names.TAG_CONFIG, "Value": "\x9b31mevil"},
            {"Key": names.TAG_OWNER, "Value": "me\x9b2J"},
            {"Key": names.TAG_PRICE, "Value": "nan"},
        ],
    )
    desk.put("runs/first/heartbeats/0.json", {"step": "\x1b[31m", "loss": [1], "time": 1})
    shown = desk("ls", "--all") + desk("ls", "--all", "--json")
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "31mevil" in shown


def test_ls_shows_only_ones_own_unless_all(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.rent("first")
    as_user(desk.cloud.user("other"), monkeypatch)
    assert "no runs" in desk("ls")
    assert "user/laptop" in desk("ls", "--all")


def test_logs_come_from_s3(desk: Desk) -> None:
    desk.rent("first")
    assert "left no output" in desk.failure("logs", "first")
    desk.put("launches/first/output-0.txt", b"one\n\x1b[2Jtwo\n\xff\n")
    desk.put("launches/first/output-1.txt", b"other\n")
    assert desk("logs", "first") == "one\n\\x1b[2Jtwo\n�\n"
    assert desk("logs", "first", "--host", "1") == "other\n"
    desk("kill", "first", "--yes")
    assert desk("logs", "first").startswith("one\n")


def test_logs_of_a_name_that_nobody_has_are_not_waited_for(desk: Desk) -> None:
    desk.rent("first")
    said = desk.failure("logs", "fist", "-f")
    assert said.startswith("host 0 of fist has left no output in s3://")
    assert "no host of that run is running; `python -m launcher ls --all` lists" in said


def test_a_run_whose_bucket_is_closed_to_us_does_not_hide_the_others(desk: Desk) -> None:
    desk.rent("first")
    second = desk.rent("second")
    desk.put("runs/first/heartbeats/0.json", heartbeat(step=1234))
    Account.open().client("ec2").create_tags(
        Resources=[second.hosts[0].instance_id],
        Tags=[{"Key": names.TAG_LOGDIR, "Value": "s3://somebody-elses/runs/second"}],
    )

    def closed(call: Call) -> None:
        if call.path.startswith("/somebody-elses"):
            raise Refusal("AccessDenied", "Access Denied", 403)

    desk.cloud.server.checks.append(closed)
    first, second = json.loads(desk("ls", "--json"))
    assert (first["name"], first["step"], first["state"]) == ("first", 1234, "training")
    assert (second["name"], second["step"], second["state"]) == ("second", None, "running")


def test_a_price_that_is_not_known_is_not_nothing(desk: Desk) -> None:
    run = desk.rent("first")
    Account.open().client("ec2").create_tags(
        Resources=[run.hosts[0].instance_id], Tags=[{"Key": names.TAG_PRICE, "Value": "?"}]
    )
    assert "unknown" in desk("ls")
    assert json.loads(desk("ls", "--json"))[0]["cost"] is None
    assert "unknown so far" in desk("kill", "first", "--yes")


def test_logs_follow_what_is_added(desk: Desk) -> None:
    desk.rent("first")
    words = [sys.executable, "-m", "launcher", "logs", "first", "-f"]
    with subprocess.Popen(
        words, cwd=ROOT, env=desk.cloud.environ, stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout
        desk.put("launches/first/output-0.txt", b"one\ntw")
        assert follower.stdout.readline() == "one\n"
        desk.put("launches/first/output-0.txt", b"one\ntwo\nthree\n")
        assert follower.stdout.readline() == "two\n"
        assert follower.stdout.readline() == "three\n"
        follower.terminate()


def test_run_runs_on_all_hosts(desk: Desk) -> None:
    run = desk.rent("first", 2)
    said = desk("run", "first", "--", "hostname")
    for host in run.hosts:
        assert f"first-{host.index}: ip-{host.private_ip.replace('.', '-')}\n" in said
    assert "first-0: a  $(hostname) 'b\n" in desk("run", "first", "--", "echo", "a  $(hostname) 'b")
    assert desk("run", "first", "--", "echo a | wc -c").count(": 2\n") == 2
    assert main(["run", "first", "--", "test $(hostname | tail -c 2) = 4"]) == 1
    assert "no command" in desk.failure("run", "first")
    assert "did you mean first?" in desk.failure("run", "fist", "--", "true")


def test_run_by_private_addresses_and_from_another_machine(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    desk.rent("first")
    monkeypatch.setenv("HOME", str(tmp_path))  # a machine that has no key yet
    assert "ubuntu" in desk("run", "first", "--private-ip", "--", "echo $HOME")
    (key,) = (tmp_path / ".ssh" / "txl").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600


def test_ssh_attaches_to_the_session(desk: Desk) -> None:
    run = desk.rent("first")
    desk("run", "first", "--", "tmux new-session -d -s txl 'echo in the session; sleep 1000'")
    words = [sys.executable, "-m", "launcher", "ssh", "first"]
    environ = desk.cloud.environ | {"TERM": "xterm"}
    outside, inside = pty.openpty()
    with subprocess.Popen(
        words, cwd=ROOT, env=environ, stdin=inside, stdout=inside, stderr=inside
    ) as ssh:
        os.close(inside)
        seen = b""
        while b"in the session" not in seen:
            seen += os.read(outside, 4096)
        while b"detached" not in seen:
            # Leaves the session; what comes before tmux reads keys may be lost.
            os.write(outside, b"\x02d")
            if select.select([outside], [], [], 2)[0]:
                seen += os.read(outside, 4096)
        assert ssh.wait(60) == 0
    os.close(outside)
    assert "txl:" in desk("run", "first", "--", "tmux ls")
    assert "no host 3 of first is running; there are 0" in desk.failure("ssh", "first", "3")
    assert run.hosts[0].host_key


def let_in(desk: Desk) -> set[tuple[str, int, str]]:
    """Protocols, first ports and addresses that the hosts' security group lets in."""
    groups = desk.cloud.client("ec2").describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["txl-laptop"]}]
    )["SecurityGroups"]
    return {
        (rule["IpProtocol"], rule["FromPort"], source["CidrIp"])
        for rule in groups[0]["IpPermissions"]
        for source in rule["IpRanges"]
    }


def test_mosh_is_let_in_and_started(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a program that only says what it was given, as there is no mosh here."""
    run = desk.rent("first")
    mosh = tmp_path / "mosh"
    mosh.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    mosh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(security_group, "own_public_address", lambda: "203.0.113.7")
    desk("ssh", "first", "--mosh")
    words = (tmp_path / "words").read_text().splitlines()
    assert words[0].startswith("--ssh=ssh -F /dev/null -i ")
    assert "StrictHostKeyChecking=yes" in words[0]
    assert words[1:4] == [f"ubuntu@{run.hosts[0].public_ip}", "--", "sh"]
    assert let_in(desk) == {("tcp", 22, "127.0.0.0/8"), ("udp", 60000, "203.0.113.7/32")}
    host = run.hosts[0].instance_id
    assert any({"install", "mosh"} <= set(words) for words in desk.cloud.recorded(host, "apt-get"))
    desk.cloud.break_program(0, "apt-get", "E: Unable to locate package mosh")
    desk.rent("second")
    assert desk.failure("ssh", "second", "--mosh") == (
        "the host has no mosh, and it cannot be installed (E: Unable to locate package mosh): log "
        "in without --mosh"
    )


def test_another_machine_is_let_in_when_hosts_do_not_answer_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No packet is dropped here, so the connection that is tried says that it was."""
    desk.rent("first")
    desk("run", "first", "--", "true")
    assert let_in(desk) == {("tcp", 22, "127.0.0.0/8")}
    monkeypatch.setattr(security_group, "own_public_address", lambda: "203.0.113.7")
    monkeypatch.setattr(reach, "is_shut_out", lambda address: True)
    desk("run", "first", "--", "true")
    assert let_in(desk) == {("tcp", 22, "127.0.0.0/8"), ("tcp", 22, "203.0.113.7/32")}


def test_kill_names_what_it_ends_and_asks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    run = desk.rent("first", 2)
    desk.rent("second")
    assert "add --yes" in desk.failure("kill", "first")
    outside, inside = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(inside))
    os.write(outside, b"no\n")
    assert main(["kill", "first"]) == 1
    assert len(desk.cloud.instances()) == 3
    os.write(outside, b"y\n")
    said = desk("kill", "first")
    for host in run.hosts:
        assert host.instance_id in said
    assert "$36.00 an hour" in said
    assert f"stay in s3://{BUCKET}/runs/first" in said
    assert len(desk.cloud.instances()) == 1
    assert "no host of a run first stands" in desk.failure("kill", "first")
    sys.stdin.close()
    os.close(outside)


def test_only_ones_own_runs_are_ended(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.rent("first", 1, "--nospot")
    as_user(desk.cloud.user("other"), monkeypatch)
    for words in (("kill", "first", "--yes"), ("stop", "first"), ("sync", "first")):
        assert "launched by arn:aws:iam::123456789012:user/laptop" in desk.failure(*words)
    assert len(desk.cloud.instances()) == 1
    desk("kill", "first", "--yes", "--force")
    assert not desk.cloud.instances()


def test_of_two_runs_of_a_name_ones_own_is_meant(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = desk.rent("first")
    as_user(desk.cloud.user("other"), monkeypatch)
    others = desk.rent("first")
    as_user(desk.cloud.environ, monkeypatch)
    assert lookup.standing(Account.open(), "first") == own
    assert others.hosts[0].instance_id not in desk("kill", "first", "--yes", "--force")
    assert [i.id for i in desk.cloud.instances()] == [others.hosts[0].instance_id]
    assert "--force does it all the same" in desk.failure("kill", "first", "--yes")


def note(run: Run) -> None:
    """Writes the record of a launch, and its source, as far as commands want to know them."""
    account = Account.open()
    asked = parse(["--config=quickstart", "--machines", str(len(run.hosts)), "--nospot"]).command
    written = Record(
        launch=run.launch,
        owner=run.owner,
        started=run.started,
        config=asked.experiment,
        words=("--config=quickstart",),
        options=record.options(asked),
        zones=("us-east-1a",),
        source="5" * 64,
        corpus="",
        revision="",
        attempt="of the launch",
    )
    record.write(account, BUCKET, run.name, written, "")
    objects.write(account, BUCKET, f"sources/{'5' * 64}.tar.gz", b"as it was")


def states(desk: Desk) -> list[str]:
    return [instance.state for instance in desk.cloud.ec2.instances()]


def test_hosts_are_not_stopped_where_nothing_can_be_saved(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    desk.rent("first", 1, "--nospot")
    Account.open().client("ssm").delete_parameter(Name="/txl/keys/txl-laptop")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("HOME", str(tmp_path))
        assert "no private half of the key pair" in desk.failure("stop", "first")
    assert states(desk) == ["running"]


def test_hosts_without_a_public_address_are_reached_by_their_private_one(desk: Desk) -> None:
    desk.rent("first", 1, "--nospot")
    (instance,) = desk.cloud.instances()
    instance.nics[0].public_ip = None
    assert "ubuntu" in desk("run", "first", "--", "echo $HOME")
    said = desk("stop", "first")
    assert "the trainers save and end" in said and "is lost" not in said
    assert "which cost $36.00 an hour" in said
    assert states(desk) == ["stopped"]


def wish(name: str = "first") -> str:
    known, _ = record.read(Account.open(), BUCKET, name)
    assert known
    return known.wish


def test_watchers_are_told_of_a_stop_and_of_a_start(desk: Desk) -> None:
    run = desk.rent("first", 1, "--nospot")
    note(run)
    desk("stop", "first")
    assert (wish(), states(desk)) == (record.STOP, ["stopped"])
    known, _ = record.read(Account.open(), BUCKET, "first")
    assert known and known.attempt != "of the launch"
    # Nothing trains here, and the start is noted before that is found.
    desk.cloud.refuse("StartInstances", "InsufficientInstanceCapacity", times=1)
    assert "has no room for the hosts now" in desk.failure("start", "first")
    assert wish() == record.TRAIN


def test_watchers_are_told_of_a_kill_when_it_is_agreed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(desk.rent("first", 2))
    asked = []
    with monkeypatch.context() as declining:
        declining.setattr(kill, "agreed", lambda question, yes: asked.append(question))
        assert main(["kill", "first"]) == 1
    assert (wish(), asked) == (record.TRAIN, ["Terminate 2 hosts?"])
    desk("kill", "first", "--yes")
    assert wish() == record.END
    assert not desk.cloud.instances()


def test_watchers_of_another_launch_are_told_nothing(desk: Desk) -> None:
    """Of this name, in another region for instance: its hosts would end."""
    run = desk.rent("first")
    note(dataclasses.replace(run, launch="f" * 16))
    desk("kill", "first", "--yes")
    assert wish() == record.TRAIN


def test_hosts_end_also_where_no_watcher_can_be_told(desk: Desk) -> None:
    note(desk.rent("first"))
    desk.cloud.refuse("s3:PUT", "UnauthorizedOperation")
    said = desk("kill", "first", "--yes")
    assert "a watcher, if there is one, replaces the hosts" in said
    assert not desk.cloud.instances()
    desk.rent("second")  # of which there is no record
    assert "a watcher" not in desk("kill", "second", "--yes")


def interrupted(launch: str) -> Book:
    """What a watcher writes that has lost hosts."""
    now = datetime.now(UTC)
    return Book(events=(Event(time=now, kind="preempted", text="-", launch=launch),))


def test_a_watcher_that_waits_for_hosts_is_told_to_end(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = desk.rent("first")
    note(run)
    account = Account.open()
    ec2.terminate(account, run.hosts)
    assert "no host of a run first stands" in desk.failure("kill", "first")
    watch_book.write(account, BUCKET, "first", interrupted("f" * 16), "")
    assert "no host of a run first stands" in desk.failure("kill", "first")
    _, version = watch_book.read(account, BUCKET, "first")
    watch_book.write(account, BUCKET, "first", interrupted(run.launch), version)
    with monkeypatch.context() as elsewhere:
        as_user(desk.cloud.user("other"), elsewhere)
        assert "no host of a run first stands" in desk.failure("kill", "first")
    assert wish() == record.TRAIN
    assert desk("kill", "first") == "first has no hosts; a watcher that waits for some ends\n"
    assert wish() == record.END
    assert "no host of a run first stands" in desk.failure("kill", "first")


def test_a_run_that_does_not_stand_is_said_so_where_no_bucket_is(desk: Desk) -> None:
    for words in (("kill", "first"), ("stop", "first"), ("start", "first")):
        assert "no host of a run first stands in us-east-1" in desk.failure(*words)


def test_only_ones_own_runs_are_looked_after(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no bucket" in desk.failure("watch", "first")
    note(desk.rent("first"))
    said = desk.failure("watch", "second")
    assert said == (
        f"s3://{BUCKET} knows of no launch of a run second: `python -m launcher ls --all` lists "
        "the runs"
    )
    as_user(desk.cloud.user("other"), monkeypatch)
    said = desk.failure("watch", "first")
    assert "launched by arn:aws:iam::123456789012:user/laptop, and you are arn:" in said
    assert watch_book.read(Account.open(), BUCKET, "first") == (Book(), "")


def test_a_run_that_is_too_dear_is_not_looked_after(desk: Desk) -> None:
    note(desk.rent("first"))
    said = desk.failure("watch", "first", "--max-hourly-cost=35.99")
    assert "the hosts cost $36.00 an hour, which is more than --max-hourly-cost 35.99" in said
    assert watch_book.read(Account.open(), BUCKET, "first") == (Book(), "")


def test_sync_wants_all_hosts_before_it_stops_a_trainer(desk: Desk) -> None:
    run = desk.rent("first", 2)
    note(run)
    desk.cloud.crash(run.hosts[1].instance_id)
    said = desk.failure("sync", "first")
    assert "1 hosts of first stand ready, and it trains on 2: `python -m launcher watch" in said
    known, _ = record.read(Account.open(), BUCKET, "first")
    assert known and known.attempt == "of the launch"


def test_start_looks_for_everything_before_it_pays_and_names_what_it_has_started(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = desk.rent("first", 1, "--nospot")
    note(run)
    host = run.hosts[0].instance_id
    ec2.stop(Account.open(), run.hosts)
    until(lambda: states(desk) == ["stopped"], "the end of the host")
    desk.cloud.refuse("DescribeImages", "UnauthorizedOperation", times=1)
    assert "AWS denies DescribeImages" in desk.failure("start", "first")
    assert states(desk) == ["stopped"]
    desk.cloud.break_ssh(0)
    monkeypatch.setattr(again, "SSH_SECONDS", 1.0)
    said = desk.failure("start", "first")
    assert "cannot reach 1 of 1 hosts: first-0: no answer in 1 s" in said
    assert (
        f"the hosts of first ({host}) may run, and cost: `python -m launcher start first`" in said
    )
    assert "`python -m launcher stop first`" in said and "`python -m launcher kill first`" in said
    assert states(desk) == ["running"]
    known, _ = record.read(Account.open(), BUCKET, "first")
    assert known and known.attempt != "of the launch"
    # What it has cost before is not forgotten, and it can be put to work as it runs.
    assert runs.find(Account.open(), "first")[0].hosts[0].hours_before >= 0.0
    assert "no answer in 1 s" in desk.failure("start", "first")


def test_spot_hosts_are_not_stopped(desk: Desk) -> None:
    desk.rent("first")
    assert "spot" in desk.failure("stop", "first")
    assert len(desk.cloud.instances()) == 1


def test_clean_removes_what_nothing_uses(desk: Desk) -> None:
    desk.rent("first", 2)
    said = desk("clean", "--yes")
    assert "placement group txl-laptop-us-east-1b" in said
    for kind in ("security group", "us-east-1a", "key pair", "role", "bucket"):
        assert kind not in said
    desk("kill", "first", "--yes")
    until(lambda: not desk.cloud.machines.running(), "the end of the hosts")
    said = desk("clean", "--yes")
    for kind in ("security group", "placement group", "key pair", "role", "bucket"):
        assert kind in said
    assert "nothing" in desk("clean", "--yes")
    assert not desk.cloud.client("s3").list_buckets()["Buckets"]
    desk.rent("again", 2)


def test_prices(desk: Desk) -> None:
    said = desk("prices", "p3dn.24xlarge")
    assert "8 x V100" in said
    assert "31.2120" in said
    told = json.loads(desk("prices", "p3dn.24xlarge", "--json"))
    assert set(told["spot"]) == {"us-east-1c", "us-east-1d"}
    assert "did you mean" in desk.failure("prices", "p3dn.24xlrge")


def actions(call: Call) -> list[str]:
    """What a simulation of policies is about."""
    return call.numbered("ActionNames.member")


def test_doctor_goes_on_where_a_look_is_denied(desk: Desk) -> None:
    for operation in ("DescribeSpotPriceHistory", "DescribeVpcs"):
        desk.cloud.refuse(operation, "UnauthorizedOperation")
    assert main(["doctor", "--json"]) == 1
    found = {f["what"]: f for f in json.loads(desk.capsys.readouterr().out)}
    for what in ("price", "what launches share", "starting hosts"):
        assert found[what]["verdict"] == "bad" and "AWS denies Describe" in found[what]["text"]
    assert found["permissions"]["verdict"] == found["quota, spot"]["verdict"] == "good"


def test_doctor_asks_for_the_path_of_a_role(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As roles of the sign-on have one, and their sessions do not tell it."""
    name = "AWSReservedSSO_Admin_0123"
    account = dataclasses.replace(
        Account.open(), caller=f"arn:aws:sts::123456789012:assumed-role/{name}/ada"
    )
    assert doctor._permissions(account).verdict == "unknown"
    desk.cloud.client("iam").create_role(
        RoleName=name,
        Path="/aws-reserved/sso.amazonaws.com/",
        AssumeRolePolicyDocument="{}",
    )
    assert doctor._permissions(account).verdict == "good"
    asked = [call for call in desk.cloud.calls if call.operation == "SimulatePrincipalPolicy"]
    path = "role/aws-reserved/sso.amazonaws.com"
    assert asked[-1].parameters["PolicySourceArn"] == f"arn:aws:iam::123456789012:{path}/{name}"


def test_doctor_finds_what_is_wrong(desk: Desk) -> None:
    found = {f["what"]: f for f in json.loads(desk("doctor", "--json"))}
    assert all(finding["verdict"] == "good" for finding in found.values()), found
    asked = [call for call in desk.cloud.calls if call.operation == "SimulatePrincipalPolicy"]
    about = {a: call.numbered("ResourceArns.member") for call in asked for a in actions(call)}
    assert about["s3:PutBucketTagging"] == [f"arn:aws:s3:::{BUCKET}"]
    assert about["iam:PassRole"][0].startswith("arn:aws:iam::123456789012:role/txl/txl-host-")
    assert about["ssm:GetParameter"][0].endswith(":parameter/txl/keys/txl-laptop")
    assert {"ec2:TerminateInstances", "ec2:CreateTags", "iam:TagRole"} < about.keys()
    desk.cloud.ec2.denied = {"iam:PassRole"}
    desk.cloud.ec2.quotas = {"L-7212CCBC": 96.0}
    desk.cloud.refuse("ec2:RunInstances", "UnauthorizedOperation")
    assert main(["doctor", "--machines=2"]) == 1
    said = desk.capsys.readouterr().out
    assert "do not allow iam:PassRole" in said
    assert "AWS denies ec2:RunInstances" in said
    assert "96 vCPUs: 1 x p3dn.24xlarge" in said
    assert not desk.cloud.instances()


def test_doctor_without_the_right_to_ask(desk: Desk) -> None:
    for operation in ("iam:SimulatePrincipalPolicy", "servicequotas:GetServiceQuota"):
        desk.cloud.refuse(operation, "AccessDenied")
    found = {f["what"]: f["verdict"] for f in json.loads(desk("doctor", "--json"))}
    assert found["permissions"] == found["quota, spot"] == "unknown"


def test_cp_brings_whole_checkpoints(desk: Desk, tmp_path: Path) -> None:
    desk.rent("first")
    assert "has no checkpoint yet" in desk.failure("cp", "first")
    files = {
        "config.json": b"{}",
        "vocab.json": b"{}",
        "samples.txt": b"once\n",
        "metrics.jsonl": b"{}\n",
        "checkpoints/9.0/commit.json": b"old",
        "checkpoints/10.0/commit.json": b"new",
        "checkpoints/10.0/whole/arrays/a": b"\0" * 100,
        "checkpoints/11.0/whole/arrays/a": b"unfinished",
        "checkpoints/best/4.1/commit.json": b"best",
        "../../outside": b"evil",
    }
    for name, content in files.items():
        desk.put(f"runs/first/{name}", content)
    desk("kill", "first", "--yes")
    desk("cp", "first", "checkpoint", str(tmp_path / "copy"))
    copied = {
        path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes()
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    assert set(copied) == {
        *("config.json", "vocab.json", "checkpoints/10.0/commit.json"),
        *("checkpoints/10.0/whole/arrays/a", "checkpoints/best/4.1/commit.json"),
    }
    assert all(files[name] == content for name, content in copied.items())
    desk("cp", "first", "samples", str(tmp_path / "samples"))
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["samples.txt"]


def test_cp_never_leaves_its_folder() -> None:
    evil = ["../a", "/etc/passwd", "a/../../b", "a//b", "./a", "checkpoints/../x"]
    assert cp.wanted([*evil, "samples.txt"], "all") == ["samples.txt"]


def test_tensorboard_shows_runs_from_s3_to_this_machine_only(desk: Desk) -> None:
    import socket
    import urllib.request

    from tensorboardX import SummaryWriter

    desk.rent("first")
    folder = desk.cloud.folder / "events"
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("learning/loss", 1.0, 1)
    (events,) = folder.iterdir()
    desk.put(f"runs/first/{events.name}", events.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "launcher", "tensorboard", "first", f"--port={port}"]
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=desk.cloud.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    ) as board:
        url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"

        def tags() -> str:
            try:
                with urllib.request.urlopen(url) as answer:
                    return answer.read().decode()
            except OSError:
                return ""

        until(lambda: "learning/loss" in tags(), "TensorBoard with the run")
        listening = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True).stdout
        assert f"127.0.0.1:{port}" in listening
        assert f"0.0.0.0:{port}" not in listening
        os.killpg(board.pid, 15)


def test_a_bucket_of_somebody_else_is_not_read(desk: Desk) -> None:
    run = desk.rent("first")
    Account.open().client("ec2").create_tags(
        Resources=[run.hosts[0].instance_id],
        Tags=[{"Key": names.TAG_LOGDIR, "Value": "s3://somebody-elses/runs/first"}],
    )
    for words in (("logs", "first"), ("cp", "first"), ("tensorboard", "first")):
        assert "no bucket somebody-elses" in desk.failure(*words)


def test_words_that_would_be_shell_are_none(desk: Desk) -> None:
    desk.rent("first")
    for name in ("$(touch x)", "a;b", "-x", "A", "a\nb", "../first"):
        for command in ("kill", "logs", "ssh", "stop", "cp"):
            desk.failure(command, name)
    assert len(desk.cloud.instances()) == 1
