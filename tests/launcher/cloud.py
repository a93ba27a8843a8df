"""An account of AWS in moto's server, with what moto lacks of EC2."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import boto3
from moto.core.responses import ActionResult, EmptyResult
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends
from moto.ec2.responses import EC2Response
from moto.ssm.models import Parameter, ssm_backends

from launcher.aws import Account

ACCOUNT = "123456789012"
OTHER_ACCOUNT = "999999999999"
REGION = "us-east-1"

Parameters = dict[str, Any]


def always(_: Parameters) -> bool:
    return True


@dataclass
class Refusal:
    """What some calls of an action are answered."""

    action: str
    code: str
    message: str
    status: int
    times: int
    when: Callable[[Parameters], bool]


class Cloud:
    """The account, as tests see it."""

    def __init__(self, url: str, session: boto3.Session):
        self.url = url
        self._session = session
        self.calls: list[tuple[str, Parameters]] = []
        """Every EC2 action that was asked for, with its parameters."""
        self.refusals: list[Refusal] = []
        self.placement_groups: dict[str, Parameters] = {}
        self.reservations: dict[str, Parameters] = {}
        """Capacity reservations, by id."""
        self.after_run: Callable[[list[Any]], None] = lambda _: None
        """Called with moto's instances that RunInstances has just made."""
        self._tokens: dict[str, tuple[Parameters, Any]] = {}

    def account(self, region: str = "") -> Account:
        return Account.open(region)

    def client(self, service: str, owner: str = ACCOUNT, region: str = REGION) -> Any:
        """A client past the code under test, in this account or in another."""
        client = self._session.client(service, region_name=region, endpoint_url=self.url)
        client.meta.events.register(
            f"before-sign.{service}",
            lambda request, **_: request.headers.add_header("x-moto-account-id", owner),
        )
        return client

    def refuse(
        self,
        action: str,
        code: str,
        message: str = "as the test wants it",
        status: int = 400,
        times: int = 1,
        when: Callable[[Parameters], bool] = always,
    ) -> None:
        """Lets the next `times` calls of an EC2 action fail whose parameters fit."""
        self.refusals.append(Refusal(action, code, message, status, times, when))

    def full(self, zone: str, code: str = "InsufficientInstanceCapacity") -> None:
        """Lets every RunInstances in the zone fail."""
        subnet = self.subnets()[zone]
        self.refuse(
            "RunInstances",
            code,
            f"There is no capacity in {zone}.",
            status=500,  # as EC2 answers
            times=1000,
            when=lambda parameters: parameters["NetworkInterfaces"][0]["SubnetId"] == subnet,
        )

    def asked(self, action: str) -> list[Parameters]:
        """Parameters of every call of an EC2 action."""
        return [parameters for name, parameters in self.calls if name == action]

    def instances(self, *states: str) -> list[Any]:
        """moto's own objects of the instances in these states, or of all."""
        return [
            instance
            for instance in ec2_backends[ACCOUNT][REGION].all_instances()
            if not states or instance.state in states
        ]

    def subnets(self) -> dict[str, str]:
        found = ec2_backends[ACCOUNT][REGION].describe_subnets(filters={"default-for-az": ["true"]})
        return {subnet.availability_zone: subnet.id for subnet in found}

    def public_parameter(self, name: str, value: str) -> None:
        """An SSM parameter of AWS itself, which nobody else can make."""
        versions: list[Any] = ssm_backends[ACCOUNT][REGION]._parameters[name]
        versions.append(
            Parameter(
                account_id=ACCOUNT,
                name=name,
                value=value,
                parameter_type="String",
                description=None,
                allowed_pattern=None,
                keyid=None,
                last_modified_date=datetime.now(UTC),
                version=1,
                data_type="text",
            )
        )

    def image(
        self, name: str = "ubuntu/images/hvm-ssd-gp3/noble", architecture: str = "x86_64"
    ) -> str:
        """Id of a new image."""
        image_id = self.client("ec2").register_image(Name=name, RootDeviceName="/dev/sda1")[
            "ImageId"
        ]
        image = ec2_backends[ACCOUNT][REGION].amis[image_id]
        image.root_device_type, image.architecture = "ebs", architecture
        return image_id

    def answer(self, response: EC2Response, own: Callable[[EC2Response], Any]) -> Any:
        """moto's own answer to a call of EC2, or a refusal."""
        action, parameters = response._get_action(), dict(response.params)
        self.calls.append((action, parameters))
        for refusal in self.refusals:
            if refusal.action == action and refusal.times and refusal.when(parameters):
                refusal.times -= 1
                error = EC2ClientError(refusal.code, refusal.message)
                _, headers, body = response.serialized(ActionResult(error))
                return refusal.status, {**headers, "status": refusal.status}, body
        return own(response)

    def run_instances(self, response: EC2Response, own: Callable[[EC2Response], Any]) -> Any:
        """As moto, but a token that is known is answered with what it has started."""
        parameters = dict(response.params)
        token = parameters.pop("ClientToken")
        if token not in self._tokens:
            answer = own(response)
            self._tokens[token] = parameters, answer
            instances = answer.result.instances
            for instance in instances:
                instance.placement.group_name = parameters.get("Placement", {}).get("GroupName", "")
            self.after_run(instances)
        first, answer = self._tokens[token]
        if first != parameters:
            raise EC2ClientError("IdempotentParameterMismatch", "not the same request")
        return answer

    def create_placement_group(self, response: EC2Response) -> ActionResult:
        name = response._get_param("GroupName")
        if name in self.placement_groups:
            raise EC2ClientError("InvalidPlacementGroup.Duplicate", f"{name} exists")
        self.placement_groups[name] = {
            "GroupName": name,
            "Strategy": response._get_param("Strategy"),
            "State": "available",
            "Tags": response._get_param("TagSpecifications")[0]["Tags"],
        }
        return ActionResult({"PlacementGroup": self.placement_groups[name]})

    def delete_placement_group(self, response: EC2Response) -> ActionResult:
        if self.placement_groups.pop(response._get_param("GroupName"), None) is None:
            raise EC2ClientError("InvalidPlacementGroup.Unknown", "there is none")
        return EmptyResult()

    def describe_placement_groups(self, response: EC2Response) -> ActionResult:
        return ActionResult({"PlacementGroups": list(self.placement_groups.values())})

    def describe_capacity_reservations(self, response: EC2Response) -> ActionResult:
        (wanted,) = response._get_param("CapacityReservationIds")
        if wanted not in self.reservations:
            raise EC2ClientError("InvalidCapacityReservationId.NotFound", "there is none")
        return ActionResult({"CapacityReservations": [self.reservations[wanted]]})

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """moto's EC2 answers as this class says."""
        own_answer, own_run = EC2Response.call_action, EC2Response.run_instances
        with ExitStack() as stack:
            for name, act in {
                "call_action": lambda response: self.answer(response, own_answer),
                "run_instances": lambda response: self.run_instances(response, own_run),
                "create_placement_group": lambda response: self.create_placement_group(response),
                "delete_placement_group": lambda response: self.delete_placement_group(response),
                "describe_placement_groups": lambda response: self.describe_placement_groups(
                    response
                ),
                "describe_capacity_reservations": (
                    lambda response: self.describe_capacity_reservations(response)
                ),
            }.items():
                stack.enter_context(mock.patch.object(EC2Response, name, act, create=True))
            yield
