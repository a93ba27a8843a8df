"""A launch on machines that run already: real sshds and real training, and nobody asks AWS."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.bootstrap import HostKey, user_data
from tests import tiny
from tests.cloud.cloud import LocalCloud
from tests.launcher.test_launch import SMALL, Command, refused

pytest_plugins = ["tests.cloud.fixtures"]

pytestmark = [pytest.mark.processes, pytest.mark.cloud]

USER = "ubuntu"


class Room:
    """Two machines, and a laptop that knows their keys and has no account of AWS."""

    def __init__(self, cloud: LocalCloud):
        self.cloud = cloud
        ssh = Path(cloud.environ["HOME"]) / ".ssh"
        ssh.mkdir(mode=0o700)
        key = ssh / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        ec2 = cloud.client("ec2")
        ec2.import_key_pair(KeyName="me", PublicKeyMaterial=key.with_suffix(".pub").read_bytes())
        host_key = HostKey.of(b"secret of the tests", "room")
        ec2.run_instances(
            ImageId=next(iter(cloud.ec2.backend.amis)),
            InstanceType="c7i.xlarge",
            KeyName="me",
            MinCount=2,
            MaxCount=2,
            SubnetId=ec2.describe_subnets()["Subnets"][0]["SubnetId"],
            UserData=user_data(host_key, USER, None),
        )
        self.machines = [str(instance.private_ip) for instance in cloud.instances()]
        known = [f"{address} {host_key.public}\n" for address in self.machines]
        (ssh / "known_hosts").write_text("".join(known))
        self.hosts = ",".join(f"{USER}@{address}" for address in self.machines)
        self.shared = cloud.shared
        self.environ = {
            name: value for name, value in cloud.environ.items() if not name.startswith("AWS_")
        }
        self.commands: list[Command] = []

    def start(self, *words: str, hosts: str = "", ssh_seconds: float = 60.0) -> Command:
        typed = [f"--hosts={hosts or self.hosts}", "--name=a", *SMALL]
        typed += [f"--logdir={self.shared}/a", *words]
        self.commands.append(Command(self.environ, typed, ssh_seconds))
        return self.commands[-1]

    def run(self, *words: str, hosts: str = "", ssh_seconds: float = 60.0) -> Command:
        command = self.start(*words, hosts=hosts, ssh_seconds=ssh_seconds)
        command.end()
        return command

    def home(self, number: int) -> Path:
        return self.cloud.home(self.cloud.instances()[number].id)


@pytest.fixture
def room(cloud: LocalCloud) -> Iterator[Room]:
    room = Room(cloud)
    yield room
    for command in room.commands:
        if command.process.poll() is None:
            command.process.kill()
            command.end()


def until(reached: Any) -> None:
    while not reached():
        time.sleep(0.1)


@pytest.mark.slow
def test_it_trains_on_them_without_aws(room, cloud):
    asked = len(cloud.calls)
    long = ["--max-tokens=99999999"]
    command = room.run(*long)
    assert command.process.returncode == 0, command.text
    assert "a trains on 2 hosts. It goes on without this machine." in command.text
    assert f"ssh {USER}@{room.machines[0]} tail -f txl/output.txt" in command.text
    again = room.run(*long)
    assert again.process.returncode == 0, again.text
    assert "packages: " not in again.text
    complaint = refused(room.run(*long, "--lr=1"))
    assert complaint.startswith(f"these hosts train another run: {USER}@{room.machines[0]} (a), ")
    assert len(cloud.calls) == asked
    output = room.home(0) / "txl" / "output.txt"
    until(lambda: "step 10/" in output.read_text())
    assert not (room.home(0) / "txl" / "status").exists()


@pytest.mark.parametrize(
    ("hosts", "words", "complaint"),
    [
        ("{0},{0}", (), "--hosts has ubuntu@{a} twice"),
        ("{0},ubuntu@127.1.99.99", (), "cannot reach 1 of 2 hosts: ubuntu@127.1.99.99: "),
        ("{0},{1}", ("--batch=9",), "batch is 9, which 2 devices cannot divide"),
        ("{0},{1}", ("--logdir=",), "several hosts keep a run in one place: name it with --logdir"),
        ("{0},a b", (), "is no host"),
    ],
)
def test_what_cannot_be_is_one_line(room, hosts, words, complaint):
    first, second = room.machines
    named = hosts.format(f"{USER}@{first}", f"{USER}@{second}")
    found = refused(room.run(*words, hosts=named, ssh_seconds=5.0))
    assert complaint.format(a=first) in found
    assert not list(room.home(0).glob("txl/train.sh"))


def test_a_file_may_list_them(room, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(f"# mine\n{USER}@{room.machines[0]}  # left\n\n{USER}@{room.machines[1]}\n")
    command = room.run("--dry-run", hosts=str(path))
    assert command.process.returncode == 0, command.text
    assert "2, which run already" in command.text


def test_a_machine_with_an_unknown_key_is_not_talked_to(room):
    (Path(room.environ["HOME"]) / ".ssh" / "known_hosts").write_text("")
    assert "its key is not known" in refused(room.run())


def test_ctrl_c_stops_the_trainers_again(room):
    command = room.start("--max-tokens=99999999")
    command.wait_for("health check: ")
    command.send(signal.SIGINT)
    assert command.end() == 130, command.text
    assert "stopping trainers that have started" in command.text
    for number in (0, 1):
        folder = room.home(number) / "txl"
        until(lambda folder=folder: not (folder / "pid").exists() or (folder / "status").exists())


def test_trainers_are_stopped_when_nobody_can_be_told(room):
    """What the launcher writes to is gone: a terminal that was closed, or a pipe."""
    words = [f"--hosts={room.hosts}", "--name=a", *SMALL, f"--logdir={room.shared}/a"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", *words, "--max-tokens=99999999"],
        cwd=tiny.ROOT,
        env=room.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert any(line.startswith("health check: ") for line in process.stdout)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    for number in (0, 1):
        folder = room.home(number) / "txl"
        until(lambda folder=folder: not (folder / "pid").exists() or (folder / "status").exists())
