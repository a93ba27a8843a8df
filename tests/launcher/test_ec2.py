"""Hosts: all of them or none, whatever happens meanwhile."""

import base64
import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError
from moto.ec2.models.instances import Instance, InstanceState, StateReason

from launcher import ec2, names, runs
from launcher.aws import Account
from launcher.ec2 import Order
from launcher.hardware import Image, InstanceType
from launcher.standing import Standing
from tests.launcher.cloud import Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

ZONES = ("us-east-1b", "us-east-1a", "us-east-1c")
USER_DATA = "#!/bin/sh\n"
HOUR = datetime(2026, 1, 2, 10, tzinfo=UTC)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ec2, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ec2, "_LATE_SECONDS", 0.05)
    monkeypatch.setattr(ec2, "_STATE_SECONDS", 60.0)


@pytest.fixture
def order(aws: Cloud, account: Account, tmp_path) -> Order:
    """Three p3dn hosts on spot."""
    admin = aws.client("ec2")
    vpc = admin.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = admin.create_security_group(GroupName="txl-moto", Description="-", VpcId=vpc)
    aws.client("iam").create_instance_profile(InstanceProfileName="txl-host")
    standing = Standing(
        bucket="txl",
        key_name="txl-moto",
        key_path=tmp_path / "key",
        security_group=group["GroupId"],
        profile="txl-host",
        subnets=aws.subnets(),
        placement_groups={zone: f"txl-moto-{zone}" for zone in aws.subnets()},
    )
    kind = InstanceType(
        name="p3dn.24xlarge",
        gpus=8,
        gpu_name="V100",
        gpu_memory_gib=32.0,
        memory_gib=768.0,
        vcpus=96,
        efa_interfaces=1,
        network_cards=1,
        network_gbps=100.0,
        architecture="x86_64",
        zones=ZONES,
        efa_cards=(0,),
    )
    return Order(
        name="trial",
        launch="launch-1",
        kind=kind,
        image=Image(aws.image(), "ubuntu", "ubuntu", "/dev/sda1", True, 15),
        count=3,
        standing=standing,
        zones=ZONES,
        spot=True,
        max_price=None,
        user_data=USER_DATA,
        tags={names.TAG_CONFIG: "eight_machines", names.TAG_LOGDIR: "s3://txl/runs/trial"},
        prices={"us-east-1b": 9.25},
    )


def start(account: Account, order: Order) -> tuple[runs.Run, list[str]]:
    """The run, and what was said."""
    said: list[str] = []
    return ec2.start(account, order, said.append), said


def request(aws: Cloud) -> dict[str, Any]:
    return aws.asked("RunInstances")[-1]


def die(instance: Instance, code: str = "Server.InsufficientInstanceCapacity") -> None:
    """As EC2 lets instances end that it cannot start after all."""
    instance.terminate()
    instance.state_reason = StateReason(f"{code}: no room after all", code)


def alive(aws: Cloud) -> list[Instance]:
    return aws.instances("pending", "running", "stopping", "stopped")


def test_all_hosts_start_in_the_first_zone_numbered_and_named(aws, account, order):
    run, said = start(account, order)
    assert said == []
    assert [host.index for host in run.hosts] == [0, 1, 2]
    assert {(host.state, host.zone) for host in run.hosts} == {("running", "us-east-1b")}
    assert runs.find(account) == [run]
    named = {instance.id: dict_of(instance.get_tags()) for instance in alive(aws)}
    for host in run.hosts:
        assert named[host.instance_id][names.TAG_HOST] == str(host.index)
        assert named[host.instance_id][names.TAG_NAME] == f"trial-{host.index}"
    (asked,) = aws.asked("RunInstances")
    assert (asked["MinCount"], asked["MaxCount"]) == (3, 3)


def dict_of(tags: list[dict[str, str]]) -> dict[str, str]:
    return {tag.get("Key") or tag["key"]: tag.get("Value") or tag["value"] for tag in tags}


def test_everything_that_is_made_has_the_tags(aws, account, order):
    run, _ = start(account, order)
    tags = {
        each["ResourceType"]: dict_of(each["Tags"]) for each in request(aws)["TagSpecifications"]
    }
    assert set(tags) == {"instance", "volume", "network-interface", "spot-instances-request"}
    assert all(tags["instance"] == each for each in tags.values())
    assert tags["instance"] == {
        names.TAG_MADE_BY: names.MADE_BY,
        names.TAG_RUN: "trial",
        names.TAG_LAUNCH: "launch-1",
        names.TAG_OWNER: account.caller,
        names.TAG_SPOT: "true",
        names.TAG_USER: "ubuntu",
        names.TAG_PRICE: "9.25",
        names.TAG_CONFIG: "eight_machines",
        names.TAG_LOGDIR: "s3://txl/runs/trial",
    }
    assert (run.hosts[0].price, run.config) == (9.25, "eight_machines")


def test_nobody_can_pass_for_another_by_the_tags_of_an_order(aws, account, order):
    false = {names.TAG_OWNER: "arn:aws:iam::1:user/bob", names.TAG_MADE_BY: "bob"}
    run, _ = start(account, dataclasses.replace(order, tags=false))
    assert run.owner == account.caller


def test_on_demand_hosts_ask_for_no_spot_tags(aws, account, order):
    start(account, dataclasses.replace(order, spot=False))
    kinds = [each["ResourceType"] for each in request(aws)["TagSpecifications"]]
    assert kinds == ["instance", "volume", "network-interface"]


def test_only_tokens_open_the_metadata_and_only_on_the_host_itself(aws, account, order):
    start(account, order)
    options = request(aws)["MetadataOptions"]
    assert options["HttpTokens"] == "required"
    assert options["HttpPutResponseHopLimit"] == 1
    for instance in alive(aws):
        assert instance.metadata_options.http_tokens == "required"


def test_disks_are_encrypted_large_enough_and_go_with_the_host(aws, account, order):
    start(account, order)
    (mapping,) = request(aws)["BlockDeviceMappings"]
    assert mapping["DeviceName"] == "/dev/sda1"
    assert mapping["Ebs"] == {
        "VolumeType": "gp3",
        "VolumeSize": 200,
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    large = dataclasses.replace(order.image, root_gib=500)
    start(account, dataclasses.replace(order, image=large, name="other", launch="launch-2"))
    assert request(aws)["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 500


def test_spot_hosts_are_asked_for_once_and_end_when_they_shut_down(aws, account, order):
    run, _ = start(account, order)
    assert all(host.spot for host in run.hosts)
    assert request(aws)["InstanceMarketOptions"] == {
        "MarketType": "spot",
        "SpotOptions": {
            "SpotInstanceType": "one-time",
            "InstanceInterruptionBehavior": "terminate",
        },
    }
    assert request(aws)["InstanceInitiatedShutdownBehavior"] == "terminate"


def test_spot_hosts_cost_no_more_than_is_said(aws, account, order):
    start(account, dataclasses.replace(order, max_price=12.5))
    assert request(aws)["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"] == "12.5"


def test_hosts_on_demand_stop_when_they_shut_down(aws, account, order):
    run, _ = start(account, dataclasses.replace(order, spot=False))
    assert not any(host.spot for host in run.hosts)
    assert "InstanceMarketOptions" not in request(aws)
    assert request(aws)["InstanceInitiatedShutdownBehavior"] == "stop"


def test_hosts_have_role_key_user_data_group_and_place(aws, account, order):
    start(account, order)
    asked = request(aws)
    assert asked["IamInstanceProfile"] == {"Name": "txl-host"}
    assert asked["KeyName"] == "txl-moto"
    assert asked["Placement"] == {"GroupName": "txl-moto-us-east-1b"}
    assert base64.b64decode(asked["UserData"]).decode() == USER_DATA
    for instance in alive(aws):
        assert [group.id for group in instance.nics[0].group_set] == [order.standing.security_group]


def test_hosts_of_types_that_cannot_stand_close_are_in_no_group(aws, account, order):
    kind = dataclasses.replace(order.kind, clusters=False)
    start(account, dataclasses.replace(order, kind=kind))
    assert "Placement" not in request(aws)


def interfaces(aws: Cloud) -> list[tuple[int, int, str, bool | None]]:
    return [
        (
            each["NetworkCardIndex"],
            each["DeviceIndex"],
            each["InterfaceType"],
            each.get("AssociatePublicIpAddress"),
        )
        for each in request(aws)["NetworkInterfaces"]
    ]


def test_hosts_that_train_together_have_efa_and_a_public_address(aws, account, order):
    run, _ = start(account, order)
    assert interfaces(aws) == [(0, 0, "efa", True)]
    assert all(host.public_ip for host in run.hosts)


def test_a_host_that_is_alone_has_no_efa(aws, account, order):
    several = dataclasses.replace(order.kind, efa_cards=(0, 1, 2, 3), efa_interfaces=4)
    start(account, dataclasses.replace(order, count=1, kind=several))
    assert interfaces(aws) == [(0, 0, "interface", True)]


def test_reached_by_private_address_the_subnet_decides_about_a_public_one(aws, account, order):
    start(account, dataclasses.replace(order, private_ip=True))
    assert interfaces(aws) == [(0, 0, "efa", None)]


def test_several_network_cards_get_an_efa_interface_each(aws, account, order):
    four = dataclasses.replace(order.kind, efa_cards=(0, 1, 2, 3), efa_interfaces=4)
    start(account, dataclasses.replace(order, kind=four, private_ip=True))
    assert interfaces(aws) == [
        (0, 0, "efa", None),
        (1, 1, "efa-only", None),
        (2, 1, "efa-only", None),
        (3, 1, "efa-only", None),
    ]
    for each in request(aws)["NetworkInterfaces"]:
        assert each["SubnetId"] == order.standing.subnets["us-east-1b"]
        assert each["Groups"] == [order.standing.security_group]
        assert each["DeleteOnTermination"] is True


def test_a_first_card_without_efa_carries_the_address_alone(aws, account, order):
    kind = dataclasses.replace(order.kind, efa_cards=(1, 2), efa_interfaces=2)
    start(account, dataclasses.replace(order, kind=kind, private_ip=True))
    assert [each[2] for each in interfaces(aws)] == ["interface", "efa-only", "efa-only"]


def test_hosts_that_could_not_be_reached_are_not_started(aws, account, order):
    four = dataclasses.replace(order.kind, efa_cards=(0, 1, 2, 3), name="p4d.24xlarge")
    with pytest.raises(UserError, match=r"p4d\.24xlarge have 4 network interfaces.*--private-ip"):
        start(account, dataclasses.replace(order, kind=four))
    assert aws.instances() == []


@pytest.mark.parametrize(
    ("words", "market"),
    [
        ({"reservation": "cr-1"}, None),
        ({"capacity_block": "cr-1"}, {"MarketType": "capacity-block"}),
    ],
)
def test_reserved_hosts_use_the_reservation_and_no_placement_group(
    words, market, aws, account, order
):
    start(account, dataclasses.replace(order, spot=False, **words))
    asked = request(aws)
    assert asked["CapacityReservationSpecification"] == {
        "CapacityReservationTarget": {"CapacityReservationId": "cr-1"}
    }
    assert asked.get("InstanceMarketOptions") == market
    assert "Placement" not in asked


@pytest.mark.parametrize(
    "code", ["InsufficientInstanceCapacity", "SpotMaxPriceTooLow", "Unsupported"]
)
def test_zones_without_room_are_passed_over_and_told(code, aws, account, order):
    aws.full("us-east-1b", code)
    aws.full("us-east-1a", code)
    run, said = start(account, order)
    assert {host.zone for host in run.hosts} == {"us-east-1c"}
    assert said == [
        f"no hosts in us-east-1b: {code}, There is no capacity in us-east-1b.",
        f"no hosts in us-east-1a: {code}, There is no capacity in us-east-1a.",
    ]
    assert len(aws.asked("RunInstances")) == 3  # each zone once: boto3 would ask again
    assert len(aws.instances()) == 3


def test_each_zone_is_asked_with_a_token_of_its_own(aws, account, order):
    aws.full("us-east-1b")
    start(account, order)
    tokens = [asked["ClientToken"] for asked in aws.asked("RunInstances")]
    assert len(set(tokens)) == 2
    assert all(len(token) <= 64 for token in tokens)


def test_when_all_zones_are_full_nothing_runs_and_each_answer_is_told(aws, account, order):
    for zone in ZONES:
        aws.full(zone)
    with pytest.raises(UserError) as error:
        start(account, order)
    words = str(error.value)
    assert words.startswith("no zone has room for 3 × p3dn.24xlarge now, nothing is running: ")
    for zone in ZONES:
        assert f"{zone}: InsufficientInstanceCapacity, There is no capacity in {zone}." in words
    assert "--nospot" in words and words.isprintable()
    assert aws.instances() == []


def test_when_spot_is_too_dear_a_higher_price_is_advised(aws, account, order):
    for zone in ZONES:
        aws.full(zone, "SpotMaxPriceTooLow")
    with pytest.raises(UserError, match="Try a higher --max-price"):
        start(account, dataclasses.replace(order, max_price=1.0))


def test_zones_without_a_subnet_are_passed_over(aws, account, order):
    zones = ("us-east-1x", "us-east-1a")
    run, said = start(account, dataclasses.replace(order, zones=zones))
    assert {host.zone for host in run.hosts} == {"us-east-1a"}
    assert said == ["no hosts in us-east-1x: no subnet"]


@pytest.mark.parametrize("code", ["VcpuLimitExceeded", "MaxSpotInstanceCountExceeded"])
def test_a_quota_ends_it_at_once(code, aws, account, order):
    aws.refuse("RunInstances", code)
    with pytest.raises(UserError, match=f"quota.*{code}.*Service Quotas"):
        start(account, order)
    assert len(aws.asked("RunInstances")) == 1
    assert len(aws.asked("DescribeInstances")) == 1  # nothing can come late after a refusal
    assert aws.instances() == []


def test_a_denied_start_names_the_action(aws, account, order):
    aws.refuse(
        "RunInstances", "UnauthorizedOperation", "not authorized to perform: ec2:RunInstances"
    )
    with pytest.raises(UserError, match="AWS denies ec2:RunInstances"):
        start(account, order)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "InvalidParameterValue",
            "Value (txl-host) for parameter iamInstanceProfile.name is invalid. Invalid IAM "
            "Instance Profile name",
        ),
        ("InvalidGroup.NotFound", "The security group does not exist"),
        ("InvalidKeyPair.NotFound", "The key pair does not exist"),
        ("InvalidPlacementGroup.Unknown", "The placement group is unknown"),
        ("RequestLimitExceeded", "Request limit exceeded."),
        ("InternalError", "An internal error has occurred"),
    ],
)
def test_what_ec2_does_not_know_yet_is_asked_again(code, message, aws, account, order):
    aws.refuse("RunInstances", code, message, times=3)
    run, said = start(account, order)
    assert len(run.hosts) == 3
    assert len(aws.instances()) == 3
    assert len(aws.asked("RunInstances")) == 4
    assert said == [f"asking EC2 in us-east-1b again for up to 90 s: {code}"]


def test_what_ec2_never_comes_to_know_ends_it(aws, account, order, monkeypatch):
    monkeypatch.setattr(ec2, "_REQUEST_SECONDS", 0.05)
    aws.refuse("RunInstances", "InvalidKeyPair.NotFound", "no such key", times=1000)
    with pytest.raises(UserError, match=r"InvalidKeyPair\.NotFound: no such key"):
        start(account, order)


def test_another_wrong_parameter_is_not_asked_again(aws, account, order):
    aws.refuse("RunInstances", "InvalidParameterValue", "User data is limited")
    with pytest.raises(UserError, match="User data is limited"):
        start(account, order)
    assert len(aws.asked("RunInstances")) == 1


@pytest.mark.parametrize(
    "code", ["Server.InsufficientInstanceCapacity", "Client.VolumeLimitExceeded"]
)
def test_if_some_hosts_end_at_once_the_others_do_too_and_the_next_zone_is_tried(
    code, aws, account, order
):
    def one_dies(instances: list[Instance]) -> None:
        aws.after_run = lambda _: None
        die(instances[1], code)

    aws.after_run = one_dies
    run, said = start(account, order)
    assert {host.zone for host in run.hosts} == {"us-east-1a"}
    assert {instance.id for instance in alive(aws)} == {host.instance_id for host in run.hosts}
    (told,) = said
    assert told.startswith(f"no hosts in us-east-1b: {code}: no room after all")


def test_hosts_that_stay_pending_are_waited_for(aws, account, order):
    def pending(instances: list[Instance]) -> None:
        for instance in instances:
            instance._state = InstanceState("pending", 0)

    def come_up(_: Any) -> bool:
        for instance in alive(aws)[: len(aws.asked("DescribeInstances")) - 1]:
            instance._state = InstanceState("running", 16)
        return False

    aws.after_run = pending
    aws.refuse("DescribeInstances", "never", when=come_up)
    run, _ = start(account, order)
    assert [host.state for host in run.hosts] == ["running"] * 3
    assert len(aws.asked("DescribeInstances")) >= 4


def test_hosts_that_do_not_come_up_are_terminated(aws, account, order, monkeypatch):
    def pending(instances: list[Instance]) -> None:
        instances[2]._state = InstanceState("pending", 0)

    monkeypatch.setattr(ec2, "_STATE_SECONDS", 0.05)
    aws.after_run = pending
    with pytest.raises(UserError, match=r"did not come up .*pending, running.*terminated"):
        start(account, order)
    assert alive(aws) == []


def typed_again(aws: Cloud, account: Account, order: Order) -> tuple[runs.Run, list[str]]:
    """What the same order gives, counting what it costs."""
    before = {instance.id for instance in alive(aws)}
    run, said = start(account, order)
    assert {host.instance_id for host in run.hosts} == before
    return run, said


def test_typed_again_it_takes_the_same_hosts(aws, account, order):
    first, _ = start(account, order)
    run, said = typed_again(aws, account, order)
    assert run == first
    assert said == ["hosts of this launch stand in us-east-1b already"]
    assert len(aws.asked("RunInstances")) == 1


def test_killed_before_its_hosts_had_numbers_it_numbers_them(aws, account, order):
    start(account, order)
    aws.client("ec2").delete_tags(
        Resources=[instance.id for instance in alive(aws)],
        Tags=[{"Key": names.TAG_HOST}, {"Key": names.TAG_NAME}],
    )
    run, _ = typed_again(aws, account, order)
    assert runs.find(account) == [run]
    assert sorted(host.index for host in run.hosts) == [0, 1, 2]


def test_killed_before_ec2_showed_the_hosts_the_token_gives_the_same(
    aws, account, order, monkeypatch
):
    first, _ = start(account, order)
    monkeypatch.setattr(ec2, "_standing", lambda *_: [])
    run, said = typed_again(aws, account, order)
    assert run == first
    assert said == []
    assert len(aws.asked("RunInstances")) == 2


def test_killed_before_ec2_showed_the_hosts_of_a_zone_no_other_zones_join_them(
    aws, account, order, monkeypatch
):
    """The first zone, which was full, has room again."""
    aws.full("us-east-1b")
    first, _ = start(account, order)
    aws.refusals.clear()
    own, looks = ec2._standing, [0]

    def late(*words: Any) -> list[Any]:
        looks[0] += 1
        return own(*words) if looks[0] > 2 else []

    monkeypatch.setattr(ec2, "_standing", late)
    monkeypatch.setattr(ec2, "_LATE_SECONDS", 10.0)
    run, _ = typed_again(aws, account, dataclasses.replace(order, again=True))
    assert run == first
    assert len(alive(aws)) == 3


def test_with_other_words_the_hosts_of_the_token_are_taken_too(aws, account, order, monkeypatch):
    """The spot price, which is a tag, may have changed since."""
    first, _ = start(account, order)
    own, looks = ec2._standing, [0]

    def late(*words: Any) -> list[Any]:
        looks[0] += 1
        return own(*words) if looks[0] > 2 else []

    monkeypatch.setattr(ec2, "_standing", late)
    monkeypatch.setattr(ec2, "_LATE_SECONDS", 10.0)
    changed = dataclasses.replace(order, prices={"us-east-1b": 9.5})
    run, _ = typed_again(aws, account, changed)
    assert run == first


def test_if_the_hosts_of_the_token_are_gone_the_next_zone_is_tried(aws, account, order):
    first, _ = start(account, order)
    ec2.terminate(account, first.hosts)
    changed = dataclasses.replace(order, prices={"us-east-1b": 9.5})
    run, said = start(account, changed)
    assert {host.zone for host in run.hosts} == {"us-east-1a"}
    assert said == ["no hosts in us-east-1b: the hosts that this launch had there are gone"]


def test_typed_again_after_all_were_lost_the_next_zone_is_tried(aws, account, order):
    """EC2 answers the same request with the hosts that are gone."""
    first, _ = start(account, order)
    ec2.terminate(account, first.hosts)
    run, _ = start(account, order)
    assert {host.zone for host in run.hosts} == {"us-east-1a"}
    assert len(alive(aws)) == 3


def test_typed_again_after_some_were_lost_the_rest_is_not_paid_for(aws, account, order):
    first, _ = start(account, order)
    ec2.terminate(account, first.hosts[:1])
    run, said = start(account, order)
    assert {host.zone for host in run.hosts} == {"us-east-1a"}
    assert {instance.id for instance in alive(aws)} == {host.instance_id for host in run.hosts}
    assert said == [
        "hosts of this launch stand in us-east-1b already",
        "no hosts in us-east-1b: only 2 of 3 hosts stand",
    ]


def test_hosts_of_this_launch_that_stopped_are_not_thrown_away(aws, account, order):
    order = dataclasses.replace(order, spot=False)
    first, _ = start(account, order)
    ec2.stop(account, first.hosts)
    complaint = r"trial .*stopped.*`python -m launcher start trial`.* kill trial`"
    with pytest.raises(ec2.Stopped, match=complaint):
        start(account, order)
    assert len(aws.instances("stopped")) == 3


def test_other_launches_of_that_name_are_not_touched(aws, account, order):
    first, _ = start(account, order)
    run, _ = start(account, dataclasses.replace(order, launch="launch-2"))
    assert {host.instance_id for host in run.hosts}.isdisjoint(
        {host.instance_id for host in first.hosts}
    )
    aws.refuse("RunInstances", "UnauthorizedOperation")
    with pytest.raises(UserError):
        start(account, dataclasses.replace(order, launch="launch-3"))
    assert len(alive(aws)) == 6


def interrupt(account: Account, operation: str, attempts: int = 5, after: bool = False) -> None:
    """Ctrl-C during the next request of this kind, before or after EC2 has it."""
    events = account.client("ec2", attempts=attempts).meta.events
    event = f"{'after' if after else 'before'}-call.ec2.{operation}"

    def press(**_: Any) -> None:
        events.unregister(event, unique_id="interrupt")
        raise KeyboardInterrupt

    events.register(event, press, unique_id="interrupt")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("operation", "attempts"), [("RunInstances", 1), ("CreateTags", 5)])
def test_ctrl_c_leaves_nothing_running(operation, attempts, after, aws, account, order):
    interrupt(account, operation, attempts, after)
    with pytest.raises(KeyboardInterrupt):
        start(account, order)
    assert aws.instances() or (operation == "RunInstances" and not after)
    assert alive(aws) == []


def test_ctrl_c_while_hosts_come_up_leaves_nothing_running(aws, account, order):
    def pending(instances: list[Instance]) -> None:
        for instance in instances:
            instance._state = InstanceState("pending", 0)
        interrupt(account, "DescribeInstances")

    aws.after_run = pending
    with pytest.raises(KeyboardInterrupt):
        start(account, order)
    assert len(aws.instances()) == 3
    assert alive(aws) == []


def test_ctrl_c_in_the_request_ends_also_what_ec2_shows_late(aws, account, order, monkeypatch):
    monkeypatch.setattr(ec2, "_LATE_SECONDS", 10.0)
    own, looks = runs.find, [0]

    def late(*words: Any, **more: Any) -> list[runs.Run]:
        looks[0] += 1
        return own(*words, **more) if looks[0] > 4 else []

    monkeypatch.setattr(ec2.runs, "find", late)
    interrupt(account, "RunInstances", attempts=1, after=True)
    with pytest.raises(KeyboardInterrupt):
        start(account, order)
    assert len(aws.instances()) == 3
    assert alive(aws) == []


def test_if_the_hosts_cannot_be_terminated_it_says_which_and_how(aws, account, order):
    aws.refuse("TerminateInstances", "UnauthorizedOperation", times=1000)
    interrupt(account, "CreateTags")
    with pytest.raises(UserError) as error:
        start(account, order)
    assert "hosts of trial may be running" in str(error.value)
    assert "AWS denies TerminateInstances" in str(error.value)
    assert "`python -m launcher kill trial`" in str(error.value)


def test_a_connection_that_breaks_in_the_request_starts_no_second_set(aws, account, order):
    """EC2 has started the hosts, and its answer was lost."""
    client = account.client("ec2", attempts=1)

    def lose(**_: Any) -> None:
        client.meta.events.unregister("after-call.ec2.RunInstances", unique_id="lose")
        raise ConnectionClosedError(endpoint_url="https://ec2")

    client.meta.events.register("after-call.ec2.RunInstances", lose, unique_id="lose")
    run, said = start(account, order)
    assert {instance.id for instance in aws.instances()} == {h.instance_id for h in run.hosts}
    assert said == ["asking EC2 in us-east-1b again for up to 90 s: no answer"]


def test_a_start_whose_answer_was_lost_and_which_is_then_refused_leaves_nothing(
    aws, account, order
):
    client = account.client("ec2", attempts=1)

    def lose(**_: Any) -> None:
        client.meta.events.unregister("after-call.ec2.RunInstances", unique_id="lose")
        aws.refuse("RunInstances", "VcpuLimitExceeded")
        raise ConnectionClosedError(endpoint_url="https://ec2")

    client.meta.events.register("after-call.ec2.RunInstances", lose, unique_id="lose")
    with pytest.raises(UserError, match="a quota of the account is reached"):
        start(account, order)
    assert len(aws.instances()) == 3
    assert alive(aws) == []


def test_hosts_that_another_command_goes_on_with_are_not_terminated(aws, account, order):
    interrupt(account, "CreateTags")
    with pytest.raises(KeyboardInterrupt):
        ec2.start(account, order, print, held=lambda: False)
    assert len(alive(aws)) == 3


def test_hosts_that_are_stopped_while_they_come_up_are_kept(aws, account, order):
    def stop(instances: list[Instance]) -> None:
        aws.after_run = lambda _: None
        for instance in instances:
            instance.stop()

    aws.after_run = stop
    with pytest.raises(ec2.Stopped, match=r"stopped: `python -m launcher start trial`"):
        start(account, dataclasses.replace(order, spot=False))
    assert len(aws.instances("stopped")) == 3


def test_undo_ends_one_launch_and_tells_what_it_ended(aws, account, order):
    first, _ = start(account, order)
    other, _ = start(account, dataclasses.replace(order, launch="launch-2"))
    ended = ec2.undo(account, "trial", "launch-1").terminated
    assert {host.instance_id for host in ended} == {host.instance_id for host in first.hosts}
    assert {i.id for i in alive(aws)} == {host.instance_id for host in other.hosts}
    assert ec2.undo(account, "trial", "launch-1") == ([], [])


def test_hosts_are_stopped_and_started_again(aws, account, order):
    run, _ = start(account, dataclasses.replace(order, spot=False))
    ec2.stop(account, run.hosts)
    stopped = ec2.wait(account, run, "stopped")
    assert [host.state for host in stopped.hosts] == ["stopped"] * 3
    ran = dataclasses.replace(
        stopped.hosts[0], launched=HOUR, ended=HOUR + timedelta(hours=3), hours_before=1.5
    )
    ec2.start_again(account, [ran, *stopped.hosts[1:]])
    run = ec2.wait(account, run, "running")
    assert [host.state for host in run.hosts] == ["running"] * 3
    assert run.hosts[0].hours_before == 4.5


def test_spot_hosts_cannot_be_stopped(aws, account, order):
    run, _ = start(account, order)
    with pytest.raises(UserError, match=r"spot hosts cannot be stopped.*kill them"):
        ec2.stop(account, run.hosts)
    assert len(aws.instances("running")) == 3


def test_without_room_stopped_hosts_stay_stopped(aws, account, order):
    run, _ = start(account, dataclasses.replace(order, spot=False))
    ec2.stop(account, run.hosts)
    aws.refuse("StartInstances", "InsufficientInstanceCapacity", status=500)
    with pytest.raises(UserError, match="us-east-1b has no room for the hosts now"):
        ec2.start_again(account, run.hosts)
    assert len(aws.asked("StartInstances")) == 1


def test_hosts_are_terminated_even_if_some_are_long_gone(aws, account, order):
    run, _ = start(account, order)
    forgotten = dataclasses.replace(run.hosts[0], instance_id="i-0123456789abcdef0")
    ec2.terminate(account, [forgotten, *run.hosts])
    ec2.terminate(account, [])
    assert alive(aws) == []
    gone = ec2.wait(account, run, "terminated")
    assert {host.state for host in gone.hosts} == {"terminated"}


def test_waiting_ends_when_hosts_have_come_to_another_end(aws, account, order, monkeypatch):
    run, _ = start(account, order)
    die(aws.instances()[0], "Server.SpotInstanceTermination")
    with pytest.raises(UserError, match=r"hosts of trial are terminated: Server\.Spot"):
        ec2.wait(account, run, "running")


def test_waiting_ends_after_a_while(aws, account, order, monkeypatch):
    monkeypatch.setattr(ec2, "_STATE_SECONDS", 0.05)
    run, _ = start(account, order)
    with pytest.raises(UserError, match="hosts of trial are running, not stopped"):
        ec2.wait(account, run, "stopped")


def start_one(aws: Cloud, account: Account, order: Order, zone: str = "us-east-1b") -> str:
    return ec2.start_one(account, order, zone, lambda _: None)


def lost_of(account: Account, order: Order, index: int) -> runs.Run:
    """A run of which one host is terminated."""
    run, _ = start(account, order)
    ec2.terminate(account, [host for host in run.hosts if host.index == index])
    return run


def test_one_host_is_started_beside_the_others_with_its_number_from_the_first(aws, account, order):
    """Not numbered afterwards: it has to be known by its number whatever happens to the watcher."""
    run = lost_of(account, order, 1)
    one = dataclasses.replace(order, number=1, round=1)
    aws.calls.clear()
    new = start_one(aws, account, one)
    asked = request(aws)
    assert (asked["MinCount"], asked["MaxCount"]) == (1, 1)
    for each in asked["TagSpecifications"]:
        tags = dict_of(each["Tags"])
        assert (tags[names.TAG_HOST], tags[names.TAG_NAME]) == ("1", "trial-1")
        assert (tags[names.TAG_LAUNCH], tags[names.TAG_PRICE]) == ("launch-1", "9.25")
    assert [name for name, _ in aws.calls] == ["RunInstances"]
    (found,) = runs.find(account)
    assert [host.instance_id for host in found.hosts] == [
        run.hosts[0].instance_id,
        new,
        run.hosts[2].instance_id,
    ]
    assert ec2.wait_for(account, "trial", [h.instance_id for h in found.hosts], "running") == found


def test_one_host_is_the_same_kind_of_host_as_the_others(aws, account, order):
    """With EFA, though it is started alone."""
    order = dataclasses.replace(order, max_price=12.0)
    start(account, order)
    before = request(aws)
    start_one(aws, account, dataclasses.replace(order, number=1, round=3))
    after = request(aws)
    assert interfaces(aws) == [(0, 0, "efa", True)]
    assert {name for name in before if before[name] != after[name]} == {
        *("ClientToken", "MaxCount", "MinCount", "TagSpecifications"),
    }


def test_the_same_order_of_one_host_gives_the_same_host(aws, account, order):
    one = dataclasses.replace(order, number=1, round=1)
    first = start_one(aws, account, one)
    assert start_one(aws, account, one) == first
    assert len(aws.instances()) == 1
    die(aws.instances()[0])
    assert start_one(aws, account, one) == first
    assert len(aws.instances()) == 1


def test_another_round_number_zone_or_launch_gives_another_host(aws, account, order):
    one = dataclasses.replace(order, number=1, round=1)
    orders = [
        one,
        dataclasses.replace(one, round=2),
        dataclasses.replace(one, number=2),
        dataclasses.replace(one, number=11, round=0),
        dataclasses.replace(one, launch="launch-2"),
    ]
    found = [start_one(aws, account, each) for each in orders]
    found.append(start_one(aws, account, one, "us-east-1a"))
    assert len(set(found)) == len(found)
    assert [start_one(aws, account, each) for each in orders] == found[:-1]


def test_all_hosts_of_another_round_are_others(aws, account, order):
    """The launch had hosts in this zone, and they are gone: EC2 would answer with those."""
    first, _ = start(account, order)
    ec2.terminate(account, first.hosts)
    second, said = start(account, dataclasses.replace(order, round=3))
    assert {host.zone for host in second.hosts} == {"us-east-1b"}
    assert said == []
    assert [host.index for host in second.hosts] == [0, 1, 2]
    assert len(aws.instances()) == 6


def test_the_request_of_a_launch_is_told_from_all_that_follow(aws, account, order):
    start(account, order)
    start_one(aws, account, dataclasses.replace(order, number=0))
    tokens = {asked["ClientToken"] for asked in aws.asked("RunInstances")}
    assert len(tokens) == 2 and all(len(token) == 64 for token in tokens)


@pytest.mark.parametrize("code", ["InsufficientInstanceCapacity", "SpotMaxPriceTooLow"])
def test_a_zone_without_room_for_one_more_host_is_said_to_be_full(code, aws, account, order):
    aws.full("us-east-1b", code)
    complaint = f"no room for host 1 of trial in us-east-1b: {code}, There is no capacity"
    with pytest.raises(ec2.Full, match=complaint):
        start_one(aws, account, dataclasses.replace(order, number=1))
    assert len(aws.asked("RunInstances")) == 1
    assert aws.instances() == []


def test_what_refuses_one_host_otherwise_is_not_for_want_of_room(aws, account, order):
    one = dataclasses.replace(order, number=1)
    for code in ("VcpuLimitExceeded", "UnauthorizedOperation"):
        aws.refuse("RunInstances", code)
        with pytest.raises(UserError) as error:
            start_one(aws, account, one)
        assert not isinstance(error.value, ec2.Full)


def test_with_another_price_the_host_of_the_token_is_taken(aws, account, order):
    """Of that number, and not another one that stands there."""
    start(account, order)
    ec2.terminate(account, [h for h in runs.find(account)[0].hosts if h.index == 1])
    one = dataclasses.replace(order, number=1, round=1)
    first = start_one(aws, account, one)
    changed = dataclasses.replace(one, prices={"us-east-1b": 9.5})
    assert start_one(aws, account, changed) == first
    ec2.terminate(account, [h for h in runs.find(account)[0].hosts if h.index == 1])
    with pytest.raises(ec2.Full, match="the hosts that this launch had there are gone"):
        start_one(aws, account, changed)


def test_that_no_zone_has_room_can_be_told_from_other_refusals(aws, account, order):
    for zone in ZONES:
        aws.full(zone)
    with pytest.raises(ec2.Full):
        start(account, order)
    aws.refusals.clear()
    aws.refuse("RunInstances", "VcpuLimitExceeded")
    with pytest.raises(UserError) as error:
        start(account, order)
    assert not isinstance(error.value, ec2.Full)


def test_that_stopped_hosts_find_no_room_can_be_told_from_other_refusals(aws, account, order):
    run, _ = start(account, dataclasses.replace(order, spot=False))
    ec2.stop(account, run.hosts)
    aws.refuse("StartInstances", "InsufficientInstanceCapacity", status=500)
    with pytest.raises(ec2.Full):
        ec2.start_again(account, run.hosts)
    aws.refuse("StartInstances", "UnauthorizedOperation")
    with pytest.raises(UserError) as error:
        ec2.start_again(account, run.hosts)
    assert not isinstance(error.value, ec2.Full)


def test_what_was_terminated_is_waited_for(aws, account, order):
    def end(_: Any) -> bool:
        for instance in aws.instances("shutting-down")[:1]:
            instance._state = InstanceState("terminated", 48)
        return False

    run, _ = start(account, order)
    ec2.terminate(account, run.hosts)
    for instance in aws.instances():
        instance._state = InstanceState("shutting-down", 32)
    aws.refuse("DescribeInstances", "never", when=end)
    aws.calls.clear()
    ec2.until_terminated(account, run.hosts)
    assert {instance.state for instance in aws.instances()} == {"terminated"}
    assert len(aws.asked("DescribeInstances")) == 3
