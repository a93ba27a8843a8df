"""Fixtures: an account of AWS in moto's server, with what moto lacks.

A pytest plugin: test modules say `pytest_plugins = ["tests.launcher.cloud"]`.
"""

from collections.abc import Callable
from typing import Any

import boto3
from moto.ec2.models import ec2_backends

from launcher.aws import Account

ACCOUNT = "123456789012"
REGION = "us-east-1"
PARAMETERS = "/aws/service"


class Cloud:
    """The account, as its tests see it."""

    def __init__(self, url: str):
        self.url = url
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """Every EC2 action that was asked for, with its parameters."""
        self.refusals: list[tuple[str, Callable[[dict[str, Any]], bool], str, str, int]] = []
        self.tokens: dict[str, tuple[dict[str, Any], Any]] = {}
        self.placement_groups: dict[str, dict[str, Any]] = {}
        self.after_run: Callable[[Any], None] = lambda _: None
        """Called with the reservation that RunInstances has just made."""

    def account(self) -> Account:
        return Account.open()

    def client(self, service: str, owner: str = ACCOUNT) -> Any:
        """A client past the code under test, in this account or in another."""
        client = boto3.Session().client(service, region_name=REGION, endpoint_url=self.url)
        client.meta.events.register(
            "before-send.*.*",
            lambda request, **_: request.headers.add_header("x-moto-account-id", owner),
        )
        return client

    def refuse(
        self,
        action: str,
        code: str,
        times: int = 1,
        message: str = "as the test wants it",
        when: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> None:
        """Lets an EC2 action fail the next times that its parameters fit."""
        self.refusals.append((action, when, code, message, times))

    def named(self, action: str) -> list[dict[str, Any]]:
        """Parameters of every call of an EC2 action."""
        return [parameters for name, parameters in self.calls if name == action]

    def instances(self, *states: str) -> list[Any]:
        """moto's own objects of the instances in these states."""
        return [
            instance
            for instance in ec2_backends[ACCOUNT][REGION].all_instances()
            if instance.state in states
        ]
