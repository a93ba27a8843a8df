"""What EC2 says of an instance type: its parts, where it is offered, image and prices."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from launcher.aws import Account, error_code, explained
from launcher.names import printable
from txl_jax.config import nearest
from txl_jax.errors import UserError

_UBUNTU = (
    "/aws/service/canonical/ubuntu/server/24.04/stable/current/{arch}/hvm/ebs-gp3/ami-id",
    {"x86_64": "amd64", "arm64": "arm64"},
)
_UBUNTU_WITH_DRIVER = (
    "/aws/service/deeplearning/ami/{arch}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
    {"x86_64": "x86_64", "arm64": "arm64"},
)
# The open kernel module, which is all that the images with a driver have, begins with Turing.
_CLOSED_DRIVER_ONLY = {"K80", "M60", "P4", "V100"}
_OPEN_DRIVER = "oss nvidia driver"
_PRICES_ARE_TOLD_IN = {"aws": "us-east-1", "aws-cn": "cn-northwest-1"}


@dataclass(frozen=True)
class InstanceType:
    """An instance type in one region, as EC2 describes it."""

    name: str
    gpus: int
    """NVIDIA GPUs."""
    gpu_name: str
    """As EC2 says, `V100`; empty without GPUs."""
    gpu_memory_gib: float
    """Of one GPU."""
    memory_gib: float
    vcpus: int
    efa_interfaces: int
    network_cards: int
    network_gbps: float
    """What it keeps up over all cards, not the bursts."""
    architecture: str
    """x86_64 or arm64."""
    zones: tuple[str, ...]
    """Availability zones of the region that offer it, sorted."""
    efa_cards: tuple[int, ...] = ()
    """Numbers of the network cards that take an EFA interface."""
    clusters: bool = True
    """Hosts of the type can stand in a cluster placement group."""


@dataclass(frozen=True)
class Image:
    """A machine image that an instance type can start from."""

    id: str
    name: str
    user: str
    """Login name."""
    root_device: str
    needs_driver: bool
    """The instance type has GPUs and the image, Ubuntu's own, no driver for them."""
    root_gib: int = 0
    """Size of the image's own root volume; a host's cannot be smaller."""


@dataclass(frozen=True)
class Prices:
    """US dollars an hour of one host."""

    on_demand: float | None
    """None: AWS does not tell."""
    spot: dict[str, float]
    """By zone, now."""


@explained()
def describe(account: Account, name: str) -> InstanceType:
    """Raises UserError for a type that the region does not offer, with the nearest one."""
    ec2 = account.client("ec2")
    try:
        found = ec2.describe_instance_types(InstanceTypes=[name])["InstanceTypes"]
    except ClientError as error:
        if error_code(error) not in ("InvalidInstanceType", "InvalidParameterValue"):
            raise
        found = []
    zones = _offered(account, "availability-zone", name) if found else []
    if not zones:
        known = _offered(account, "region")
        raise UserError(
            f"{account.region} does not offer the instance type {printable(name)!r}"
            f"{nearest(name, known)}"
        )
    return _instance_type(found[0], tuple(sorted(zones)))


@explained()
def image(account: Account, kind: InstanceType, wanted: str = "") -> Image:
    """The image that a host of this type starts from.

    Args:
      wanted: an AMI's id, or the name of an SSM parameter that holds one. Empty: Ubuntu 24.04, with
        a driver where there are GPUs that AWS has an image with a driver for.

    Raises UserError if there is no such image, or if it does not fit the instance type.
    """
    if not wanted:
        own_driver = not kind.gpus or kind.gpu_name in _CLOSED_DRIVER_ONLY
        name, words = _UBUNTU if own_driver else _UBUNTU_WITH_DRIVER
        wanted = name.format(arch=words[kind.architecture])
    known_as = printable(wanted)
    image_id = _parameter(account, wanted) if wanted.startswith("/") else wanted
    try:
        found = account.client("ec2").describe_images(ImageIds=[image_id])["Images"]
    except ClientError as error:
        if not error_code(error).startswith("InvalidAMIID"):
            raise
        found = []
    if not found:
        raise UserError(f"there is no image {known_as} in {account.region}")
    return _fitting_image(found[0], kind, known_as)


@explained()
def prices(account: Account, kind: InstanceType) -> Prices:
    """What a host costs now, spot in each zone that offers it, and on demand."""
    pages = account.client("ec2").get_paginator("describe_spot_price_history")
    newest: dict[str, tuple[datetime, float]] = {}
    for page in pages.paginate(
        InstanceTypes=[kind.name],
        ProductDescriptions=["Linux/UNIX"],
        StartTime=datetime.now(UTC),  # leaves the prices that hold now
    ):
        for told in page["SpotPriceHistory"]:
            zone, price = told["AvailabilityZone"], (told["Timestamp"], float(told["SpotPrice"]))
            if zone in kind.zones:
                newest[zone] = max(newest.get(zone, price), price)
    spot = {zone: price for zone, (_, price) in sorted(newest.items())}
    return Prices(_on_demand(account, kind), spot)


@explained()
def reserved_zone(account: Account, reservation: str, kind: InstanceType) -> str:
    """The zone of a capacity reservation or capacity block, the only one where it can be used.

    Raises UserError if it does not exist, is not active, or is of another instance type.
    """
    ec2 = account.client("ec2")
    try:
        found = ec2.describe_capacity_reservations(CapacityReservationIds=[reservation])
    except ClientError as error:
        if not error_code(error).startswith("InvalidCapacityReservationId"):
            raise
        raise UserError(
            f"there is no capacity reservation {printable(reservation)!r} in {account.region}"
        ) from error
    (told,) = found["CapacityReservations"]
    if told["State"] != "active":
        raise UserError(f"the capacity reservation {reservation} is {told['State']}, not active")
    if told["InstanceType"] != kind.name:
        raise UserError(
            f"the capacity reservation {reservation} is of {told['InstanceType']}, not {kind.name}"
        )
    return told["AvailabilityZone"]


def _offered(account: Account, where: str, name: str = "") -> list[str]:
    """Zones that offer a type, or without a name the types that the region offers."""
    pages = account.client("ec2").get_paginator("describe_instance_type_offerings")
    only = [{"Name": "instance-type", "Values": [name]}] if name else []
    return [
        offer["Location" if name else "InstanceType"]
        for page in pages.paginate(LocationType=where, Filters=only)
        for offer in page["InstanceTypeOfferings"]
    ]


def _instance_type(told: dict[str, Any], zones: tuple[str, ...]) -> InstanceType:
    gpus = [
        gpu
        for gpu in (told.get("GpuInfo") or {}).get("Gpus", [])
        if gpu["Manufacturer"].upper() == "NVIDIA"
    ]
    network = told["NetworkInfo"]
    efa = network.get("EfaInfo", {}).get("MaximumEfaInterfaces", 0)
    cards = network.get("NetworkCards", [])
    return InstanceType(
        name=told["InstanceType"],
        gpus=sum(gpu["Count"] for gpu in gpus),
        gpu_name=gpus[0]["Name"] if gpus else "",
        gpu_memory_gib=gpus[0]["MemoryInfo"]["SizeInMiB"] / 1024 if gpus else 0.0,
        memory_gib=told["MemoryInfo"]["SizeInMiB"] / 1024,
        vcpus=told["VCpuInfo"]["DefaultVCpus"],
        efa_interfaces=efa,
        network_cards=network["MaximumNetworkCards"],
        network_gbps=sum(card.get("BaselineBandwidthInGbps", 0.0) for card in cards),
        architecture=_architecture(told),
        zones=zones,
        efa_cards=tuple(
            card["NetworkCardIndex"] for card in cards if "efa" in card.get("InterfaceTypes", [])
        )[:efa]
        or tuple(range(efa)),
        clusters="cluster" in told["PlacementGroupInfo"]["SupportedStrategies"],
    )


def _architecture(told: dict[str, Any]) -> str:
    offered = told["ProcessorInfo"]["SupportedArchitectures"]
    for known in ("x86_64", "arm64"):
        if known in offered:
            return known
    raise UserError(f"{told['InstanceType']} is {', '.join(offered)}, for which there is no JAX")


def _parameter(account: Account, name: str) -> str:
    try:
        return account.client("ssm").get_parameter(Name=name)["Parameter"]["Value"]
    except ClientError as error:
        if error_code(error) not in ("ParameterNotFound", "ValidationException"):
            raise
        raise UserError(
            f"there is no SSM parameter {printable(name)} in {account.region}; "
            "--image takes one that holds an AMI's id, or an AMI's id"
        ) from error


def _fitting_image(told: dict[str, Any], kind: InstanceType, known_as: str) -> Image:
    name = printable(told.get("Name", ""))
    about = f"{name} {told.get('Description', '')}".lower()
    complaint = ""
    if told["State"] != "available":
        complaint = f"is {told['State']}"
    elif told.get("Platform", "").lower() == "windows":
        complaint = "is Windows"
    elif told["RootDeviceType"] != "ebs":
        complaint = "does not start from an EBS volume"
    elif told["Architecture"] != kind.architecture:
        complaint = f"is {told['Architecture']}, and {kind.name} is {kind.architecture}"
    elif kind.gpu_name in _CLOSED_DRIVER_ONLY and _OPEN_DRIVER in about:
        complaint = f"has the open driver, which {kind.name}'s {kind.gpu_name} cannot use"
    if complaint:
        raise UserError(f"the image {known_as} ({name}) {complaint}; name another with --image")
    root = told["RootDeviceName"]
    return Image(
        id=told["ImageId"],
        name=name,
        user=_login_name(about),
        root_device=root,
        needs_driver=kind.gpus > 0 and name.startswith("ubuntu/"),
        root_gib=max(
            (
                mapping["Ebs"].get("VolumeSize", 0)
                for mapping in told.get("BlockDeviceMappings", [])
                if mapping["DeviceName"] == root and "Ebs" in mapping
            ),
            default=0,
        ),
    )


def _login_name(about: str) -> str:
    """What the makers of images call the first user; Ubuntu's, where the image does not tell."""
    if "ubuntu" in about:
        return "ubuntu"
    if any(word in about for word in ("al2023", "amazon linux", "amzn")):
        return "ec2-user"
    return "admin" if "debian" in about else "ubuntu"


def _on_demand(account: Account, kind: InstanceType) -> float | None:
    told_in = _PRICES_ARE_TOLD_IN.get(account.partition)
    if not told_in:
        return None
    wanted = {
        "instanceType": kind.name,
        "regionCode": account.region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
        "marketoption": "OnDemand",
    }
    try:
        answer = account.client("pricing", told_in, attempts=2).get_products(
            ServiceCode="AmazonEC2",
            Filters=[
                {"Type": "TERM_MATCH", "Field": field, "Value": value}
                for field, value in wanted.items()
            ],
        )
        found = [
            float(dimension["pricePerUnit"]["USD"])
            for product in answer["PriceList"]
            for term in json.loads(product)["terms"]["OnDemand"].values()
            for dimension in term["priceDimensions"].values()
        ]
    except (BotoCoreError, Boto3Error, ClientError, LookupError, ValueError):
        # The launch goes on without it: not everybody may ask, and China pays in yuan.
        return None
    return min((price for price in found if price > 0), default=None)
