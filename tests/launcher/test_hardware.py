"""Instance types, images and prices, as EC2 tells of them."""

import copy
import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from moto.core.responses import ActionResult
from moto.ec2.responses import EC2Response

from launcher import hardware
from launcher.aws import Account
from launcher.hardware import InstanceType
from tests.launcher.cloud import Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
UBUNTU_ARM = UBUNTU.replace("amd64", "arm64")
WITH_DRIVER = (
    "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
)
DEEP_LEARNING = "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) 20260101"
P3DN = InstanceType(
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
    zones=("us-east-1a", "us-east-1b"),
    efa_cards=(0,),
)
P4D = dataclasses.replace(P3DN, name="p4d.24xlarge", gpu_name="A100")
CPU = dataclasses.replace(P3DN, name="c5.large", gpus=0, gpu_name="", gpu_memory_gib=0.0)


def test_a_type_is_what_ec2_says(account):
    kind = hardware.describe(account, "p3dn.24xlarge")
    assert dataclasses.replace(kind, zones=P3DN.zones) == P3DN
    assert kind.zones == tuple(sorted(kind.zones))
    assert all(zone.startswith("us-east-1") for zone in kind.zones)


def test_a_type_with_several_network_cards_counts_them(account):
    kind = hardware.describe(account, "p4d.24xlarge")
    assert (kind.efa_interfaces, kind.network_cards, kind.efa_cards) == (4, 4, (0, 1, 2, 3))
    assert kind.network_gbps == 400.0
    assert (kind.gpu_name, kind.gpu_memory_gib) == ("A100", 40.0)


def test_a_type_without_gpus_has_none(account):
    kind = hardware.describe(account, "c5.large")
    assert (kind.gpus, kind.gpu_name, kind.gpu_memory_gib) == (0, "", 0.0)
    assert (kind.efa_interfaces, kind.efa_cards) == (0, ())
    assert (kind.memory_gib, kind.vcpus) == (4.0, 2)


def test_burstable_types_cannot_stand_close_together(account):
    assert not hardware.describe(account, "t3.large").clusters


def test_gpus_of_another_maker_do_not_count(account, monkeypatch):
    own = EC2Response.describe_instance_types

    def of_another_maker(response: EC2Response) -> Any:
        found: Any = own(response).result
        told = copy.deepcopy([dict(kind) for kind in found["InstanceTypes"]])
        told[0]["GpuInfo"]["Gpus"][0]["Manufacturer"] = "AMD"
        return ActionResult({"InstanceTypes": told})

    monkeypatch.setattr(EC2Response, "describe_instance_types", of_another_maker)
    kind = hardware.describe(account, "p3dn.24xlarge")
    assert (kind.gpus, kind.gpu_name) == (0, "")


def test_a_type_of_another_architecture_says_so(account):
    assert hardware.describe(account, "c7g.large").architecture == "arm64"
    with pytest.raises(UserError, match="x86_64_mac"):
        hardware.describe(account, "mac1.metal")


@pytest.mark.parametrize("name", ["p3dn.24xlarg", "p3*", "p3dn 24xlarge\n", ""])
def test_an_unknown_type_is_refused_in_one_line(name, account):
    with pytest.raises(UserError, match=r"^us-east-1 does not offer the instance type") as error:
        hardware.describe(account, name)
    assert str(error.value).isprintable()


def test_an_unknown_type_is_refused_with_the_nearest(account):
    with pytest.raises(UserError, match=r"did you mean p3dn\.24xlarge\?"):
        hardware.describe(account, "p3dn.24xlarg")


def test_a_type_that_no_zone_of_the_region_offers_is_refused(aws, account, monkeypatch):
    own = EC2Response.describe_instance_type_offerings

    def without_zones(response: EC2Response) -> Any:
        if response._get_param("LocationType") == "availability-zone":
            return ActionResult({"InstanceTypeOfferings": []})
        return own(response)

    monkeypatch.setattr(EC2Response, "describe_instance_type_offerings", without_zones)
    with pytest.raises(UserError, match="us-east-1 does not offer"):
        hardware.describe(account, "p3dn.24xlarge")


def test_volta_gets_plain_ubuntu_and_needs_a_driver(aws, account):
    image_id = aws.image()
    aws.public_parameter(UBUNTU, image_id)
    image = hardware.image(account, P3DN)
    assert image == hardware.Image(
        image_id, "ubuntu/images/hvm-ssd-gp3/noble", "ubuntu", "/dev/sda1", True, 15
    )


def test_later_gpus_get_the_image_that_has_a_driver(aws, account):
    image_id = aws.image(DEEP_LEARNING)
    aws.public_parameter(WITH_DRIVER, image_id)
    image = hardware.image(account, P4D)
    assert (image.id, image.user, image.needs_driver) == (image_id, "ubuntu", False)


def test_a_type_without_gpus_gets_plain_ubuntu_and_needs_no_driver(aws, account):
    aws.public_parameter(UBUNTU, aws.image())
    assert not hardware.image(account, CPU).needs_driver


def test_arm_gets_the_image_for_arm(aws, account):
    image_id = aws.image(architecture="arm64")
    aws.public_parameter(UBUNTU_ARM, image_id)
    kind = dataclasses.replace(CPU, architecture="arm64")
    assert hardware.image(account, kind).id == image_id


def test_an_image_can_be_wanted_by_id_or_by_parameter(aws, account):
    image_id = aws.image("my own, with everything in it")
    aws.client("ssm").put_parameter(Name="/my/image", Value=image_id, Type="String")
    image = hardware.image(account, P3DN, image_id)
    assert image == hardware.image(account, P3DN, "/my/image")
    assert not image.needs_driver


@pytest.mark.parametrize(
    ("name", "user"),
    [
        ("al2023-ami-2023.1", "ec2-user"),
        ("amzn2-ami-hvm", "ec2-user"),
        ("debian-13-amd64", "admin"),
        ("ubuntu/images/x", "ubuntu"),
        ("mine", "ubuntu"),
    ],
)
def test_the_login_name_follows_the_makers_of_the_image(aws, account, name, user):
    assert hardware.image(account, CPU, aws.image(name)).user == user


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ("ami-0123456789abcdef0", "there is no image ami-0123456789abcdef0 in us-east-1"),
        ("/no/such/parameter", "there is no SSM parameter /no/such/parameter in us-east-1"),
        ("$(id)\n", r"there is no image \$\(id\)\\n in us-east-1"),
    ],
)
def test_an_image_that_is_not_there_is_refused(account, wanted, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        hardware.image(account, CPU, wanted)
    assert str(error.value).isprintable()


def test_an_image_that_does_not_fit_is_refused(aws, account):
    arm = aws.image(architecture="arm64")
    with pytest.raises(UserError, match=r"is arm64, and c5\.large is x86_64; name another"):
        hardware.image(account, CPU, arm)
    with pytest.raises(UserError, match=r"open driver, which p3dn\.24xlarge's V100 cannot use"):
        hardware.image(account, P3DN, aws.image(DEEP_LEARNING))


def spot(monkeypatch: pytest.MonkeyPatch, *told: tuple[str, str, int]) -> None:
    """Lets EC2 tell these spot prices: zone, price, day."""
    history = [
        {
            "AvailabilityZone": zone,
            "SpotPrice": price,
            "Timestamp": datetime(2026, 1, day, tzinfo=UTC),
            "InstanceType": "p3dn.24xlarge",
        }
        for zone, price, day in told
    ]
    monkeypatch.setattr(
        EC2Response,
        "describe_spot_price_history",
        lambda _: ActionResult({"SpotPriceHistory": history}),
    )


def test_spot_prices_are_the_newest_of_the_zones_that_offer_the_type(aws, account, monkeypatch):
    spot(
        monkeypatch,
        ("us-east-1b", "9.5", 2),
        ("us-east-1a", "8.0", 1),
        ("us-east-1a", "7.25", 3),
        ("us-east-1a", "6.0", 2),
        ("us-east-1f", "1.0", 3),
    )
    assert hardware.prices(account, P3DN).spot == {"us-east-1a": 7.25, "us-east-1b": 9.5}
    (asked,) = aws.asked("DescribeSpotPriceHistory")
    assert asked["ProductDescriptions"] == ["Linux/UNIX"]


def pricing(account: Account, answer: Any, asked: list[Any]) -> None:
    """moto knows no prices: the account's client for them answers this."""
    client = account.client("pricing", "us-east-1", attempts=2)
    client.meta.events.register(
        "before-parameter-build.pricing.GetProducts",
        lambda params, **_: asked.append(params),
    )
    client.meta.events.register("before-call.pricing.GetProducts", lambda **_: answer)


@pytest.fixture
def prices_account(aws: Cloud) -> Account:
    """Whose clients no other test has."""
    return aws.account()


def product(price: str) -> str:
    dimension = {"pricePerUnit": {"USD": price}}
    return json.dumps({"terms": {"OnDemand": {"x": {"priceDimensions": {"y": dimension}}}}})


def test_the_price_on_demand_is_that_of_a_plain_linux_host(prices_account):
    asked: list[Any] = []
    found = {"PriceList": [product("0.0000000000"), product("31.2120000000")]}
    pricing(prices_account, (_Response(200), found), asked)
    assert hardware.prices(prices_account, P3DN).on_demand == 31.212
    fields = {entry["Field"]: entry["Value"] for entry in asked[0]["Filters"]}
    assert fields["instanceType"] == "p3dn.24xlarge"
    assert fields["regionCode"] == "us-east-1"
    assert (fields["operatingSystem"], fields["tenancy"]) == ("Linux", "Shared")


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"PriceList": []}),
        (200, {"PriceList": ["no JSON"]}),
        (200, {"PriceList": ['{"terms": {}}']}),
        (400, {"Error": {"Code": "AccessDeniedException", "Message": "no"}}),
    ],
)
def test_without_a_price_on_demand_the_launch_goes_on(prices_account, answer):
    status, told = answer
    pricing(prices_account, (_Response(status), told), [])
    assert hardware.prices(prices_account, P3DN).on_demand is None


@dataclasses.dataclass(frozen=True)
class _Response:
    status_code: int


def test_a_reservation_tells_its_zone(aws, account):
    told = {"State": "active", "InstanceType": "p3dn.24xlarge", "AvailabilityZone": "us-east-1c"}
    aws.reservations["cr-1"] = told
    assert hardware.reserved_zone(account, "cr-1", P3DN) == "us-east-1c"
    with pytest.raises(UserError, match=r"cr-1 is of p3dn\.24xlarge, not p4d\.24xlarge"):
        hardware.reserved_zone(account, "cr-1", P4D)
    with pytest.raises(UserError, match="no capacity reservation 'cr-2' in us-east-1"):
        hardware.reserved_zone(account, "cr-2", P3DN)
    aws.reservations["cr-1"]["State"] = "expired"
    with pytest.raises(UserError, match="cr-1 is expired, not active"):
        hardware.reserved_zone(account, "cr-1", P3DN)
