"""What EC2 is asked for is the same, whether a launch asks or a watcher."""

import dataclasses

import pytest

from launcher import again, names, record
from launcher.bootstrap import HostKey
from launcher.ec2 import Order
from launcher.hardware import Image, InstanceType
from launcher.order import order_of
from launcher.record import Record
from launcher.request import LaunchCommand, Request, parse
from launcher.standing import Standing
from tests.launcher.looks import BUCKET, LAUNCH, NAME, NOW

pytest_plugins = ["tests.launcher.fixtures"]

KIND = InstanceType(
    name="c7i.large",
    gpus=0,
    gpu_name="",
    gpu_memory_gib=0.0,
    memory_gib=4.0,
    vcpus=2,
    efa_interfaces=0,
    network_cards=1,
    network_gbps=12.5,
    architecture="x86_64",
    zones=("us-east-1a", "us-east-1b"),
    efa_cards=(),
)
IMAGE = Image("ami-1", "ubuntu", "admin", "/dev/sda1", needs_driver=False)
PRICES = {"us-east-1a": 0.5, "us-east-1b": 0.25}
WORDS = ("--config=quickstart", "--machines=2", "--instance-type=c7i.large", "--lr=0.001")


@pytest.fixture
def made(tmp_path) -> Standing:
    path = tmp_path / "key"
    path.write_bytes(b"private half")
    return Standing(
        bucket=BUCKET,
        key_name="txl-moto",
        key_path=path,
        security_group="sg-1",
        profile="txl-host",
        subnets={"us-east-1a": "subnet-a", "us-east-1b": "subnet-b"},
        placement_groups={},
    )


def written(request: Request) -> Record:
    """The record that a launch of this request writes."""
    return Record(
        launch=LAUNCH,
        owner="arn:aws:iam::1:user/ada",
        started=NOW,
        config=request.command.experiment,
        words=request.trainer_words,
        options=record.options(request.command),
        zones=("us-east-1b", "us-east-1a"),
        source="5" * 64,
        corpus="",
        revision="",
    )


def order(command: LaunchCommand, known: Record, made: Standing, again: bool = False) -> Order:
    return order_of(command, known, KIND, IMAGE, PRICES, made, again)


def request(*words: str) -> Request:
    return parse([*WORDS, f"--name={NAME}", *words])


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--nospot",),
        ("--max-price=0.75", "--max-hours=3"),
        ("--keep",),
        ("--reservation=cr-1",),
        ("--capacity-block=cr-1",),
        ("--zone=us-east-1a", "--image=ami-7"),
        ("--subnet=subnet-a",),
        ("--seed=5", "--zero=1"),
    ],
)
def test_a_watcher_asks_for_what_the_launch_asked_for(words, account, made):
    asked = request(*words)
    known = written(asked)
    command = again.command_of(account, BUCKET, NAME, known, private_ip=False)
    assert order(command, known, made) == order(asked.command, known, made)


@pytest.mark.parametrize("private_ip", [False, True])
def test_how_hosts_are_reached_is_said_anew(private_ip, account, made):
    """A watcher may be elsewhere."""
    known = written(request("--private-ip"))
    command = again.command_of(account, BUCKET, NAME, known, private_ip)
    assert order(command, known, made).private_ip == private_ip


def test_the_command_is_that_of_the_record(account):
    asked = request("--nospot", "--max-hours=3", "--subnet=subnet-a", "--ssh-cidr=10.0.0.0/8")
    command = again.command_of(account, BUCKET, NAME, written(asked), private_ip=True)
    assert command.experiment == asked.command.experiment
    assert command.experiment.optim.lr == 0.001
    assert (command.config, command.name, command.bucket) == ("quickstart", NAME, BUCKET)
    assert (command.region, command.private_ip) == (account.region, True)
    assert record.options(command) == record.options(asked.command)
    assert command.nospot and command.max_hours == 3.0


def test_the_order_is_what_the_launch_is(made):
    asked = request("--max-price=0.75", "--max-hours=3")
    known = written(asked)
    found = order(asked.command, known, made)
    assert (found.name, found.launch, found.count) == (NAME, LAUNCH, 2)
    assert (found.zones, found.prices) == (known.zones, PRICES)
    assert (found.spot, found.max_price, found.again) == (True, 0.75, False)
    assert (found.number, found.round, found.wanted) == (None, 0, 2)
    host_key = HostKey.of(b"private half", LAUNCH)
    assert found.tags == {
        names.TAG_CONFIG: "quickstart",
        names.TAG_LOGDIR: f"s3://{BUCKET}/runs/{NAME}",
        names.TAG_HOST_KEY: host_key.public,
        names.TAG_STARTED: "2026-01-02T12:00:00+00:00",
    }
    assert order(asked.command, known, made, again=True) == dataclasses.replace(found, again=True)


def test_one_host_is_one_whatever_the_run_has(made):
    found = order(request().command, written(request()), made)
    assert dataclasses.replace(found, number=0).wanted == 1
    assert dataclasses.replace(found, number=1).wanted == 1


def test_every_launch_has_a_host_key_of_its_own(made):
    asked = request()
    first = order(asked.command, written(asked), made)
    other = dataclasses.replace(written(asked), launch="f" * 16)
    second = order(asked.command, other, made)
    assert first.tags[names.TAG_HOST_KEY] != second.tags[names.TAG_HOST_KEY]
    assert first.user_data != second.user_data


def test_hosts_know_when_to_end(made):
    told = set()
    for words in ((), ("--max-hours=3",), ("--keep",)):
        asked = request(*words)
        told.add(order(asked.command, written(asked), made).user_data)
    assert len(told) == 3
