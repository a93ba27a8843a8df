"""What a run tells of itself in S3, which anybody with the bucket could have written."""

import json
from typing import Any

import pytest

from launcher import objects, speed, status
from launcher.aws import Account
from launcher.status import Status
from tests.launcher.cloud import ACCOUNT

pytest_plugins = ["tests.launcher.fixtures"]

BUCKET = f"txl-{ACCOUNT}-us-east-1"
HUGE = 10**400
"""JSON's integers may be larger than any float."""


@pytest.fixture(autouse=True)
def bucket(account: Account) -> None:
    account.client("s3").create_bucket(Bucket=BUCKET)


def put(account: Account, name: str, content: Any) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    objects.write(account, BUCKET, f"runs/a/{name}", body)


def test_a_run_that_has_not_told_yet_has_no_status(account):
    assert status.read(account, BUCKET, "a") == Status()
    assert status.read(account, "no-such-bucket", "a") == Status()


def test_heartbeats_tell_and_what_they_lack_is_in_the_metrics(account):
    put(account, "heartbeats/0.json", {"step": 7, "loss": 3.5, "tokens_per_s": 100.0})
    put(account, "heartbeats/1.json", {"step": 9})
    told = status.read(account, BUCKET, "a")
    assert (told.step, told.loss, told.tokens_per_s, told.finished) == (7, 3.5, 100.0, False)
    assert told.seen is not None
    put(account, "heartbeats/0.json", {"step": 8})
    put(account, "metrics.jsonl", b'{"learning/loss": 3.0}\n{"times/tokens_per_sec": 50}\n')
    put(account, "results.json", {})
    told = status.read(account, BUCKET, "a")
    assert (told.step, told.loss, told.tokens_per_s, told.finished) == (8, 3.0, 50.0, True)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(HUGE, id="huge"),
        pytest.param(-HUGE, id="minus huge"),
        *(float("nan"), float("inf"), "5", [5], True, None),
    ],
)
def test_what_is_no_number_counts_as_absent(value, account):
    put(account, "heartbeats/0.json", {"step": value, "loss": value, "tokens_per_s": value})
    told = status.read(account, BUCKET, "a")
    assert (told.step, told.loss, told.tokens_per_s) == (None, None, None)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 99_999, b"5"])
def test_what_is_no_sign_of_life_counts_as_absent(content, account):
    put(account, "heartbeats/0.json", content)
    put(account, "metrics.jsonl", content)
    assert status.read(account, BUCKET, "a").step is None


def test_a_speed_that_is_no_number_counts_as_absent(account):
    lines = [b"[" * 9_999, json.dumps({"times/tokens_per_sec": HUGE}).encode()]
    put(account, "metrics.jsonl", b"\n".join([*lines, b'{"times/tokens_per_sec": 5}']))
    assert list(speed._told(account, BUCKET, "a", throughput=False)) == [5.0]
