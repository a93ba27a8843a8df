"""What a launch's command line asks for, and what of it the trainer gets to see."""

import dataclasses
import shlex
import subprocess
import sys

import pytest

from launcher.request import LaunchCommand, parse
from tests import tiny
from txl_jax import config
from txl_jax.config import Command, TrainCommand
from txl_jax.errors import UserError

OWN = [
    field.name
    for field in dataclasses.fields(LaunchCommand)
    if field.name not in {field.name for field in dataclasses.fields(Command)}
]


@pytest.mark.parametrize(
    ("typed", "passed_on"),
    [
        ("", ""),
        ("--config eight_machines --lr=0.1", "--config eight_machines --lr=0.1"),
        ("--name a --config=one_gpu", "--config=one_gpu"),
        ("--machines 2 --yes --instance-type c7i.large", "--machines 2 --instance-type c7i.large"),
        ("--cutoffs 1 2 3 --max-hours 3 --batch 8", "--cutoffs 1 2 3 --batch 8"),
        ("--max_hours=3 --no-keep --no_dry_run --ssh_cidr 192.0.2.0/24", ""),
        ("--same-length --no-tie-weight --nospot", "--same-length --no-tie-weight"),
        ("--text-dir='a b' --dataset text --region x", "--text-dir='a b' --dataset text"),
        ("--zone=a --text-dir=--nospot", "--text-dir=--nospot"),
    ],
)
def test_the_trainer_gets_the_words_as_typed_without_the_launchers(typed, passed_on):
    request = parse(shlex.split(typed))
    assert request.trainer_words == tuple(shlex.split(passed_on))
    train = config.parse("train", list(request.trainer_words), TrainCommand)
    assert train.experiment == request.command.experiment
    assert train.config == request.command.config


@pytest.mark.parametrize("name", OWN)
def test_every_option_of_its_own_is_left_out(name):
    value = {"max_price": "1.5", "max_hours": "2"}.get(name, "x")
    dashed, flag = name.replace("_", "-"), LaunchCommand.__dataclass_fields__[name].type is bool
    words = [f"--{dashed}", f"--no-{name}"] if flag else [f"--{name}={value}", f"--{dashed}", value]
    assert parse([*words, "--lr", "0.5"]).trainer_words == ("--lr", "0.5")
    with pytest.raises(UserError, match=f"unknown option --{name}"):
        config.parse("train", [f"--{name}=1"], TrainCommand)


def test_a_run_is_named_after_its_config_unless_it_has_a_name():
    assert parse(["--config=eight_machines"]).command.name == "eight-machines"
    assert parse(["--config=eight_machines", "--name=a-1"]).command.name == "a-1"


@pytest.mark.parametrize(
    ("words", "spot"),
    [("", True), ("--nospot", False), ("--reservation=cr-1", False), ("--capacity-block=c", False)],
)
def test_what_is_reserved_is_never_spot(words, spot):
    assert parse(words.split()).command.spot is spot


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--config eigth_machines", r"no config 'eigth_machines' \(did you mean eight_machines\?"),
        ("--batc 3", r"unknown option --batc \(did you mean --batch\?\)"),
        ("--max-h 3", r"unknown option --max-h \(did you mean --max-hours\?\)"),
        ("--supervise", "unknown option --supervise"),
        ("--coordinator a:1", "unknown option --coordinator"),
        ("--local", "--local trains on this machine: python -m txl_jax.train --local"),
        ("--machines 0", "machines is 0; it has to be at least 1"),
        ("--machines=-1", "machines is -1; it has to be at least 1"),
        ("--max-hours 0", r"max_hours is 0\.0; it has to be above 0"),
        ("--max-hours nan", "max_hours is nan"),
        ("--max-hours inf", "max_hours is inf"),
        ("--max-price 0", r"max_price is 0\.0; it has to be above 0"),
        ("--max-price=nan", "max_price is nan"),
        ("--max-price 3 --nospot", "--max-price is the highest price of spot hosts"),
        ("--reservation a --capacity-block b", "hosts start in one of them"),
        ("--zone a --subnet b", "leave --zone out"),
        ("--logdir runs/a", "--logdir: a launched run is kept in s3://BUCKET/runs/NAME"),
        ("--hosts a,b --region x --nospot", "leave out --region, --nospot"),
        ("--hosts=a --max_hours=3", "leave out --max-hours"),
        ("--hosts a --machines 1", "leave out --machines"),
        ("--name A", "'A' cannot be the name of a run"),
        ("--name a'$(b)'", "cannot be the name of a run"),
        ("--name=-a", "cannot be the name of a run"),
        (f"--name {'a' * 41}", "cannot be the name of a run"),
    ],
)
def test_what_cannot_be_is_one_line(words, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        parse(words.split())
    assert "\n" not in str(raised.value)


def test_a_name_with_a_newline_is_one_line():
    with pytest.raises(UserError) as raised:
        parse(["--name", "a\n\x1b[31m"])
    assert str(raised.value).isprintable()


def test_what_to_type_next_has_the_region_if_it_was_typed():
    assert parse(["--name=a"]).command.follow_up("kill") == "python -m launcher kill a"
    command = parse(["--name=a", "--region=eu-west-1"]).command
    assert command.follow_up("logs", "-f") == "python -m launcher logs a -f --region eu-west-1"


def test_hosts_may_have_a_folder_for_the_run():
    request = parse(["--hosts", "a", "--logdir", "/shared/a"])
    assert request.command.experiment.train.logdir == "/shared/a"
    assert request.trainer_words == ()


def test_it_is_parsed_without_anything_heavy():
    script = (
        "import sys, launcher.request as r\n"
        "r.parse(['--config', 'eight_machines', '--name', 'a'])\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tiny.ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "tensorstore", "boto3", "fabric"}
    assert heavy & set(done.stdout.split()) == set()
