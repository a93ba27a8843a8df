"""Where hosts stand."""

import pytest

from launcher import network
from launcher.network import Network
from tests.launcher.cloud import Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]


def remove_default_vpc(aws: Cloud) -> None:
    ec2 = aws.client("ec2")
    for subnet in aws.subnets().values():
        ec2.delete_subnet(SubnetId=subnet)
    (vpc,) = ec2.describe_vpcs()["Vpcs"]
    ec2.delete_vpc(VpcId=vpc["VpcId"])


def test_hosts_stand_in_the_default_vpc_with_a_subnet_in_each_zone(aws, account):
    of_zones = aws.subnets()
    ec2 = aws.client("ec2")
    (vpc,) = ec2.describe_vpcs()["Vpcs"]
    ec2.create_subnet(
        VpcId=vpc["VpcId"], CidrBlock="172.31.240.0/24", AvailabilityZone="us-east-1a"
    )  # somebody's own, without a way to the internet perhaps
    found = network.ensure(account, "")
    assert network.missing(account, "") == []
    assert found.subnets == of_zones
    assert list(found.subnets) == sorted(found.subnets)
    assert found.cidr == "172.31.0.0/16"
    assert network.find(account, "") == found


def test_a_subnet_that_is_named_is_the_only_one(aws, account):
    subnet = aws.subnets()["us-east-1b"]
    assert network.ensure(account, subnet).subnets == {"us-east-1b": subnet}
    assert network.missing(account, subnet) == []


@pytest.mark.parametrize("subnet", ["subnet-0123456789abcdef0", "$(id)\n"])
def test_a_subnet_that_is_not_there_is_refused(subnet, account):
    with pytest.raises(UserError, match=r"there is no subnet .* in us-east-1") as error:
        network.ensure(account, subnet)
    assert str(error.value).isprintable()


def test_an_account_without_a_default_vpc_gets_one(aws, account):
    remove_default_vpc(aws)
    assert network.find(account, "") is None
    assert network.missing(account, "") == ["default VPC of us-east-1, with a subnet in each zone"]
    assert not aws.asked("CreateDefaultVpc")
    found = network.ensure(account, "")
    assert found.subnets
    assert network.missing(account, "") == []


def test_a_default_vpc_that_another_launch_makes_meanwhile_is_used(aws, account, monkeypatch):
    remove_default_vpc(aws)

    def made_meanwhile(parameters: dict) -> bool:
        with monkeypatch.context() as past:
            past.setattr(aws, "refusals", [])
            aws.client("ec2").create_default_vpc()
        return True

    aws.refuse("CreateDefaultVpc", "DefaultVpcAlreadyExists", when=made_meanwhile)
    assert network.ensure(account, "").subnets


def test_a_default_vpc_without_subnets_is_refused(aws, account):
    for subnet in aws.subnets().values():
        aws.client("ec2").delete_subnet(SubnetId=subnet)
    with pytest.raises(UserError, match="has no subnets: name a --subnet"):
        network.ensure(account, "")


def test_the_address_towards_the_hosts_is_that_of_the_way_to_them():
    assert network.own_private_address(Network("vpc-1", "127.1.0.0/16", {})) == "127.0.0.1"


def test_without_a_way_to_the_hosts_it_says_what_to_do():
    with pytest.raises(UserError, match=r"no way to the hosts' network.*--ssh-cidr"):
        network.own_private_address(Network("vpc-1", "255.255.255.254/31", {}))
