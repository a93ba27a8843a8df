"""What is open: SSH from where it is allowed, and the hosts among themselves."""

import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from typing import Any

import pytest

from launcher import network, security_group
from launcher.network import Network
from launcher.security_group import sources
from launcher.things import TAGS, Thing
from tests.launcher.cloud import Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

HOME = ip_network("203.0.113.7/32")
OFFICE = ip_network("198.51.100.0/24")
SIX = ip_network("2001:db8::/48")


@pytest.fixture
def place(account) -> Network:
    return network.ensure(account, "")


def group(aws: Cloud, group_id: str) -> dict[str, Any]:
    return aws.client("ec2").describe_security_groups(GroupIds=[group_id])["SecurityGroups"][0]


def open_to(aws: Cloud, group_id: str) -> set[tuple[Any, ...]]:
    """Protocol, ports and source of every way in."""
    return {
        (way["IpProtocol"], way.get("FromPort"), way.get("ToPort"), *source.values())
        for way in group(aws, group_id)["IpPermissions"]
        for source in (
            [{"from": range_["CidrIp"]} for range_ in way["IpRanges"]]
            + [{"from": range_["CidrIpv6"]} for range_ in way["Ipv6Ranges"]]
            + [{"from": pair["GroupId"]} for pair in way["UserIdGroupPairs"]]
        )
    }


def run_in(aws: Cloud, group_id: str) -> str:
    answer = aws.client("ec2").run_instances(
        ImageId="ami-1", MinCount=1, MaxCount=1, SecurityGroupIds=[group_id], ClientToken=group_id
    )
    return answer["Instances"][0]["InstanceId"]


def test_ssh_from_where_it_is_allowed_and_all_among_the_hosts_is_open(aws, account, place):
    assert security_group.missing(account, place) == [
        "security group txl-moto: from outside only SSH, all within the group"
    ]
    group_id = security_group.ensure(account, place, [HOME, SIX])
    assert open_to(aws, group_id) == {
        ("tcp", 22, 22, "203.0.113.7/32"),
        ("tcp", 22, 22, "2001:db8::/48"),
        ("-1", None, None, group_id),
    }
    found = group(aws, group_id)
    assert (found["GroupName"], found["VpcId"], found["Tags"]) == ("txl-moto", place.vpc, TAGS)
    assert security_group.missing(account, place) == []


def test_hosts_may_send_all_to_each_other_as_efa_asks(aws, account, place):
    group_id = security_group.ensure(account, place, [HOME])
    out = [
        pair["GroupId"]
        for way in group(aws, group_id)["IpPermissionsEgress"]
        if way["IpProtocol"] == "-1"
        for pair in way["UserIdGroupPairs"]
    ]
    assert out == [group_id]


def test_a_second_launch_changes_nothing(aws, account, place):
    first = security_group.ensure(account, place, [HOME])
    aws.calls.clear()
    assert security_group.ensure(account, place, [HOME]) == first
    assert {name for name, _ in aws.calls} == {"DescribeSecurityGroups"}


def test_from_another_place_the_old_one_is_closed(aws, account, place):
    group_id = security_group.ensure(account, place, [HOME])
    security_group.ensure(account, place, [OFFICE])
    assert open_to(aws, group_id) == {
        ("tcp", 22, 22, "198.51.100.0/24"),
        ("-1", None, None, group_id),
    }


def test_while_hosts_run_the_old_place_is_not_cut_off(aws, account, place):
    group_id = security_group.ensure(account, place, [HOME])
    instance = run_in(aws, group_id)
    security_group.ensure(account, place, [OFFICE])
    both = {
        ("tcp", 22, 22, "203.0.113.7/32"),
        ("tcp", 22, 22, "198.51.100.0/24"),
        ("-1", None, None, group_id),
    }
    assert open_to(aws, group_id) == both
    aws.client("ec2").terminate_instances(InstanceIds=[instance])
    security_group.ensure(account, place, [OFFICE])
    assert open_to(aws, group_id) == both - {("tcp", 22, 22, "203.0.113.7/32")}


def test_what_somebody_has_opened_to_the_world_is_closed(aws, account, place):
    group_id = security_group.ensure(account, place, [HOME])
    aws.client("ec2").authorize_security_group_ingress(
        GroupId=group_id, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
    )
    aws.client("ec2").authorize_security_group_ingress(
        GroupId=group_id,
        IpPermissions=[
            {
                "IpProtocol": "tcp",
                "FromPort": 6006,
                "ToPort": 6006,
                "Ipv6Ranges": [{"CidrIpv6": "::/0"}],
            }
        ],
    )
    security_group.ensure(account, place, [HOME])
    assert open_to(aws, group_id) == {
        ("tcp", 22, 22, "203.0.113.7/32"),
        ("-1", None, None, group_id),
    }


def test_what_is_open_to_the_world_is_closed_while_hosts_run_too(aws, account, place):
    group_id = security_group.ensure(account, place, [OFFICE])
    run_in(aws, group_id)
    aws.client("ec2").authorize_security_group_ingress(
        GroupId=group_id, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
    )
    security_group.ensure(account, place, [HOME])
    assert open_to(aws, group_id) == {
        ("tcp", 22, 22, "203.0.113.7/32"),
        ("tcp", 22, 22, "198.51.100.0/24"),
        ("-1", None, None, group_id),
    }


def test_only_the_launchers_groups_let_another_machine_in(aws, account, place):
    """Not every group of the region, where hosts are in none of ours."""
    ours = security_group.ensure(account, place, [HOME])
    theirs = aws.client("ec2").create_security_group(
        GroupName="txl-theirs", Description="-", VpcId=place.vpc
    )["GroupId"]
    host = run_in(aws, theirs)
    before = open_to(aws, ours), open_to(aws, theirs)
    with pytest.raises(UserError, match="in no security group that this launcher has made"):
        security_group.admit(account, [host], [OFFICE])
    assert (open_to(aws, ours), open_to(aws, theirs)) == before
    both = run_in(aws, ours)
    security_group.admit(account, [host, both], [OFFICE])
    assert ("tcp", 22, 22, "198.51.100.0/24") in open_to(aws, ours)
    assert open_to(aws, theirs) == before[1]


def test_without_a_new_place_all_stays_as_open_as_it_was(aws, account, place):
    """Hosts that take the place of others are let in to from where the others were."""
    group_id = security_group.ensure(account, place, [HOME, SIX])
    security_group.admit(account, [run_in(aws, group_id)], [OFFICE], mosh=True)
    before = open_to(aws, group_id)
    assert len(before) >= 4
    for instance in aws.instances("running"):
        instance.terminate()
    aws.calls.clear()
    assert security_group.ensure(account, place, None) == group_id
    assert open_to(aws, group_id) == before
    assert {name for name, _ in aws.calls} == {"DescribeSecurityGroups"}


@pytest.mark.parametrize("used", [False, True])
def test_without_a_new_place_what_is_open_to_the_world_is_closed(used, aws, account, place):
    group_id = security_group.ensure(account, place, [HOME])
    before = open_to(aws, group_id)
    if used:
        run_in(aws, group_id)
    aws.client("ec2").authorize_security_group_ingress(
        GroupId=group_id, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
    )
    security_group.ensure(account, place, None)
    assert open_to(aws, group_id) == before


def test_without_a_group_nobody_is_let_in_from_outside(aws, account, place):
    group_id = security_group.ensure(account, place, None)
    assert open_to(aws, group_id) == {("-1", None, None, group_id)}


def test_launches_at_once_make_one_group(aws, account, place):
    with ThreadPoolExecutor(8) as threads:
        made = set(threads.map(lambda _: security_group.ensure(account, place, [HOME]), range(8)))
    (group_id,) = made
    assert open_to(aws, group_id) == {
        ("tcp", 22, 22, "203.0.113.7/32"),
        ("-1", None, None, group_id),
    }


def test_a_group_of_that_name_that_is_somebody_elses_is_left_alone(aws, account, place):
    made = aws.client("ec2").create_security_group(
        GroupName="txl-moto", Description="theirs", VpcId=place.vpc
    )
    with pytest.raises(UserError, match=r"txl-moto in vpc-.* was not made by this launcher"):
        security_group.ensure(account, place, [HOME])
    assert open_to(aws, made["GroupId"]) == set()


def test_another_machine_is_let_in_to_hosts_that_run(aws, account, place):
    group_id = security_group.ensure(account, place, [HOME])
    instance = run_in(aws, group_id)
    for _ in range(2):
        security_group.admit(account, [instance], [OFFICE])
    assert ("tcp", 22, 22, "198.51.100.0/24") in open_to(aws, group_id)
    assert ("tcp", 22, 22, "203.0.113.7/32") in open_to(aws, group_id)


def test_a_group_that_no_instance_is_in_is_unused_and_can_be_removed(aws, account, place):
    assert security_group.unused(account) == []
    group_id = security_group.ensure(account, place, [HOME])
    instance = run_in(aws, group_id)
    assert security_group.unused(account) == []
    aws.client("ec2").terminate_instances(InstanceIds=[instance])
    assert security_group.unused(account) == [Thing("security group", group_id)]
    security_group.remove(account, group_id)
    security_group.remove(account, group_id)
    assert security_group.missing(account, place)


PLACE = Network("vpc-1", "127.1.0.0/16", {})


def test_ssh_is_allowed_from_this_machine_if_nothing_else_is_said():
    assert sources("", False, PLACE, lambda: "203.0.113.7") == [HOME]
    assert sources("", True, PLACE, lambda: "203.0.113.7") == [ip_network("127.0.0.1/32")]


def test_ssh_is_allowed_from_the_networks_that_are_named():
    named = "203.0.113.7, 198.51.100.9/24,2001:db8::1/48"
    assert sources(named, False, PLACE, lambda: "not asked") == [HOME, OFFICE, SIX]


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "::/0", "128.0.0.0/1", "10.0.0.0/7", "2000::/3"])
def test_nobody_can_open_the_hosts_to_the_world(cidr):
    with pytest.raises(UserError, match="would open the hosts to the world"):
        sources(f"203.0.113.7,{cidr}", False, PLACE)


@pytest.mark.parametrize("cidr", ["home", "203.0.113.7/33", "203.0.113.7,", "1.2.3.4;id", "\n"])
def test_what_is_no_network_is_refused(cidr):
    with pytest.raises(UserError, match="is no network") as error:
        sources(cidr, False, PLACE)
    assert str(error.value).isprintable()


def test_without_the_internet_it_says_what_to_do(monkeypatch):
    def no_name(*_: object, **__: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    with pytest.raises(UserError, match=r"cannot learn this machine's address.*--ssh-cidr"):
        security_group.own_public_address()
