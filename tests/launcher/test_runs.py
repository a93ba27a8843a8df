"""Runs and hosts, from tags that anybody may have written."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moto.ec2.models.instances import Instance

from launcher import names, runs
from launcher.aws import Account
from launcher.runs import Run
from tests.launcher.cloud import Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

HOST_KEY = "ssh-ed25519 " + "A" * 68
NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


def tags(account: Account, **changed: str) -> dict[str, str]:
    """What the launcher writes, with changes."""
    written = {
        "TAG_MADE_BY": names.MADE_BY,
        "TAG_RUN": "trial",
        "TAG_LAUNCH": "launch-1",
        "TAG_OWNER": account.caller,
        "TAG_CONFIG": "eight_machines",
        "TAG_LOGDIR": "s3://txl-1/runs/trial",
        "TAG_PRICE": "9.5",
        "TAG_SPOT": "false",
        "TAG_HOST_KEY": HOST_KEY,
        "TAG_USER": "ubuntu",
        "TAG_STARTED": "2026-01-02T10:00:00+00:00",
        **changed,
    }
    return {getattr(names, name): value for name, value in written.items()}


def launch(aws: Cloud, written: dict[str, str], count: int = 1) -> list[Instance]:
    """Starts instances with these tags, as another program could."""
    before = {instance.id for instance in aws.instances()}
    aws.client("ec2").run_instances(
        ImageId="ami-1",
        MinCount=count,
        MaxCount=count,
        InstanceType="p3dn.24xlarge",
        KeyName="txl-moto",
        NetworkInterfaces=[
            {
                "DeviceIndex": 0,
                "SubnetId": aws.subnets()["us-east-1c"],
                "AssociatePublicIpAddress": True,
            }
        ],
        TagSpecifications=[
            {
                "ResourceType": "instance",
                "Tags": [{"Key": key, "Value": value} for key, value in written.items()],
            }
        ],
    )
    return [instance for instance in aws.instances() if instance.id not in before]


def only(account: Account, **words: Any) -> Run:
    (run,) = runs.find(account, **words)
    return run


def test_a_run_is_what_its_tags_say(aws, account):
    instances = launch(aws, tags(account), count=3)
    for index, instance in zip((2, 0, 1), instances, strict=True):
        instance.add_tags({names.TAG_HOST: str(index)})
    run = only(account)
    assert (run.name, run.launch, run.config) == ("trial", "launch-1", "eight_machines")
    assert (run.owner, run.logdir) == (account.caller, "s3://txl-1/runs/trial")
    assert run.started == datetime(2026, 1, 2, 10, tzinfo=UTC)
    assert [host.index for host in run.hosts] == [0, 1, 2]
    assert [host.instance_id for host in run.hosts] == [instances[i].id for i in (1, 2, 0)]
    host = run.hosts[0]
    assert (host.private_ip, host.public_ip) == (
        instances[1].private_ip,
        instances[1].public_ip,
    )
    assert (host.state, host.zone, host.kind) == ("running", "us-east-1c", "p3dn.24xlarge")
    assert (host.spot, host.price, host.ended) == (False, 9.5, None)
    assert (host.host_key, host.user, host.key_name) == (HOST_KEY, "ubuntu", "txl-moto")


def test_hosts_without_a_number_have_that_of_their_request(aws, account):
    instances = launch(aws, tags(account), count=3)
    assert [host.instance_id for host in only(account).hosts] == [i.id for i in instances]
    assert [host.index for host in only(account).hosts] == [0, 1, 2]


def test_two_launches_of_one_name_are_two_runs_the_older_first(aws, account):
    later = {"TAG_LAUNCH": "later", "TAG_STARTED": "2026-01-02T11:00:00+00:00"}
    launch(aws, tags(account, **later))
    launch(aws, tags(account))
    assert [run.launch for run in runs.find(account)] == ["launch-1", "later"]


def test_only_the_runs_of_that_name_are_found(aws, account):
    launch(aws, tags(account))
    launch(aws, tags(account, TAG_RUN="trial-2"))
    assert [run.name for run in runs.find(account, "trial")] == ["trial"]
    assert len(runs.find(account)) == 2
    with pytest.raises(UserError, match="cannot be the name of a run"):
        runs.find(account, "tri*")


def test_other_users_runs_are_found_only_if_all_are_wanted(aws, account):
    launch(aws, tags(account, TAG_OWNER="arn:aws:iam::1:user/bob"))
    assert runs.find(account) == []
    assert only(account, all_users=True).owner == "arn:aws:iam::1:user/bob"


def test_what_is_gone_is_found_only_if_it_is_wanted(aws, account):
    instances = launch(aws, tags(account), count=2)
    aws.client("ec2").terminate_instances(InstanceIds=[instances[0].id])
    assert [host.index for host in only(account).hosts] == [1]
    hosts = only(account, gone=True).hosts
    assert [host.state for host in hosts] == ["terminated", "running"]
    assert hosts[0].ended is not None
    assert "User initiated" in hosts[0].reason


def test_instances_of_others_are_no_runs(aws, account):
    launch(aws, {"Name": "theirs"})
    launch(aws, tags(account, TAG_MADE_BY="somebody"))
    assert runs.find(account, all_users=True, gone=True) == []


@pytest.mark.parametrize("name", ["../../etc", "a b", "$(id)", "", "A", "x" * 41, "a\n"])
def test_an_instance_with_the_name_of_no_run_is_left_out(name, aws, account):
    launch(aws, tags(account, TAG_RUN=name))
    assert runs.find(account, all_users=True) == []


def test_tags_that_the_launcher_would_not_write_are_not_believed(aws, account):
    launch(
        aws,
        tags(
            account,
            TAG_CONFIG="x\u009b2J\n\u202e",
            TAG_LOGDIR="s3://bucket/$(id)",
            TAG_PRICE="inf",
            TAG_HOST_KEY="ssh-ed25519 AAAA\n* ssh-rsa BBBB",
            TAG_USER="-oProxyCommand=id",
            TAG_STARTED="yesterday",
            TAG_HOST="-1",
        ),
    )
    run = only(account)
    assert run.config == "x\\x9b2J\\n\\u202e"
    assert run.logdir == ""
    host = run.hosts[0]
    assert (host.price, host.host_key, host.user, host.index) == (None, "", "", 0)
    assert run.started == host.launched


@pytest.mark.parametrize(
    "logdir", ["s3://b/x", "/etc", "s3://bucket", "s3://bucket/a b", "s3://bu/"]
)
def test_only_folders_of_buckets_are_logdirs(logdir, aws, account):
    launch(aws, tags(account, TAG_LOGDIR=logdir))
    assert only(account).logdir == ""


def test_the_cost_is_that_of_the_hours_of_every_host(aws, account):
    for instance in launch(aws, tags(account), count=2):
        instance.launch_time = NOW - timedelta(hours=2)
    assert only(account).cost_so_far(NOW) == pytest.approx(2 * 2 * 9.5)


def test_hosts_cost_until_they_end(aws, account):
    stopped, told, silent = launch(aws, tags(account), count=3)
    for instance in (stopped, told, silent):
        instance.launch_time = NOW - timedelta(hours=10)
    aws.client("ec2").stop_instances(InstanceIds=[stopped.id, told.id, silent.id])
    for instance in (stopped, told):
        instance._reason = "User initiated (2026-01-02 04:00:00 GMT)"
    silent._reason = ""  # as for a host that has shut itself down
    run = only(account)
    assert run.hosts[0].ended == datetime(2026, 1, 2, 4, tzinfo=UTC)
    assert run.cost_so_far(NOW) == pytest.approx(2 * 2 * 9.5)
    seen = NOW - timedelta(hours=7)
    assert run.cost_so_far(NOW, last_seen=seen) == pytest.approx((2 + 2 + 3) * 9.5)


def test_the_hours_before_a_host_was_stopped_cost_too(aws, account):
    for instance in launch(aws, tags(account, TAG_HOURS="3.5"), count=2):
        instance.launch_time = NOW - timedelta(hours=2)
    assert only(account).cost_so_far(NOW) == pytest.approx(2 * 5.5 * 9.5)


@pytest.mark.parametrize("hours", ["nan", "-1", "many"])
def test_hours_that_cannot_be_are_none(hours, aws, account):
    launch(aws, tags(account, TAG_HOURS=hours))
    assert only(account).hosts[0].hours_before == 0.0


def test_with_a_price_that_is_not_known_the_cost_is_not_known(aws, account):
    launch(aws, tags(account, TAG_PRICE="a lot"))
    assert only(account).cost_so_far(NOW + timedelta(days=1000)) is None
    assert only(account).price is None


def test_hosts_without_public_addresses_are_reached_by_their_private_ones(aws, account):
    first, _ = launch(aws, tags(account), count=2)
    assert (only(account).private(False), only(account).private(True)) == (False, True)
    first.nics[0].public_ip = None
    assert only(account).private(False)


def test_ssh_finds_a_host_by_the_address_that_is_wanted(aws, account):
    (instance,) = launch(aws, tags(account))
    run = only(account)
    assert run.address(run.hosts[0], private=True) == instance.private_ip
    assert run.address(run.hosts[0], private=False) == instance.public_ip


def test_a_host_without_a_public_address_says_what_to_do(aws, account):
    (instance,) = launch(aws, tags(account))
    instance.nics[0].public_ip = None
    run = only(account)
    with pytest.raises(UserError, match=r"host 0 of trial is running .* try --private-ip"):
        run.address(run.hosts[0], private=False)
