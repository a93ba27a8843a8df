"""Everything that launches share, together."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import pytest
from moto.ec2.models.instances import InstanceState

from launcher import standing
from launcher.things import TAGS
from tests.launcher.cloud import ACCOUNT, Cloud
from txl_jax.config import ClusterConfig, Config
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

BUCKET = f"txl-{ACCOUNT}-us-east-1"
PROFILE = f"txl-host-us-east-1-{BUCKET}"
HOME = ip_network("203.0.113.7/32")
ZONES = [f"us-east-1{letter}" for letter in "abcdef"]


@dataclass(frozen=True)
class Command:
    """What a command line says that the launcher has read."""

    experiment: Config = field(default_factory=lambda: Config(cluster=ClusterConfig(machines=2)))
    bucket: str = ""
    subnet: str = ""
    reservation: str = ""
    capacity_block: str = ""


def creations(aws: Cloud) -> list[str]:
    return [name for name, _ in aws.calls if not name.startswith("Describe")]


def test_what_is_missing_is_said_and_nothing_is_made(aws, account):
    assert standing.missing(account, Command(), ZONES) == [
        f"bucket {BUCKET}: private, encrypted, over TLS only",
        "key pair txl-moto, its private half in the Parameter Store as /txl/keys/txl-moto",
        f"role and instance profile {PROFILE}: the bucket {BUCKET} alone",
        "security group txl-moto: from outside only SSH, all within the group",
        "cluster placement groups " + ", ".join(f"txl-moto-{zone}" for zone in ZONES),
    ]
    assert creations(aws) == []
    assert aws.client("s3").list_buckets()["Buckets"] == []
    assert aws.client("iam").list_roles()["Roles"] == []


def test_what_was_missing_stands_and_is_named(aws, account):
    made = standing.ensure(account, Command(), [HOME], ZONES)
    assert standing.missing(account, Command(), ZONES) == []
    assert (made.bucket, made.key_name, made.profile) == (BUCKET, "txl-moto", PROFILE)
    assert made.key_path.is_file()
    assert made.subnets == aws.subnets()
    assert made.placement_groups == {zone: f"txl-moto-{zone}" for zone in ZONES}
    (group,) = aws.client("ec2").describe_security_groups(GroupIds=[made.security_group])[
        "SecurityGroups"
    ]
    assert group["Tags"] == TAGS


def test_a_second_launch_makes_nothing(aws, account):
    first = standing.ensure(account, Command(), [HOME], ZONES)
    aws.calls.clear()
    assert standing.ensure(account, Command(), [HOME], ZONES) == first
    assert creations(aws) == []


def test_two_launches_at_once_stand_on_the_same(aws, account):
    with ThreadPoolExecutor(4) as threads:
        made = list(
            threads.map(lambda _: standing.ensure(account, Command(), [HOME], ZONES), range(4))
        )
    assert all(one == made[0] for one in made)
    assert standing.missing(account, Command(), ZONES) == []


@pytest.mark.parametrize(
    "command",
    [
        Command(experiment=Config()),
        Command(reservation="cr-1"),
        Command(capacity_block="cr-1"),
    ],
)
def test_one_host_and_reserved_ones_are_in_no_placement_group(command, aws, account):
    assert standing.ensure(account, command, [HOME], ZONES).placement_groups == {}
    assert aws.placement_groups == {}


def test_a_subnet_that_is_named_is_the_only_one_and_its_zone_has_the_group(aws, account):
    subnet = aws.subnets()["us-east-1b"]
    made = standing.ensure(account, Command(subnet=subnet), [HOME], ZONES)
    assert made.subnets == {"us-east-1b": subnet}
    assert made.placement_groups == {"us-east-1b": "txl-moto-us-east-1b"}


def test_ssh_comes_from_where_it_is_allowed(aws, account):
    made = standing.ensure(account, Command(), [HOME], ZONES)
    (group,) = aws.client("ec2").describe_security_groups(GroupIds=[made.security_group])[
        "SecurityGroups"
    ]
    ranges = [r["CidrIp"] for way in group["IpPermissions"] for r in way["IpRanges"]]
    assert ranges == ["203.0.113.7/32"]


def test_only_zones_where_hosts_may_be_started_get_a_placement_group(aws, account):
    made = standing.ensure(account, Command(), [HOME], ["us-east-1b", "us-east-1x"])
    assert made.placement_groups == {"us-east-1b": "txl-moto-us-east-1b"}
    assert standing.ensure(account, Command(), [HOME], []).placement_groups == {}
    assert set(aws.placement_groups) == {"txl-moto-us-east-1b"}


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (Command(bucket="No Bucket"), "cannot be a bucket"),
        (Command(subnet="subnet-1"), "there is no subnet"),
    ],
)
def test_what_cannot_be_is_refused(command, complaint, account):
    with pytest.raises(UserError, match=complaint):
        standing.ensure(account, command, [HOME], ZONES)


def start(aws: Cloud, made: standing.Standing) -> Any:
    ec2 = aws.client("ec2")
    answer = ec2.run_instances(
        ImageId="ami-1",
        MinCount=1,
        MaxCount=1,
        KeyName=made.key_name,
        IamInstanceProfile={"Name": made.profile},
        SecurityGroupIds=[made.security_group],
        Placement={"GroupName": made.placement_groups["us-east-1a"]},
        SubnetId=made.subnets["us-east-1a"],
    )
    return answer["Instances"][0]["InstanceId"]


def test_nothing_that_hosts_use_is_unused(aws, account):
    made = standing.ensure(account, Command(), [HOME], ZONES)
    instance = start(aws, made)
    aws.client("ec2").stop_instances(InstanceIds=[instance])
    unused = {(thing.kind, thing.name) for thing in standing.unused(account)}
    idle = {("placement group", f"txl-moto-{zone}") for zone in ZONES[1:]}
    assert unused == {("bucket", BUCKET), *idle}


def test_all_that_is_unused_is_removed_and_can_be_made_again(aws, account):
    made = standing.ensure(account, Command(), [HOME], ZONES)
    instance = start(aws, made)
    aws.client("ec2").terminate_instances(InstanceIds=[instance])
    unused = standing.unused(account)
    assert {thing.kind for thing in unused} == {
        *("bucket", "key pair", "placement group", "role", "security group")
    }
    assert standing.remove(account, unused) == []
    assert standing.remove(account, unused) == []
    assert standing.unused(account) == []
    assert len(standing.missing(account, Command(), ZONES)) == 5
    standing.ensure(account, Command(), [HOME], ZONES)
    assert standing.missing(account, Command(), ZONES) == []


def test_what_hosts_that_shut_down_still_hold_is_not_unused(aws, account):
    made = standing.ensure(account, Command(), [HOME], ZONES)
    instance = start(aws, made)
    aws.instances()[0]._state = InstanceState("shutting-down", 32)
    assert ("security group", made.security_group) not in {
        (thing.kind, thing.name) for thing in standing.unused(account)
    }
    assert {thing.kind for thing in standing.unused(account)} == {"bucket", "placement group"}
    aws.client("ec2").terminate_instances(InstanceIds=[instance])
    assert len({thing.kind for thing in standing.unused(account)}) == 5


def test_one_thing_that_cannot_be_removed_does_not_keep_the_others(aws, account):
    standing.ensure(account, Command(), [HOME], ZONES)
    aws.refuse("DeleteSecurityGroup", "DependencyViolation", "it is in use")
    ((thing, why),) = standing.remove(account, standing.unused(account))
    assert thing.kind == "security group" and "it is in use" in why
    assert {left.kind for left in standing.unused(account)} == {"security group"}
