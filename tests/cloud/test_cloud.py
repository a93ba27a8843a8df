"""The local cloud: hosts that are real enough, and a machine that is safe from them."""

import contextlib
import errno
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from botocore.exceptions import ClientError

from tests.cloud.cloud import LocalCloud, missing
from tests.cloud.ec2 import IMAGES, UBUNTU, WITH_DRIVER
from txl_jax import spot

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


@dataclass
class Laptop:
    """Keys, and a plain SSH client."""

    cloud: LocalCloud
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        for name in ("id", "host"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(words, check=True)
        self.ec2 = self.cloud.client("ec2")
        self.ec2.import_key_pair(KeyName="key", PublicKeyMaterial=self.read("id.pub").encode())

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def start(self, count: int = 1, zone: str = "us-east-1c", **changed: Any) -> list[str]:
        """Ids of new instances."""
        return [i["InstanceId"] for i in self.reply(count, zone, **changed)["Instances"]]

    def reply(self, count: int = 1, zone: str = "us-east-1c", **changed: Any) -> Any:
        subnets = self.ec2.describe_subnets()["Subnets"]
        config = {
            "ssh_keys": {
                "ed25519_private": self.read("host"),
                "ed25519_public": self.read("host.pub"),
            },
            "bootcmd": ["echo again >> /home/ubuntu/every-boot"],
            "runcmd": [["sh", "-c", "echo $HOME > /home/ubuntu/first-boot"]],
        }
        words = {
            "ImageId": IMAGES[UBUNTU].id,
            "InstanceType": "p3dn.24xlarge",
            "MinCount": count,
            "MaxCount": count,
            "KeyName": "key",
            "SubnetId": next(s["SubnetId"] for s in subnets if s["AvailabilityZone"] == zone),
            "UserData": "#cloud-config\n" + yaml.safe_dump(config),
        }
        return self.ec2.run_instances(**(words | changed))

    def ssh(self, instance: str, command: str, public: bool = False) -> Any:
        """What `ssh` says, once sshd answers; the host's key has to be the launch's."""
        found = self.cloud.ec2.instance(instance)
        address = found.public_ip if public else found.private_ip
        known = self.folder / "known_hosts"
        known.write_text(f"{address} {self.read('host.pub')}")
        options = [f"UserKnownHostsFile={known}", "StrictHostKeyChecking=yes", "BatchMode=yes"]
        words = ["ssh", "-i", str(self.folder / "id"), *(f"-o{option}" for option in options)]

        def answer() -> Any:
            done = subprocess.run(
                [*words, f"ubuntu@{address}", command], capture_output=True, text=True
            )
            return None if "Connection refused" in done.stderr else done

        return until(answer, "an answer of sshd")


@pytest.fixture
def laptop(cloud: LocalCloud, tmp_path: Path) -> Laptop:
    return Laptop(cloud, tmp_path / "keys")


def state(laptop: Laptop, instance: str) -> str:
    found = laptop.ec2.describe_instances(InstanceIds=[instance])
    return found["Reservations"][0]["Instances"][0]["State"]["Name"]


def test_hosts_have_their_own_address_home_processes_and_key(laptop: Laptop) -> None:
    first, second = laptop.start(2)
    for instance, other in ((first, second), (second, first)):
        done = laptop.ssh(instance, f"echo {instance} > mine; pwd; cat mine first-boot; ps -e")
        assert done.stdout.startswith(f"/home/ubuntu\n{instance}\n/root\n"), done
        assert done.stdout.count("sshd") < 6, "it sees the processes of others"
        assert (laptop.cloud.home(instance) / "mine").read_text().strip() == instance
        assert other not in done.stdout
    assert laptop.ssh(first, "hostname", public=True).stdout.startswith("ip-127-1-32-4")
    address = laptop.cloud.ec2.instance(second).private_ip
    assert (
        laptop.ssh(first, f"ssh-keyscan -t ed25519 {address}").stdout.split()[-1]
        == (laptop.read("host.pub").split()[1])
    )


def test_another_host_key_is_noticed(laptop: Laptop) -> None:
    laptop.cloud.wrong_key(0)
    assert "Host key verification failed" in laptop.ssh(laptop.start()[0], "true").stderr


def test_ssh_breaks_and_mends(laptop: Laptop) -> None:
    laptop.cloud.break_ssh(0)
    (instance,) = laptop.start()
    until(lambda: (laptop.cloud.home(instance) / "first-boot").exists(), "the end of its start")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((str(laptop.cloud.ec2.instance(instance).private_ip), 22))
    laptop.cloud.mend_ssh(instance)
    assert laptop.ssh(instance, "echo here").stdout == "here\n"


def test_nothing_but_loopback_is_reached(laptop: Laptop) -> None:
    """From the test, from its child processes, and from hosts."""
    reach = "import socket; socket.create_connection(('1.1.1.1', 443), 5)"
    with pytest.raises(OSError) as error:
        socket.create_connection(("1.1.1.1", 443), 5)
    assert error.value.errno == errno.ENETUNREACH
    done = subprocess.run([sys.executable, "-c", reach], capture_output=True, text=True)
    assert "Network is unreachable" in done.stderr
    (instance,) = laptop.start()
    done = laptop.ssh(instance, f"{sys.executable} -c {shlex.quote(reach)}")
    assert "Network is unreachable" in done.stderr


def test_environment_leads_to_no_account(cloud: LocalCloud) -> None:
    leading = {name: value for name, value in cloud.environ.items() if name.startswith("AWS_")}
    assert leading["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
    assert leading["AWS_CONFIG_FILE"] == leading["AWS_SHARED_CREDENTIALS_FILE"] == "/dev/null"
    assert cloud.environ["HOME"].startswith(str(cloud.folder))
    who = cloud.client("sts").get_caller_identity()
    assert who["Arn"].endswith(":user/laptop")


def test_hosts_do_not_change_the_machine(laptop: Laptop) -> None:
    (instance,) = laptop.start()
    before = {path: path.read_bytes() for path in map(Path, ("/etc/passwd", "/etc/hostname"))}
    shutdown = Path("/usr/sbin/shutdown").resolve().read_bytes()[:100]
    done = laptop.ssh(
        instance,
        "set -e; echo x > /etc/txl-cloud-test; rm -rf /usr/share/doc;"
        f"touch /usr/bin/txl-cloud-test {ROOT}/txl-cloud-test;"
        "sudo -n systemctl stop ssh-agent; sudo apt-get install -y x;"
        "sudo /sbin/shutdown -h +60; sudo modprobe nvidia",
    )
    assert done.returncode == 0, done
    assert not any(
        Path(folder, "txl-cloud-test").exists() for folder in ("/etc", "/usr/bin", str(ROOT))
    )
    assert Path("/usr/share/doc").exists()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Path("/usr/sbin/shutdown").resolve().read_bytes()[:100] == shutdown
    assert laptop.cloud.recorded(instance, "shutdown") == [["shutdown", "-h", "+60"]]
    assert laptop.cloud.recorded(instance, "apt-get") == [["apt-get", "install", "-y", "x"]]


def test_hosts_see_no_devices_and_settings_of_the_machine(laptop: Laptop) -> None:
    (instance,) = laptop.start()
    own = {"fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout"}
    done = laptop.ssh(instance, "ls /dev; echo x >/dev/null; head -c 1 /dev/urandom | wc -c")
    assert set(done.stdout.split()) == own | {"tty", "urandom", "zero", "1"}, done
    done = laptop.ssh(instance, "sudo sh -c 'echo h >/proc/sysrq-trigger'")
    assert done.returncode != 0
    name = Path("/proc/sys/kernel/pid_max")
    done = laptop.ssh(instance, f"sudo sh -c 'cat {name} >{name}'")
    assert "Read-only file system" in done.stderr
    done = laptop.ssh(instance, "sudo mknod /tmp/a b 7 0; sudo date -s @1700000000")
    assert done.stderr.count("Operation not permitted") == 2, done
    assert time.time() > 1_750_000_000


def test_a_service_runs_or_not(laptop: Laptop) -> None:
    (instance,) = laptop.start()
    done = laptop.ssh(
        instance,
        "cloud-init status --wait; systemctl is-active a; echo $?;"
        "sudo systemd-run --unit=a sleep 600; systemctl is-active a; echo $?;"
        "sudo systemctl stop a; while systemctl is-active a; do sleep 0.1; done; echo gone",
    )
    assert done.stdout == "status: done\n3\n0\ngone\n", done


def test_root_is_asked_for(laptop: Laptop) -> None:
    (instance,) = laptop.start()
    assert "are you root?" in laptop.ssh(instance, "apt-get update").stderr
    assert laptop.ssh(instance, "sudo -n apt-get update").returncode == 0


def test_gpus_are_those_of_the_type_once_there_is_a_driver(laptop: Laptop) -> None:
    (bare,) = laptop.start()
    (ready,) = laptop.start(InstanceType="p4d.24xlarge", ImageId=IMAGES[WITH_DRIVER].id)
    assert laptop.ssh(bare, "nvidia-smi -L").returncode == 127
    done = laptop.ssh(bare, "sudo apt-get install -y nvidia-driver-580-server && nvidia-smi -L")
    assert len(done.stdout.splitlines()) == 8
    query = "nvidia-smi --query-gpu=compute_cap,driver_version,name --format=csv,noheader"
    assert laptop.ssh(ready, query).stdout.splitlines() == ["8.0, 580.95.05, NVIDIA A100"] * 8


def test_a_host_that_shuts_down_stops_or_ends_as_its_request_said(laptop: Laptop) -> None:
    stopped, ended = laptop.start()[0], laptop.start(InstanceInitiatedShutdownBehavior="terminate")
    for instance in (stopped, *ended):
        laptop.ssh(instance, "touch kept /etc/kept; sudo shutdown -h +1 'because of $(this)'")
        assert state(laptop, instance) == "running"
        laptop.cloud.pass_minutes(1)
        until(lambda i=instance: state(laptop, i) != "running", "the scheduled shutdown")
    assert state(laptop, stopped) == "stopped"
    assert state(laptop, ended[0]) == "terminated"
    address = laptop.cloud.ec2.instance(stopped).public_ip
    laptop.ec2.start_instances(InstanceIds=[stopped])
    done = laptop.ssh(stopped, "ls kept /etc/kept; cat first-boot every-boot")
    assert done.stdout == "/etc/kept\nkept\n/root\nagain\nagain\n", done
    assert laptop.cloud.ec2.instance(stopped).public_ip != address


def test_a_shutdown_can_be_taken_back(laptop: Laptop) -> None:
    (instance,) = laptop.start()
    laptop.ssh(instance, "sudo shutdown -h +1; sudo shutdown -c; sudo shutdown -h +1000")
    laptop.cloud.pass_minutes(10)
    assert laptop.ssh(instance, "echo here").stdout == "here\n"
    assert state(laptop, instance) == "running"


def test_the_same_token_starts_nothing_again(laptop: Laptop) -> None:
    first = laptop.start(2, ClientToken="token")
    assert laptop.start(2, ClientToken="token") == first
    assert len(laptop.cloud.instances()) == 2
    with pytest.raises(ClientError, match="IdempotentParameterMismatch"):
        laptop.start(3, ClientToken="token")
    assert laptop.start(2, ClientToken="other") != first


def test_faults(laptop: Laptop) -> None:
    laptop.cloud.full("us-east-1c")
    with pytest.raises(ClientError, match="InsufficientInstanceCapacity"):
        laptop.start()
    with pytest.raises(ClientError, match="Unsupported"):
        laptop.start(zone="us-east-1a")
    assert laptop.start(zone="us-east-1d")
    laptop.cloud.refuse("ec2:RunInstances", "VcpuLimitExceeded", times=1)
    with pytest.raises(ClientError, match="VcpuLimitExceeded"):
        laptop.start(zone="us-east-1d")
    laptop.cloud.clear()
    spot_options = {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.01"}}
    with pytest.raises(ClientError, match="SpotMaxPriceTooLow"):
        laptop.start(InstanceMarketOptions=spot_options)
    with pytest.raises(ClientError, match="16384"):
        laptop.start(UserData="#!/bin/sh\n" + "#" * 20000)
    with pytest.raises(ClientError, match="Placement Group 'none' is unknown"):
        laptop.start(Placement={"GroupName": "none"})
    assert len(laptop.cloud.instances()) == 1


def test_spot_hosts_get_notice_and_are_taken_back(
    laptop: Laptop, monkeypatch: pytest.MonkeyPatch
) -> None:
    (instance,) = laptop.start(InstanceMarketOptions={"MarketType": "spot"})
    environ = laptop.ssh(instance, "env").stdout.splitlines()
    endpoint = next(line for line in environ if line.startswith(spot.ENDPOINT))
    monkeypatch.setenv(*endpoint.split("=", 1))
    assert spot.Notices().notice() is None
    laptop.cloud.interrupt(instance, seconds=2)
    notice = spot.Notices().notice()
    assert notice is not None
    assert notice.startswith("terminate at 20")
    until(lambda: state(laptop, instance) == "terminated", "the end of a spot host")
    until(lambda: instance not in laptop.cloud.machines.running(), "the end of its processes")


def test_prices_images_and_placement_groups(laptop: Laptop) -> None:
    history = laptop.ec2.describe_spot_price_history(
        InstanceTypes=["p3dn.24xlarge"], ProductDescriptions=["Linux/UNIX"]
    )["SpotPriceHistory"]
    assert [h["AvailabilityZone"] for h in history] == ["us-east-1c", "us-east-1d"]
    assert float(history[0]["SpotPrice"]) < float(history[1]["SpotPrice"]) < 31
    image = laptop.cloud.client("ssm").get_parameter(Name=UBUNTU)["Parameter"]["Value"]
    assert laptop.ec2.describe_images(ImageIds=[image])["Images"][0]["Name"].startswith("ubuntu/")
    laptop.ec2.create_placement_group(
        GroupName="group",
        Strategy="cluster",
        TagSpecifications=[
            {"ResourceType": "placement-group", "Tags": [{"Key": "made", "Value": "here"}]}
        ],
    )
    found = laptop.ec2.describe_placement_groups(
        Filters=[{"Name": "tag:made", "Values": ["here"]}]
    )["PlacementGroups"]
    assert [group["GroupName"] for group in found] == ["group"]
    laptop.start(Placement={"GroupName": "group"})
    with pytest.raises(ClientError, match="InUse"):
        laptop.ec2.delete_placement_group(GroupName="group")


def test_hosts_sign_as_their_role(laptop: Laptop) -> None:
    iam = laptop.cloud.client("iam")
    iam.create_role(RoleName="role", AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName="profile")
    iam.add_role_to_instance_profile(InstanceProfileName="profile", RoleName="role")
    instances = laptop.start(2, IamInstanceProfile={"Name": "profile"})
    ask = "import boto3; print(boto3.client('sts', 'us-east-1').get_caller_identity()['Arn'])"
    for instance in instances:
        done = laptop.ssh(instance, f"{sys.executable} -c {shlex.quote(ask)}")
        assert done.stdout.strip().endswith(f":assumed-role/role/{instance}"), done


def processes(folder: Path) -> list[psutil.Process]:
    """Those that were started for hosts in `folder`, and all below them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return found


def test_nothing_runs_afterwards(tmp_path: Path) -> None:
    with LocalCloud(tmp_path / "cloud") as cloud:
        laptop = Laptop(cloud, tmp_path / "keys")
        (instance,) = laptop.start()
        laptop.ssh(instance, "tmux new-session -d 'trap \"\" TERM HUP; sleep 1000'; sleep 1")
        before = processes(tmp_path / "cloud")
        assert any(process.name() == "sleep" for process in before)
    assert not [process for process in before if process.is_running()]
    with socket.socket() as outside:
        outside.setblocking(False)
        assert outside.connect_ex(("127.0.0.1", 9)) != errno.ENETUNREACH


_CLOUD_OF_ITS_OWN = """
import sys, time
from pathlib import Path
from tests.cloud.cloud import LocalCloud
from tests.cloud.test_cloud import Laptop
folder = Path(sys.argv[1])
with LocalCloud(folder / "cloud") as cloud:
    laptop = Laptop(cloud, folder / "keys")
    instance, = laptop.start()
    laptop.ssh(instance, "tmux new-session -d 'trap \\"\\" TERM HUP; sleep 1000'; sleep 1")
    print("ready", flush=True)
    time.sleep(1000)
"""


def test_nothing_runs_after_the_cloud_was_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", _CLOUD_OF_ITS_OWN, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, text=True) as cloud:
        assert cloud.stdout is not None
        assert cloud.stdout.readline() == "ready\n"
        before = processes(tmp_path)
        assert any(process.name() == "sleep" for process in before)
        cloud.send_signal(signal.SIGKILL)
    until(lambda: not any(process.is_running() for process in before), "the end of all processes")
