"""What moto's EC2 lacks for a launcher, and what happens to hosts when their instances change.

Requests for the same hosts by ClientToken, zones without capacity, prices, placement groups, public
addresses on loopback, and the instance profile of every host of a request.
"""

import base64
import contextlib
import hashlib
import ipaddress
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from moto.ec2.models import EC2Backend, ec2_backends
from moto.ec2.models.amis import Ami
from moto.ec2.models.instances import Instance, Reservation
from moto.ec2.models.instances import InstanceState as State

from tests.cloud import prices
from tests.cloud.server import Answer, Call, Refusal, Server

ACCOUNT = "123456789012"
UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
WITH_DRIVER = (
    "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
)
USER_DATA_LIMIT = 16384
_PENDING, _RUNNING = State("pending", 0), State("running", 16)
_STOPPED, _TERMINATED = State("stopped", 80), State("terminated", 48)


@dataclass(frozen=True)
class Image:
    """A machine image."""

    id: str
    name: str
    owner: str
    driver: bool


IMAGES = {
    UBUNTU: Image(
        "ami-0ub0ntu24040000",
        "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-20260101",
        "099720109477",
        False,
    ),
    WITH_DRIVER: Image(
        "ami-0dee0000000dri0e",
        "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) 20260101",
        "898082745236",
        True,
    ),
}
"""By the name of their public parameter."""


@dataclass
class Ec2:
    """EC2 of one region."""

    server: Server
    region: str
    started: Callable[[Instance, bool], None]
    """Called with an instance and whether it is new, when a host has to start."""
    ended: Callable[[Instance], None]
    """Called when a host has to turn itself off."""
    full: set[str] = field(default_factory=set)
    """Zones without capacity."""
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Placement groups."""
    quotas: dict[str, float] = field(default_factory=dict)
    """vCPUs by the code of the quota; others are 1000."""
    denied: set[str] = field(default_factory=set)
    """Actions that a simulation of the caller's policies denies."""
    boots: dict[str, int] = field(default_factory=dict)
    """How often an instance was started again."""
    _requests: dict[str, tuple[str, Reservation]] = field(default_factory=dict)
    """By ClientToken: the request's hash, and what it started."""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def backend(self) -> EC2Backend:
        return ec2_backends[ACCOUNT][self.region]

    def open(self, network: str) -> contextlib.ExitStack:
        """Puts all of it in place, until the result is closed. `network`: the VPC's addresses."""
        self._make_network(network)
        for image in IMAGES.values():
            ami = Ami(
                self.backend,
                image.id,
                name=image.name,
                owner_id=image.owner,
                public=True,
                virtualization_type="hvm",
                architecture="x86_64",
                root_device_type="ebs",
                root_device_name="/dev/sda1",
                hypervisor="xen",
                region_name=f"{self.region}a",
            )
            assert isinstance(ami, Ami)
            self.backend.amis[image.id] = ami
        self.server.checks.append(self._check)
        answers: dict[str, Answer] = {
            "ssm:GetParameter": self._get_parameter,
            "ec2:CreatePlacementGroup": self._create_group,
            "ec2:DescribePlacementGroups": self._describe_groups,
            "ec2:DeletePlacementGroup": self._delete_group,
            "ec2:DescribeSpotPriceHistory": self._spot_prices,
            "pricing:GetProducts": self._products,
            "servicequotas:GetServiceQuota": self._quota,
            "iam:SimulatePrincipalPolicy": self._simulate,
        }
        self.server.answers.update(answers)
        stack = contextlib.ExitStack()
        for name in ("run_instances", "start_instances", "stop_instances", "terminate_instances"):
            stack.enter_context(
                mock.patch.object(EC2Backend, name, _bound(getattr(self, f"_{name}"), name))
            )
        name = "associate_iam_instance_profile"
        stack.enter_context(
            mock.patch.object(EC2Backend, name, _bound(self._associate_profile, name))
        )
        return stack

    def instances(self, *states: str) -> list[Instance]:
        """Those in one of the states, or all."""
        return [i for i in self.backend.all_instances() if not states or i.state in states]

    def instance(self, name: str) -> Instance:
        return self.backend.get_instance(name)

    def set_running(self, instance: Instance) -> None:
        with self._lock:
            if instance.state == "pending":
                _set(instance, _RUNNING)

    def turned_off(self, instance: Instance) -> None:
        """A host turned itself off: it stops or ends, as its request said."""
        with self._lock:
            if instance.state not in ("pending", "running"):
                return
            if instance.instance_initiated_shutdown_behavior == "terminate":
                instance.terminate()
            else:
                instance.stop()
            instance.state_reason.code = "Client.InstanceInitiatedShutdown"

    def take_back(self, instance: Instance) -> None:
        """Ends a spot instance, as EC2 does when it needs the machine."""
        with self._lock:
            instance.terminate()
            instance.state_reason.code = "Server.SpotInstanceTermination"
        self.ended(instance)

    def hardware(self, kind: str) -> dict[str, Any]:
        return dict(self.backend.describe_instance_types([kind])[0])

    def _make_network(self, network: str) -> None:
        """Moves the default VPC to `network`, with a subnet for each zone."""
        backend = self.backend
        vpc = backend.default_vpc
        for subnet in backend.describe_subnets(filters={"vpc-id": vpc.id}):
            backend.delete_subnet(subnet.id)
        vpc.cidr_block = network
        for association in vpc.cidr_block_association_set:
            association["cidr_block"] = network
        for zone in backend.describe_availability_zones():
            backend.create_default_subnet(zone.name)

    def _check(self, call: Call) -> None:
        """What EC2 looks at before it starts hosts."""
        if (call.service, call.operation) != ("ec2", "RunInstances"):
            return
        parameters = call.parameters
        image = parameters.get("ImageId", "")
        if image not in self.backend.amis:
            raise Refusal("InvalidAMIID.NotFound", f"The image id '[{image}]' does not exist")
        data = base64.b64decode(parameters.get("UserData", ""))
        if len(data) > USER_DATA_LIMIT:
            raise Refusal("InvalidParameterValue", "User data is limited to 16384 bytes")
        group = parameters.get("Placement.GroupName")
        if group and group not in self.groups:
            raise Refusal(
                "InvalidPlacementGroup.Unknown", f"The Placement Group '{group}' is unknown."
            )
        kind, zone = parameters["InstanceType"], self._zone(parameters)
        if zone not in self._zones(kind):
            message = f"Your requested instance type ({kind}) is not supported in {zone}."
            raise Refusal("Unsupported", message)
        if parameters.get("DryRun") != "true" and not self._known(parameters):
            self._check_capacity(parameters, kind, zone)

    def _check_capacity(self, parameters: dict[str, Any], kind: str, zone: str) -> None:
        if zone in self.full:
            message = f"We currently do not have sufficient {kind} capacity in {zone}."
            raise Refusal("InsufficientInstanceCapacity", message, 500)
        if wanted := parameters.get("InstanceMarketOptions.SpotOptions.MaxPrice"):
            price = prices.spot(kind, self._vcpus(kind), zone)
            if float(wanted) < price:
                message = f"Your Spot request price of {wanted} is lower than the minimum {price}."
                raise Refusal("SpotMaxPriceTooLow", message)

    def _known(self, parameters: dict[str, Any]) -> bool:
        return parameters.get("ClientToken", "") in self._requests

    def _zone(self, parameters: dict[str, Any]) -> str:
        subnet = parameters.get("SubnetId") or parameters.get("NetworkInterface.1.SubnetId")
        if subnet:
            return str(self.backend.get_subnet(subnet).availability_zone)
        return (
            parameters.get("Placement.AvailabilityZone")
            or self._zones(parameters["InstanceType"])[0]
        )

    def _zones(self, kind: str) -> list[str]:
        offers = self.backend.describe_instance_type_offerings(
            "availability-zone", {"instance-type": [kind]}
        )
        return sorted(offer["Location"] for offer in offers)

    def _vcpus(self, kind: str) -> int:
        return self.hardware(kind)["VCpuInfo"]["DefaultVCpus"]

    def _run_instances(self, run: Callable[..., Reservation], *args: Any, **words: Any) -> Any:
        parameters = self.server.current.call.parameters
        token = parameters.get("ClientToken", "")
        said = {name: value for name, value in parameters.items() if name != "ClientToken"}
        digest = hashlib.sha256(repr(sorted(said.items())).encode()).hexdigest()
        with self._lock:
            if token in self._requests:
                before, reservation = self._requests[token]
                if before != digest:
                    message = "The same client token came with another request before."
                    raise Refusal("IdempotentParameterMismatch", message)
                return self.backend.reservations[reservation.id]
            reservation = run(*args, **words)
            if token:
                self._requests[token] = digest, reservation
            profile = words.get("iam_instance_profile_name"), words.get("iam_instance_profile_arn")
            for instance in reservation.instances:
                _set(instance, _PENDING)
                instance.placement.group_name = parameters.get("Placement.GroupName", "")
                instance.security_groups = list(instance.nics[0].group_set)
                self._set_public_address(instance, 0)
                if any(profile):
                    self.backend.associate_iam_instance_profile(instance.id, *profile)
        for instance in reservation.instances:
            self.started(instance, True)
        return reservation

    def _start_instances(self, start: Callable[..., Any], ids: list[str]) -> Any:
        for instance in map(self.instance, ids):
            if instance.state not in ("stopped", "running", "pending"):
                message = f"The instance '{instance.id}' is not in a state from which it can start."
                raise Refusal("IncorrectInstanceState", message)
        stopped = [i for i in map(self.instance, ids) if i.state == "stopped"]
        with self._lock:
            changes = start(ids)
            for instance in stopped:
                _set(instance, _PENDING)
                self.boots[instance.id] = self.boots.get(instance.id, 0) + 1
                self._set_public_address(instance, self.boots[instance.id])
        for instance in stopped:
            self.started(instance, False)
        return changes

    def _stop_instances(self, stop: Callable[..., Any], ids: list[str]) -> Any:
        for instance in map(self.instance, ids):
            if instance.lifecycle == "spot":
                message = f"You can't stop the Spot Instance '{instance.id}'."
                raise Refusal("UnsupportedOperation", message)
        return self._off(stop, ids)

    def _terminate_instances(self, terminate: Callable[..., Any], ids: list[str]) -> Any:
        return self._off(terminate, ids)

    def _off(self, act: Callable[..., Any], ids: list[str]) -> Any:
        on = [i for i in map(self.instance, ids) if i.state in ("pending", "running")]
        with self._lock:
            changes = act(ids)
        for instance in on:
            self.ended(instance)
        return changes

    def _associate_profile(
        self, associate: Callable[..., Any], instance_id: str, *args: Any, **words: Any
    ) -> Any:
        known = self.backend.iam_instance_profile_associations
        return known.get(instance_id) or associate(instance_id, *args, **words)

    def _set_public_address(self, instance: Instance, boot: int) -> None:
        """Another loopback address at every start; only where EC2 would give one."""
        if instance.nics[0].public_ip is not None:
            _, _, *rest = str(instance.private_ip).split(".")
            instance.nics[0].public_ip = ".".join(["127", str(100 + boot), *rest])

    def _get_parameter(self, call: Call) -> dict[str, Any] | None:
        """Public parameters; others are moto's."""
        name = call.parameters["Name"]
        if name not in IMAGES:
            return None
        value = {"Name": name, "Type": "String", "Value": IMAGES[name].id, "Version": 1}
        return {"Parameter": value | {"DataType": "text"}}

    def _create_group(self, call: Call) -> str:
        name = call.parameters["GroupName"]
        if name in self.groups:
            message = f"The Placement Group '{name}' already exists."
            raise Refusal("InvalidPlacementGroup.Duplicate", message)
        tags = {
            value: call.parameters[f"{key[:-4]}.Value"]
            for key, value in call.parameters.items()
            if key.startswith("TagSpecification.1.Tag.") and key.endswith(".Key")
        }
        strategy = call.parameters.get("Strategy", "cluster")
        self.groups[name] = {
            "id": f"pg-{len(self.groups):017x}",
            "strategy": strategy,
            "tags": tags,
        }
        return f"<placementGroup>{self._group(name)}</placementGroup>"

    def _describe_groups(self, call: Call) -> str:
        names = call.numbered("GroupName")
        for name in names:
            if name not in self.groups:
                message = f"The Placement Group '{name}' is unknown."
                raise Refusal("InvalidPlacementGroup.Unknown", message)
        found = [name for name in names or self.groups if self._matches(name, call.filters())]
        items = "".join(f"<item>{self._group(name)}</item>" for name in found)
        return f"<placementGroupSet>{items}</placementGroupSet>"

    def _delete_group(self, call: Call) -> str:
        name = call.parameters["GroupName"]
        if name not in self.groups:
            message = f"The Placement Group '{name}' is unknown."
            raise Refusal("InvalidPlacementGroup.Unknown", message)
        used = [i for i in self.instances("pending", "running", "stopped")]
        if any(instance.placement.group_name == name for instance in used):
            message = f"The placement group {name} is in use and may not be deleted."
            raise Refusal("InvalidPlacementGroup.InUse", message)
        del self.groups[name]
        return "<return>true</return>"

    def _matches(self, name: str, filters: dict[str, list[str]]) -> bool:
        group = self.groups[name]
        known = {"group-name": name, "strategy": group["strategy"], "state": "available"}
        known |= {f"tag:{key}": value for key, value in group["tags"].items()}
        for key, values in filters.items():
            if key == "tag-key":
                if not set(values) & set(group["tags"]):
                    return False
            elif known.get(key) not in values:
                return False
        return True

    def _group(self, name: str) -> str:
        group = self.groups[name]
        tags = "".join(
            f"<item><key>{key}</key><value>{value}</value></item>"
            for key, value in group["tags"].items()
        )
        return (
            f"<groupName>{name}</groupName><strategy>{group['strategy']}</strategy>"
            f"<state>available</state><groupId>{group['id']}</groupId><tagSet>{tags}</tagSet>"
        )

    def _spot_prices(self, call: Call) -> str:
        kinds = call.numbered("InstanceType") or call.filters().get("instance-type", [])
        wanted = call.filters().get("availability-zone") or [
            call.parameters.get("AvailabilityZone", "")
        ]
        items = [
            prices.spot_history(kind, self._vcpus(kind), zone)
            for kind in kinds
            for zone in self._zones(kind)
            if wanted == [""] or zone in wanted
        ]
        names = {name: name[0].lower() + name[1:] for name in (items[0] if items else {})}
        text = "".join(
            "<item>"
            + "".join(f"<{names[name]}>{value}</{names[name]}>" for name, value in item.items())
            + "</item>"
            for item in items
        )
        return f"<spotPriceHistorySet>{text}</spotPriceHistorySet><nextToken/>"

    def _quota(self, call: Call) -> dict[str, Any]:
        code = call.parameters["QuotaCode"]
        return {"Quota": {"QuotaCode": code, "Value": self.quotas.get(code, 1000.0)}}

    def _simulate(self, call: Call) -> str:
        actions = [
            value
            for name, value in call.parameters.items()
            if name.startswith("ActionNames.member.")
        ]
        members = "".join(
            f"<member><EvalActionName>{action}</EvalActionName><EvalDecision>"
            f"{'implicitDeny' if action in self.denied else 'allowed'}</EvalDecision></member>"
            for action in actions
        )
        return f"<EvaluationResults>{members}</EvaluationResults><IsTruncated>false</IsTruncated>"

    def _products(self, call: Call) -> dict[str, Any]:
        wanted = {entry["Field"]: entry["Value"] for entry in call.parameters.get("Filters", [])}
        kind, region = wanted["instanceType"], wanted.get("regionCode", self.region)
        return {"PriceList": [prices.product(kind, self._vcpus(kind), region)]}


def addresses(instance: Instance) -> list[str]:
    """The private address, and the public one if there is one."""
    found = [instance.private_ip, instance.public_ip]
    return [str(ipaddress.ip_address(address)) for address in found if address]


def tags(instance: Instance) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in instance.get_tags()}


def _set(instance: Instance, state: State) -> None:
    instance._state.name, instance._state.code = state.name, state.code


def _bound(act: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A method of moto's class that calls `act` with moto's own method, and reports refusals."""
    own = getattr(EC2Backend, name)

    def method(backend: EC2Backend, *args: Any, **words: Any) -> Any:
        return act(own.__get__(backend), *args, **words)

    return method
