"""The launch record: written before anything is started, and read with suspicion."""

import dataclasses
import json
from datetime import UTC, datetime

import pytest

from launcher import objects, record
from launcher.aws import Account
from launcher.record import Record
from launcher.request import LaunchCommand, parse
from tests.cloud.cloud import LocalCloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.cloud.fixtures"]

BUCKET = "txl-123456789012-us-east-1"


def command(*words: str) -> LaunchCommand:
    return parse(["--config=eight_machines", *words]).command


def some_record(words: LaunchCommand) -> Record:
    return Record(
        launch="0123456789abcdef",
        owner="arn:aws:iam::123456789012:user/ada",
        started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        config=words.experiment,
        words=("--config=eight_machines", "--text-dir", "a '$(b)'\n"),
        options=record.options(words),
        zones=("us-east-1c", "us-east-1a"),
        source="00ff" * 16,
        corpus="",
        revision="abc-dirty",
    )


@pytest.fixture
def account(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Account:
    for name, value in cloud.environ.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    account = Account.open()
    account.client("s3").create_bucket(Bucket=BUCKET)
    return account


def test_it_is_read_as_it_was_written(account):
    assert record.read(account, BUCKET, "a") == (None, "")
    assert record.read(account, "no-such-bucket", "a") == (None, "")
    written = some_record(command("--max-price=3", "--cutoffs", "--d-embed=8"))
    record.write(account, BUCKET, "a", written, replaces="")
    found, version = record.read(account, BUCKET, "a")
    assert found == written and version


@pytest.mark.parametrize("wish", [record.TRAIN, record.STOP, record.END])
def test_what_a_person_asks_of_a_run_is_kept(wish, account):
    written = dataclasses.replace(some_record(command()), wish=wish)
    record.write(account, BUCKET, "a", written, replaces="")
    assert record.read(account, BUCKET, "a")[0] == written
    assert record.differences(written, command()) == []


def test_a_run_of_which_nothing_was_asked_yet_trains(account):
    """Its record is older than wishes."""
    record.write(account, BUCKET, "a", some_record(command()), replaces="")
    content = objects.read_json(account, BUCKET, record.key("a"))
    assert content.pop("wish") == record.TRAIN
    objects.write_json(account, BUCKET, record.key("a"), content)
    found, _ = record.read(account, BUCKET, "a")
    assert found == dataclasses.replace(some_record(command()), wish=record.TRAIN)


def test_of_two_launches_at_the_same_moment_one_is_refused(account):
    written = some_record(command())
    _, before = record.read(account, BUCKET, "a")
    record.write(account, BUCKET, "a", written, before)
    with pytest.raises(record.Taken, match="launched by another command at this moment"):
        record.write(account, BUCKET, "a", dataclasses.replace(written, launch="f" * 16), before)
    found, version = record.read(account, BUCKET, "a")
    assert found == written
    record.write(account, BUCKET, "a", dataclasses.replace(written, launch="f" * 16), version)
    with pytest.raises(UserError, match="at this moment"):
        record.write(account, BUCKET, "a", written, version)


def test_what_is_no_record_counts_as_none_and_can_be_replaced(account):
    written = some_record(command())
    record.write(account, BUCKET, "a", written, replaces="")
    content = objects.read_json(account, BUCKET, record.key("a"))
    changes = [
        *({name: None} for name in content),
        *({name: 5} for name in content),
        {"words": ["a", 5]},
        {"zones": "us-east-1a"},
        {"zones": ["us-east-1a\n"]},
        {"launch": "$(a)"},
        {"source": "x; touch pwned"},
        {"source": "00ff" * 16 + "\n"},
        {"source": "../" + "0" * 61},
        {"started": "yesterday"},
        {"options": content["options"] | {"max_hours": "a"}},
        {"options": {}},
        {"config": content["config"] | {"more": 1}},
        *({"wish": value} for value in ("", "Train", "train\n", "kill", ["end"])),
    ]
    damaged = [json.dumps(content | change).encode() for change in changes]
    for text in (*damaged, b"", b"[]", b"{", b"\xff", b"[" * 99_999):
        objects.write(account, BUCKET, record.key("a"), text)
        found, version = record.read(account, BUCKET, "a")
        assert found is None, text[:200]
        assert version or not text
    record.write(account, BUCKET, "a", written, version)
    assert record.read(account, BUCKET, "a")[0] == written


@pytest.mark.parametrize(
    ("words", "differ"),
    [
        ((), []),
        (("--name=b", "--yes", "--json", "--private-ip", "--ssh-cidr=192.0.2.0/24"), []),
        (("--checkpoint-minutes=9", "--data-dir=a"), []),
        (("--lr=1",), ["optim.lr: 6.25e-05 there, 1.0 here"]),
        (("--batch=64",), ["train.batch: 6144 there, 64 here"]),
        (("--machines=2",), ["cluster.machines: 8 there, 2 here"]),
        (("--instance-type=a",), ["cluster.instance_type: 'p3dn.24xlarge' there, 'a' here"]),
        (("--zero=1",), ["cluster.zero: 0 there, 1 here"]),
        (("--nospot",), ["nospot: False there, True here"]),
        (("--keep", "--zone=a"), ["zone: '' there, 'a' here", "keep: False there, True here"]),
        (("--text-dir=\x1b[",), ["data.text_dir: '' there, '\\x1b[' here"]),
    ],
)
def test_it_tells_by_what_a_command_differs(words, differ):
    assert record.differences(some_record(command()), command(*words)) == differ
