"""Objects by their versions, and the store's clock."""

from datetime import UTC, datetime, timedelta

import pytest

from launcher import objects
from launcher.objects import Changed
from tests.launcher.looks import BUCKET
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]


@pytest.fixture(autouse=True)
def bucket(aws) -> None:
    aws.client("s3").create_bucket(Bucket=BUCKET)


def test_a_write_tells_the_version_that_a_read_tells(account):
    first = objects.write(account, BUCKET, "a", b"1")
    assert objects.read_version(account, BUCKET, "a") == (b"1", first)
    second = objects.write_json(account, BUCKET, "a", {"b": 2}, replaces=first)
    assert objects.read_version(account, BUCKET, "a")[1] == second != first
    assert objects.read_json(account, BUCKET, "a") == {"b": 2}


def test_only_the_version_that_is_there_is_replaced(account):
    first = objects.write(account, BUCKET, "a", b"1", replaces="")
    second = objects.write(account, BUCKET, "a", b"2", replaces=first)
    for version in ("", first, '"0"'):
        with pytest.raises(Changed, match=rf"s3://{BUCKET}/a was written by another"):
            objects.write(account, BUCKET, "a", b"3", replaces=version)
    assert objects.read_version(account, BUCKET, "a") == (b"2", second)
    assert objects.write(account, BUCKET, "a", b"3") not in (first, second)


def test_the_clock_is_that_by_which_objects_are_written(account):
    before = objects.clock(account, BUCKET)
    objects.write(account, BUCKET, "a", b"1")
    (written,) = objects.written(account, BUCKET, "a").values()
    after = objects.clock(account, BUCKET)
    second = timedelta(seconds=1)
    assert before - second <= written <= after + second
    assert before.utcoffset() == timedelta()


def test_the_clock_is_not_this_machines(account):
    events = account.client("s3").meta.events
    told = "Fri, 02 Jan 2026 12:00:00 GMT"

    def answer(parsed: dict, **_: object) -> None:
        parsed["ResponseMetadata"]["HTTPHeaders"]["date"] = told

    events.register("after-call.s3.HeadBucket", answer, unique_id="clock")
    try:
        found = objects.clock(account, BUCKET)
    finally:
        events.unregister("after-call.s3.HeadBucket", unique_id="clock")
    assert found == datetime(2026, 1, 2, 12, tzinfo=UTC)


def test_of_no_bucket_there_is_no_clock(account):
    with pytest.raises(UserError):
        objects.clock(account, "no-such-bucket")
