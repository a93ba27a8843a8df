"""Whole launches in the local cloud, and what runs after each fault, Ctrl-C and SIGKILL."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from moto.ec2.models import EC2Backend

from launcher import launch
from tests import tiny
from tests.cloud.cloud import LocalCloud
from tests.cloud.server import Fault, Refusal
from txl_jax.errors import UserError

pytest_plugins = ["tests.cloud.fixtures"]

pytestmark = [pytest.mark.processes, pytest.mark.cloud]

BUCKET = "txl-123456789012-us-east-1"
KIND = "c7i.xlarge"
ZONES = [f"us-east-1{letter}" for letter in "abcdf"]
"""Of c7i.xlarge, the cheapest first."""
WORDS = ["--config=quickstart", "--machines=2", "--ssh-cidr=127.0.0.0/8", "--name=a"]
SMALL = [
    *("--n-layer=1", "--d-model=32", "--d-inner=64", "--batch=8", "--eval-batch=8"),
    *("--max-tokens=20480", "--log-every=10", "--eval-every=40", "--eval-max-tokens=1000"),
    *("--sample-tokens=0",),
]
"""Eighty steps of a model that is compiled fast."""
START = (
    "import sys\n"
    "from launcher import __main__, launch, listed\n"
    "launch.SSH_SECONDS = listed.SSH_SECONDS = {ssh_seconds}\n"
    "sys.argv[0] = 'launcher'\n"
    "__main__._run()\n"
)
"""The launcher, but for its patience with hosts that do not answer."""


class Command:
    """A launcher's process, whose output is read as it comes."""

    def __init__(self, environ: dict[str, str], words: list[str], ssh_seconds: float = 60.0):
        script = START.format(ssh_seconds=ssh_seconds)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *words],
            cwd=tiny.ROOT,
            env=environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(tiny.ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self.lines.append("")
            self._changed.notify_all()

    def wait_for(self, beginning: str) -> None:
        """Until a line begins so. Fails if the process ends before."""
        with self._changed:
            while not any(line.startswith(beginning) for line in self.lines):
                assert self.lines[-1:] != [""] or self._reader.is_alive(), self.text
                self._changed.wait(1.0)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Its exit status, when it has ended."""
        status = self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()
        return status

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def error(self) -> str:
        """The one line of an error."""
        (line,) = [line for line in self.lines if line.startswith("error: ")]
        return line.removeprefix("error: ")


class Laptop:
    """Where the launcher is typed."""

    def __init__(self, cloud: LocalCloud):
        self.cloud = cloud
        self.commands: list[Command] = []

    def start(self, *words: str, ssh_seconds: float = 60.0, **environ: str) -> Command:
        """Types the launch of two small hosts, with further words."""
        typed = [*WORDS, *SMALL, "--yes", *words]
        command = Command(self.cloud.environ | environ, typed, ssh_seconds)
        self.commands.append(command)
        return command

    def run(self, *words: str, ssh_seconds: float = 60.0, **environ: str) -> Command:
        """As `start`, to its end."""
        command = self.start(*words, ssh_seconds=ssh_seconds, **environ)
        command.end()
        return command

    def refused(self, *words: str, **environ: str) -> str:
        """Why a launch is refused; it is typed in this process, which costs less."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as raised:
            for name, value in (self.cloud.environ | environ).items():
                patch.setenv(name, value)
            launch.main([*WORDS, *SMALL, "--yes", *words])
        assert str(raised.value).isprintable()
        return str(raised.value)

    def running(self) -> list[str]:
        """Ids of the instances that cost money."""
        return sorted(instance.id for instance in self.cloud.instances())

    def asked(self) -> list[str]:
        """Zones in which hosts were asked for."""
        subnets = {
            subnet["SubnetId"]: subnet["AvailabilityZone"]
            for subnet in self.cloud.client("ec2").describe_subnets()["Subnets"]
        }
        return [
            subnets[call.parameters["NetworkInterface.1.SubnetId"]]
            for call in self.cloud.calls
            if call.operation == "RunInstances"
        ]

    def zones(self) -> set[str]:
        """Zones in which there are instances, or were."""
        return {str(instance.placement.zone) for instance in self.cloud.ec2.instances()}


@pytest.fixture
def laptop(cloud: LocalCloud) -> Iterator[Laptop]:
    laptop = Laptop(cloud)
    yield laptop
    for command in laptop.commands:
        if command.process.poll() is None:
            command.process.kill()
            command.end()


def until_running(cloud: LocalCloud, number: int) -> None:
    while len(cloud.instances("running")) != number:
        time.sleep(0.05)


def refused(command: Command) -> str:
    """Why a launch was refused; it is one line and status 2."""
    assert command.end() == 2, command.text
    assert "Traceback" not in command.text, command.text
    return command.error


def test_zones_without_room_are_passed_over(laptop, cloud):
    cloud.full(*ZONES[:2])
    command = laptop.start()
    command.wait_for("hosts: ")
    assert laptop.asked() == ZONES[:3]
    assert laptop.zones() == {ZONES[2]}
    assert len(laptop.running()) == 2
    for zone in ZONES[:2]:
        assert f"no hosts in {zone}: InsufficientInstanceCapacity" in command.text
    command.send(signal.SIGINT)
    assert command.end() == 130
    assert laptop.running() == []


def test_where_no_zone_has_room_nothing_runs(laptop, cloud):
    cloud.full(*ZONES)
    complaint = refused(laptop.run())
    assert complaint.startswith(f"no zone has room for 2 × {KIND} now, nothing is running: ")
    assert all(f"{zone}: InsufficientInstanceCapacity" in complaint for zone in ZONES)
    assert "Try --nospot" in complaint
    assert laptop.running() == []


def test_a_quota_holds_in_all_zones(laptop, cloud):
    cloud.refuse("RunInstances", "MaxSpotInstanceCountExceeded")
    complaint = refused(laptop.run())
    assert "a quota of the account is reached (MaxSpotInstanceCountExceeded" in complaint
    assert len(laptop.asked()) == 1
    assert laptop.running() == []


def test_what_is_denied_is_named(laptop, cloud):
    cloud.refuse("RunInstances", "UnauthorizedOperation")
    assert "AWS denies RunInstances" in refused(laptop.run())
    assert laptop.running() == []


def test_throttling_is_waited_out(laptop, cloud):
    cloud.refuse("RunInstances", "RequestLimitExceeded", times=2)
    cloud.refuse("DescribeInstances", "RequestLimitExceeded", times=2)
    command = laptop.start()
    command.wait_for("SSH: ")
    assert len(laptop.running()) == 2
    command.send(signal.SIGTERM)
    assert command.end() == 130
    assert laptop.running() == []


def test_a_host_that_never_answers_is_named_and_none_runs(laptop, cloud):
    cloud.break_ssh(1)
    complaint = refused(laptop.run(ssh_seconds=3.0))
    assert complaint.startswith("cannot reach 1 of 2 hosts: a-1: no answer in 3 s")
    assert laptop.running() == []


def test_a_host_with_another_key_is_not_talked_to_and_none_runs(laptop, cloud):
    cloud.wrong_key(0)
    complaint = refused(laptop.run())
    assert "a-0: its key is not the one that it should have" in complaint
    assert laptop.running() == []


# Later steps are in tests/cloud/test_faults.py.
@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("account", signal.SIGINT),
        ("hosts", signal.SIGINT),
        ("SSH", signal.SIGINT),
        ("hosts", signal.SIGTERM),
    ],
)
def test_ctrl_c_after_a_step_leaves_nothing_running(laptop, step, number):
    command = laptop.start()
    command.wait_for(f"{step}: ")
    command.send(number)
    assert command.end() == 130, command.text
    assert laptop.running() == []
    if step != "account":
        assert "terminated: i-" in command.text
    else:
        assert "terminated: i-" in command.text or "nothing of a is running" in command.text
    assert "Traceback" not in command.text
    if step == "SSH":
        again = laptop.start()
        again.wait_for("SSH: ")
        assert len(laptop.running()) == 2


def test_ctrl_c_while_hosts_are_started_says_what_was_terminated(laptop, cloud):
    command = laptop.start()
    while not (hosts := laptop.running()):
        time.sleep(0.01)
    command.send(signal.SIGINT)
    assert command.end() == 130, command.text
    assert laptop.running() == []
    told = " ".join(line for line in command.lines if line.startswith("terminated: "))
    assert all(host in told for host in hosts), command.text


def test_a_terminal_that_is_closed_leaves_nothing_running(laptop, cloud):
    """Nothing can be said any more, and both the kernel and the shell send SIGHUP."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", *WORDS, *SMALL, "--yes"],
        cwd=tiny.ROOT,
        env=cloud.environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""
    while b"packages" not in seen:
        seen += os.read(ours, 4096)
    assert len(laptop.running()) == 2
    cloud.refuse("TerminateInstances", "RequestLimitExceeded", times=4)
    os.close(ours)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    assert process.wait() != 0
    assert laptop.running() == []


def test_of_two_launchers_of_the_same_words_the_later_goes_on_alone(laptop, cloud):
    first = laptop.start()
    first.wait_for("SSH: ")
    first.send(signal.SIGSTOP)  # a laptop that sleeps
    second = laptop.start()
    second.wait_for("packages: ")
    hosts = laptop.running()
    first.send(signal.SIGCONT)
    assert first.end() == 2, first.text
    assert "another command goes on with" in first.text
    assert "terminated: " not in first.text
    assert laptop.running() == hosts and len(hosts) == 2
    second.send(signal.SIGINT)
    assert second.end() == 130, second.text
    assert laptop.running() == []


def test_hosts_of_the_second_zone_are_gone_on_with(laptop, cloud):
    """The first zone's were accepted and died, and EC2 shows those for an hour."""
    cloud.die_once(1)
    command = laptop.start()
    command.wait_for("packages: ")
    assert f"no hosts in {ZONES[0]}: " in command.text
    hosts = laptop.running()
    assert len(hosts) == 2
    assert laptop.zones() == set(ZONES[:2])
    command.send(signal.SIGKILL)
    command.end()
    again = laptop.start()
    again.wait_for("packages: ")
    assert "a stands already: going on with it" in again.text
    assert laptop.running() == hosts


@pytest.mark.parametrize("step", ["account", "hosts", "SSH", "packages"])
def test_after_sigkill_the_same_command_goes_on_with_the_same_hosts(laptop, cloud, step):
    command = laptop.start()
    command.wait_for(f"{step}: ")
    command.send(signal.SIGKILL)
    command.end()
    again = laptop.start()
    again.wait_for("packages: ")
    hosts = laptop.running()
    assert len(hosts) == 2
    assert len(cloud.ec2.instances()) == 2, "no others were ever started"
    if step != "account":
        assert "a stands already: going on with it" in again.text
    again.send(signal.SIGINT)
    assert again.end() == 130
    assert laptop.running() == []


def test_hosts_that_ec2_does_not_show_yet_are_not_paid_twice(laptop, cloud):
    """The launcher is killed when EC2 has started hosts and nobody could have seen them."""
    command = laptop.start()
    until_running(cloud, 2)
    command.send(signal.SIGKILL)
    command.end()
    first = laptop.running()
    own = EC2Backend.describe_instances

    def described(backend: EC2Backend, *args: Any, **words: Any) -> Any:
        """Nothing, as EC2 may say for some seconds, until hosts are asked for again."""
        asked = [call for call in cloud.calls if call.operation == "RunInstances"]
        return own(backend, *args, **words) if len(asked) > 1 else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EC2Backend, "describe_instances", described)
        again = laptop.start()
        again.wait_for("hosts: ")
    assert laptop.running() == first
    assert len(cloud.ec2.instances()) == 2


def test_a_second_ctrl_c_says_what_stands_and_how_to_end_it(laptop, cloud):
    command = laptop.start()
    command.wait_for("SSH: ")
    cloud.refuse("TerminateInstances", "RequestLimitExceeded")
    command.send(signal.SIGINT)
    command.wait_for("terminating the hosts of a …")
    hosts = laptop.running()
    time.sleep(1.0)
    command.send(signal.SIGINT)
    assert command.end() == 130
    (line,) = [line for line in command.lines if line.startswith("hosts of a stand: ")]
    assert all(f"{host} running" in line for host in hosts) and len(hosts) == 2
    assert line.endswith("terminate them: `python -m launcher kill a`")


def test_hosts_that_cannot_be_terminated_are_named(laptop, cloud):
    cloud.refuse("TerminateInstances", "UnauthorizedOperation")
    cloud.break_ssh(0)
    complaint = refused(laptop.run(ssh_seconds=2.0))
    assert "a-0: no answer in 2 s" in complaint
    assert all(host in complaint for host in laptop.running()) and len(laptop.running()) == 2
    assert "`python -m launcher kill a`" in complaint


def test_a_run_that_stands_is_not_launched_with_other_words_or_by_others(laptop, cloud):
    command = laptop.start()
    command.wait_for("hosts: ")
    command.send(signal.SIGKILL)
    command.end()
    hosts = laptop.running()
    complaint = laptop.refused("--lr=0.5")
    assert "a run a stands already, launched with other words (optim.lr: 0.00175 there, 0.5" in (
        complaint
    )
    assert "max_hours: 24.0 there, 5.0 here" in laptop.refused("--max-hours=5")
    assert "cluster.machines: 2 there, 1 here" in laptop.refused("--machines=1")
    other = cloud.user("grace")
    assert "a run a of arn:aws:iam::123456789012:user/laptop stands already" in (
        laptop.refused(**other)
    )
    assert laptop.running() == hosts
    cloud.crash(hosts[0])
    assert "1 of 2 hosts of a are gone" in laptop.refused()


def test_it_asks_before_it_rents(laptop, cloud):
    words = [*WORDS, *SMALL]
    command = Command(cloud.environ, words)
    laptop.commands.append(command)
    assert "to rent 2 hosts for $0.12 an hour without being asked, add --yes" in refused(command)
    for answer, status in (("n", 1), ("", 1), ("yes", 130)):
        ours, theirs = os.openpty()
        os.write(ours, f"{answer}\n".encode())
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *words],
            cwd=tiny.ROOT,
            env=cloud.environ,
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if status == 130:
            until_running(cloud, 2)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == status, errors
        assert b"Rent 2 hosts for $0.12 an hour? [y/N]" in errors
        os.close(ours)
        os.close(theirs)
        assert laptop.running() == []


def test_a_dry_run_makes_nothing(laptop, cloud):
    before = len(cloud.calls)
    command = laptop.run("--dry-run", "--json")
    assert command.process.returncode == 0
    found = json.loads(command.text)
    assert (found["machines"], found["instance_type"]) == (2, KIND)
    asked = {(call.service, call.operation) for call in cloud.calls[before:]}
    assert {o for _, o in asked if not re.match("Describe|Get|HEAD|GET|List", o)} == set()


BAD = [
    ("--batch=9", "batch is 9, which 2 devices cannot divide"),
    ("--d-model=31", "d_model is 31; it has to be even"),
    ("--config=quikstart", "there is no config 'quikstart'"),
    ("--instance-type=p9.huge", "does not offer the instance type 'p9.huge'"),
    ("--machines=0", "machines is 0"),
    ("--dataset=text --text-dir=/nowhere", "--text-dir /nowhere is not a folder"),
    ("--dataset=enwik8 --data-dir=/nowhere --vocab=words", "enwik8 has no words to tell apart"),
    ("--init-from=runs/a", "init_from is runs/a, which the hosts cannot read"),
]


def test_bad_input_is_one_line_and_nothing_is_made(laptop, cloud):
    for words, complaint in BAD:
        assert complaint in laptop.refused(*words.split())
    assert BAD[0][1] in refused(laptop.run(*BAD[0][0].split()))
    assert laptop.running() == []
    assert cloud.client("s3").list_buckets()["Buckets"] == []


def test_a_changed_source_is_not_sent_as_a_committed_one(laptop, cloud, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("")
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(launch, "ROOT", source)
    # As it is committed it may be sent, and the next thing that is wrong is told.
    assert "Not_A_Name" in laptop.refused("--bucket=Not_A_Name", "--committed")
    (source / "a.py").write_text("1\n")
    complaint = laptop.refused("--committed")
    assert "a.py" in complaint and "--committed" in complaint, complaint
    assert laptop.running() == []
    assert cloud.client("s3").list_buckets()["Buckets"] == []


def test_a_bucket_of_somebody_else_is_left_alone(laptop, cloud):
    cloud.server.faults.append(Fault("s3:HEAD", Refusal("403", "Forbidden", 403), None))
    complaint = laptop.refused("--bucket=somebody-elses")
    assert "somebody-elses belongs to another account" in complaint
    assert laptop.running() == []
    assert cloud.client("s3").list_buckets()["Buckets"] == []


def test_ctrl_c_at_the_question_makes_nothing(laptop, cloud):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", *WORDS, *SMALL],
        cwd=tiny.ROOT,
        env=cloud.environ,
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr
    seen = b""
    while b"[y/N]" not in seen:
        seen += os.read(process.stderr.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    os.close(ours)
    os.close(theirs)
    assert laptop.running() == []
    assert cloud.client("s3").list_buckets()["Buckets"] == []


def tags(instance: Any) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in instance.get_tags()}


def test_what_is_launched_is_on_record_before_it_runs(laptop, cloud):
    command = laptop.start("--lr=0.01 ", "--text-dir=")
    command.wait_for("hosts: ")
    s3 = cloud.client("s3")
    record = json.loads(s3.get_object(Bucket=BUCKET, Key="launches/a.json")["Body"].read())
    assert record["words"] == [
        *("--config=quickstart", "--machines=2", *SMALL, "--lr=0.01 ", "--text-dir=")
    ]
    assert record["config"]["optim"]["lr"] == 0.01
    puts = [call for call in cloud.calls if (call.service, call.operation) == ("s3", "PUT")]
    (written,) = [call for call in puts if call.path.endswith("/launches/a.json")]
    (asked,) = [call for call in cloud.calls if call.operation == "RunInstances"]
    assert written.time < asked.time
    for number, instance in enumerate(cloud.instances()):
        found = tags(instance)
        assert found["txl:launch"] == record["launch"]
        assert (found["txl:config"], found["txl:run"]) == ("quickstart", "a")
        assert found["txl:logdir"] == f"s3://{BUCKET}/runs/a"
        assert found["Name"] == f"a-{number}"
        assert found["txl:host-key"].startswith("ssh-ed25519 ")


@pytest.mark.slow
def test_a_launch_killed_when_trainers_run_is_left_alone(laptop, cloud):
    command = laptop.start("--max-tokens=99999999")
    command.wait_for("health check: ")
    homes = [cloud.home(host) for host in laptop.running()]
    while not all((home / "txl" / "pid").exists() for home in homes):
        time.sleep(0.02)
    command.send(signal.SIGKILL)
    command.end()
    before = [(home / "txl" / "pid").read_text() for home in homes]
    hosts = laptop.running()
    again = laptop.run("--max-tokens=99999999")
    assert again.process.returncode == 0, again.text
    assert "a trains on 2 hosts" in again.text
    assert laptop.running() == hosts
    assert [(home / "txl" / "pid").read_text() for home in homes] == before


@pytest.mark.slow
def test_ctrl_c_when_all_train_says_that_they_do(laptop, cloud):
    command = laptop.start("--max-tokens=99999999")
    command.wait_for("trainer: ")
    command.send(signal.SIGINT)
    command.end()
    assert "Traceback" not in command.text
    assert "a trains all the same; " in command.text or "a trains on 2 hosts" in command.text
    assert len(laptop.running()) == 2


@pytest.mark.slow
def test_hosts_that_do_not_answer_when_they_are_adopted_are_left_and_named(laptop, cloud):
    command = laptop.run("--max-tokens=99999999")
    assert command.process.returncode == 0, command.text
    hosts = laptop.running()
    cloud.break_ssh(hosts[1])
    again = laptop.run("--max-tokens=99999999", ssh_seconds=3.0)
    complaint = refused(again)
    assert "no answer in 3 s" in complaint
    assert "the hosts of a stand (" in complaint and all(host in complaint for host in hosts)
    third = laptop.start("--max-tokens=99999999")
    third.wait_for("a stands already")
    time.sleep(2.0)
    third.send(signal.SIGINT)
    assert third.end() == 130
    assert "the hosts of a stand (" in third.text and "ends them" in third.text
    assert laptop.running() == hosts


@pytest.mark.slow
def test_a_run_from_launch_to_the_end_of_its_hosts(laptop, cloud):
    command = laptop.run("--json")
    assert command.process.returncode == 0, command.text
    assert "a trains on 2 hosts, $0.12 an hour. It goes on without this machine." in command.text
    hosts = laptop.running()
    again = laptop.run()
    assert again.process.returncode == 0, again.text
    assert laptop.running() == hosts
    while not all((cloud.home(host) / "txl" / "status").exists() for host in hosts):
        time.sleep(0.5)
    while laptop.running():
        cloud.pass_minutes(1)
        time.sleep(0.5)
    keys = {entry["Key"] for entry in cloud.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert {"runs/a/results.json", "runs/a/metrics.jsonl", "launches/a/output-1.txt"} <= keys
    assert any(key.startswith("runs/a/checkpoints/") for key in keys)
    assert "the run a has finished" in refused(laptop.run())


@pytest.mark.slow
def test_hosts_that_are_kept_stop_only_if_their_set_up_never_ends(laptop, cloud):
    command = laptop.start("--keep", "--max-tokens=2560")
    command.wait_for("packages: ")
    shutdowns = [cloud.recorded(host, "shutdown")[-1] for host in laptop.running()]
    assert all("+30" in words for words in shutdowns), shutdowns
    assert command.end() == 0, command.text
    hosts = laptop.running()
    assert "With --keep its hosts run, and cost, until then." in command.text
    while not all((cloud.home(host) / "txl" / "status").exists() for host in hosts):
        time.sleep(0.5)
    cloud.pass_minutes(600)
    time.sleep(3.0)
    assert laptop.running() == hosts
