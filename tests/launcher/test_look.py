"""A look at a run, of what EC2 and S3 tell; and what it shows."""

import dataclasses
from datetime import timedelta
from typing import Any

import pytest
from moto.core.responses import ActionResult
from moto.ec2.responses import EC2Response

from launcher import names, objects, record
from launcher.aws import Account
from launcher.look import look
from tests.launcher.cloud import Cloud
from tests.launcher.looks import BUCKET, LAUNCH, NAME, NOW, host, lost, some_record
from tests.launcher.looks import look as made
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]


@pytest.fixture(autouse=True)
def bucket(aws: Cloud, account: Account) -> None:
    aws.client("s3").create_bucket(Bucket=BUCKET)
    known = dataclasses.replace(some_record(), owner=account.caller)
    record.write(account, BUCKET, NAME, known, "")


def rent(aws: Cloud, owner: str, launch: str = LAUNCH, name: str = NAME, count: int = 2) -> Any:
    """Starts hosts of a run, as another program could; moto's own objects of them."""
    before = {instance.id for instance in aws.instances()}
    tags = {
        names.TAG_MADE_BY: names.MADE_BY,
        names.TAG_RUN: name,
        names.TAG_LAUNCH: launch,
        names.TAG_OWNER: owner,
        names.TAG_PRICE: "9.5",
        names.TAG_LOGDIR: f"s3://{BUCKET}/runs/{name}",
    }
    aws.client("ec2").run_instances(
        ImageId="ami-1",
        MinCount=count,
        MaxCount=count,
        TagSpecifications=[
            {
                "ResourceType": "instance",
                "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
            }
        ],
    )
    return [instance for instance in aws.instances() if instance.id not in before]


def ids(found: Any) -> set[str]:
    return {each.instance_id for each in found}


def test_it_tells_of_hosts_record_and_trainers(aws, account):
    instances = rent(aws, account.caller)
    objects.write_json(account, BUCKET, f"runs/{NAME}/heartbeats/0.json", {"step": 7})
    seen = look(account, BUCKET, NAME)
    known, version = record.read(account, BUCKET, NAME)
    assert (seen.record, seen.version) == (known, version) and version
    assert ids(seen.alive) == {instance.id for instance in instances}
    assert (seen.status.step, seen.machines, seen.missing) == (7, 2, ())
    assert seen.impaired == frozenset()
    assert seen.status.seen and timedelta() <= seen.silence < timedelta(minutes=5)


def test_without_hosts_or_signs_it_tells_so(account):
    seen = look(account, BUCKET, NAME)
    assert (seen.run, seen.alive, seen.missing) == (None, (), (0, 1))
    assert seen.silence == timedelta()


def test_gone_hosts_are_seen_with_their_reasons(aws, account):
    gone, there = rent(aws, account.caller)
    gone.terminate()
    gone.state_reason.code = "Server.SpotInstanceTermination"
    seen = look(account, BUCKET, NAME)
    (found,) = seen.of_state("terminated")
    assert (found.instance_id, found.reason_code) == (gone.id, "Server.SpotInstanceTermination")
    assert seen.missing == (found.index,)
    assert ids(seen.alive) == {there.id}


def test_hosts_of_other_launches_are_not_ours(aws, account):
    rent(aws, account.caller, launch="f" * 16)
    rent(aws, account.caller, name="other")
    assert look(account, BUCKET, NAME).run is None
    ours = rent(aws, account.caller)
    assert ids(look(account, BUCKET, NAME).alive) == {instance.id for instance in ours}


@pytest.mark.parametrize("content", [None, b"{", b"{}"])
def test_without_a_record_nothing_can_be_done(content, aws, account):
    rent(aws, account.caller)
    if content is None:
        aws.client("s3").delete_object(Bucket=BUCKET, Key=record.key(NAME))
    else:
        objects.write(account, BUCKET, record.key(NAME), content)
    complaint = rf"trial was launched with is not known .* s3://{BUCKET}/launches/trial\.json is"
    with pytest.raises(UserError, match=complaint):
        look(account, BUCKET, NAME)


def test_when_ec2_does_not_answer_there_is_no_look(aws, account):
    aws.refuse("DescribeInstanceStatus", "UnauthorizedOperation")
    with pytest.raises(UserError, match="AWS denies"):
        look(account, BUCKET, NAME)


@pytest.mark.parametrize("failing", ["InstanceStatus", "SystemStatus"])
def test_hosts_that_fail_a_check_of_either_kind_are_known(failing, aws, account, monkeypatch):
    """moto's hosts are well always, and it tells of all whatever is asked."""
    instances = rent(aws, account.caller)
    asked: list[Any] = []

    def answer(response: EC2Response) -> ActionResult:
        asked.append(response._filters_from_querystring())
        well = {"InstanceStatus": {"Status": "ok"}, "SystemStatus": {"Status": "ok"}}
        told = [{"InstanceId": instance.id, **well} for instance in instances]
        told[1] |= {failing: {"Status": "impaired"}}
        return ActionResult({"InstanceStatuses": told})

    monkeypatch.setattr(EC2Response, "describe_instance_status", answer)
    assert look(account, BUCKET, NAME).impaired == {instances[1].id}
    assert asked == [
        {"instance-status.status": ["impaired"]},
        {"system-status.status": ["impaired"]},
    ]


def test_the_time_is_that_of_the_store(account, monkeypatch):
    """This machine's clock may be wrong."""
    at = look(account, BUCKET, NAME).now
    assert at.utcoffset() == timedelta() and at.microsecond == 0
    monkeypatch.setattr(objects, "clock", lambda *_: NOW)
    assert look(account, BUCKET, NAME).now == NOW


def test_of_two_hosts_of_a_number_the_one_that_stands_counts():
    new = host(1, generation=1, launched=NOW - timedelta(hours=3))
    seen = made(host(0), lost(1), new)
    assert seen.of_state("terminated") == ()
    assert (seen.alive, seen.missing) == ((host(0), new), ())
    twice = made(host(0), host(1), host(1, generation=1, launched=NOW))
    assert twice.alive == (host(0), host(1, generation=1, launched=NOW))


@pytest.mark.parametrize(
    ("state", "alive", "standing", "missing"),
    [
        ("pending", True, True, False),
        ("running", True, True, False),
        ("stopping", False, True, False),
        ("stopped", False, True, False),
        ("shutting-down", False, False, True),
        ("terminated", False, False, True),
    ],
)
def test_what_hosts_are_by_their_state(state, alive, standing, missing):
    seen = made(host(0), host(1, state))
    assert (len(seen.alive) == 2) == alive
    assert (len(seen.standing) == 2) == standing
    assert seen.missing == ((1,) if missing else ())


def test_hosts_beyond_those_that_the_run_trains_on_are_no_reason_to_rent():
    assert made(host(0), host(1), host(2)).missing == ()
    assert made(host(5)).missing == (0, 1)


def test_silence_is_since_the_last_sign_or_the_last_start():
    minutes = timedelta(minutes=1)
    assert made(host(0), host(1), silent=3 * minutes).silence == 3 * minutes
    young = host(1, launched=NOW - 2 * minutes)
    assert made(host(0), young, silent=3 * minutes).silence == 2 * minutes
    assert made(host(0), young, silent=None).silence == 2 * minutes
    gone = lost(1, launched=NOW - 2 * minutes)
    assert made(host(0), gone, silent=3 * minutes).silence == 3 * minutes
    assert made(silent=3 * minutes).silence == 3 * minutes


def test_without_some_hosts_it_is_as_if_they_were_gone():
    seen = made(host(0), host(1))
    assert seen.without([host(1)]) == made(host(0))
    assert seen.without([host(1)]).missing == (1,)
    assert seen.without(seen.alive).alive == ()
    assert made().without([host(0)]) == made()
    assert seen.without([]) == seen
    uncovered = made(host(0), lost(1), host(1, generation=1)).without([host(1, generation=1)])
    assert uncovered.of_state("terminated") == (lost(1),)
