"""Looks whether a launch could succeed: credentials, permissions, quotas, offers, this machine."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from botocore.exceptions import ClientError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher import hardware, log_bucket, network, standing
from launcher.amounts import dollars
from launcher.aws import Account, error_code, error_message, explained
from launcher.hardware import InstanceType
from launcher.options import InRegion
from launcher.request import LaunchCommand
from txl_jax.config import ClusterConfig, Config
from txl_jax.errors import UserError

_UNHEALTHY_STATUS = 1
_DRY_RUN = "DryRunOperation"
_ASSUMED = re.compile(r"(arn:[^:]+):sts::(\d+):assumed-role/([^/]+).*")
_ACTIONS = [
    *("iam:AddRoleToInstanceProfile", "iam:CreateInstanceProfile", "iam:CreateRole"),
    *("iam:PassRole", "iam:PutRolePolicy", "pricing:GetProducts", "s3:CreateBucket"),
    *("s3:GetObject", "s3:ListBucket", "s3:PutBucketPolicy", "s3:PutEncryptionConfiguration"),
    *("s3:PutObject", "ssm:GetParameter", "ssm:PutParameter"),
]
"""What a first launch does that cannot be tried without doing it."""
_QUOTAS = (
    (r"p5.*", "L-C4BD4855", "L-417A185B"),
    (r"p.*", "L-7212CCBC", "L-417A185B"),
    (r"(g|vt).*", "L-3819A6DF", "L-DB2E81BA"),
    (r"[acdhimrtz]\d.*", "L-34B43A08", "L-1216C47A"),
)
"""By the instance type's name: codes of the quotas of vCPUs, spot and on demand."""

Verdict = Literal["good", "bad", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Options(InRegion):
    """Options of the command."""

    instance_type: str = ClusterConfig.instance_type
    """Type of the hosts that a launch would start."""
    machines: int = 1
    """How many of them."""
    json: bool = False
    """As JSON, for programs."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, and how it is."""

    what: str
    verdict: Verdict
    text: str


def main(options: Options) -> int:
    """0 if nothing is bad, else 1. Raises UserError if AWS does not know the credentials."""
    account = Account.open(options.region)
    console = Console(stderr=True)
    with console.status("asking AWS …"):
        found = list(_findings(account, options))
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        Console(highlight=False).print(_table(found))
    return _UNHEALTHY_STATUS if any(finding.verdict == "bad" for finding in found) else 0


def _findings(account: Account, options: Options) -> Iterator[Finding]:
    yield Finding("credentials", "good", f"{account.caller} in account {account.id}")
    try:
        kind = hardware.describe(account, options.instance_type)
    except UserError as error:
        yield Finding("instance type", "bad", str(error))
        kind = None
    looks: list[Callable[[], Finding]] = [
        lambda: _permissions(account),
        lambda: _standing(account),
    ]
    if kind:
        yield Finding("instance type", "good", f"{kind.name} is offered in {', '.join(kind.zones)}")
        looks += [
            lambda: _starting(account, kind),
            lambda: _price(account, kind),
            lambda: _quota(account, kind, options.machines, spot=True),
            lambda: _quota(account, kind, options.machines, spot=False),
        ]
    with ThreadPoolExecutor() as threads:
        yield from threads.map(lambda look: look(), looks)
    yield _programs()


@explained()
def _starting(account: Account, kind: InstanceType) -> Finding:
    """Whether the caller may start hosts; EC2 is asked without starting any."""
    try:
        image = hardware.image(account, kind)
        place = network.find(account, "")
    except UserError as error:
        return Finding("starting hosts", "bad", str(error))
    zones = [zone for zone in kind.zones if place and zone in place.subnets]
    subnet = {"SubnetId": place.subnets[zones[0]]} if place and zones else {}
    return _dry_run(
        "starting hosts",
        lambda: account.client("ec2", attempts=1).run_instances(
            ImageId=image.id,
            InstanceType=kind.name,
            MinCount=1,
            MaxCount=1,
            DryRun=True,
            **subnet,
        ),
    )


def _dry_run(what: str, ask: Callable[[], Any]) -> Finding:
    try:
        ask()
    except ClientError as error:
        if error_code(error) == _DRY_RUN:
            return Finding(what, "good", "EC2 would allow it")
        if error_code(error) == "UnauthorizedOperation":
            action = "ec2:RunInstances"
            return Finding(
                what, "bad", f"AWS denies {action}: ask the account's administrator for it"
            )
        return Finding(what, "unknown", f"{error_code(error)}: {error_message(error)}")
    return Finding(what, "unknown", "EC2 did not say")


def _permissions(account: Account) -> Finding:
    """What the caller's policies say of the actions that a first launch takes."""
    what = "permissions"
    if account.caller.endswith(":root"):
        return Finding(what, "good", "the account's root may do everything")
    who = _ASSUMED.sub(r"\1:iam::\2:role/\3", account.caller)
    try:
        pages = account.client("iam").get_paginator("simulate_principal_policy")
        denied = [
            told["EvalActionName"]
            for page in pages.paginate(PolicySourceArn=who, ActionNames=_ACTIONS)
            for told in page["EvaluationResults"]
            if told["EvalDecision"] != "allowed"
        ]
    except ClientError as error:
        return Finding(what, "unknown", f"you may not ask for your own: {error_code(error)}")
    if denied:
        return Finding(what, "bad", f"your policies do not allow {', '.join(sorted(denied))}")
    return Finding(what, "good", f"{len(_ACTIONS)} actions of IAM, S3 and SSM are allowed")


def _standing(account: Account) -> Finding:
    """What a launch would make."""
    try:
        bucket = log_bucket.bucket_name(account, "")
        command = LaunchCommand(experiment=Config())
        missing = standing.missing(account, command)
    except UserError as error:
        return Finding("what launches share", "bad", str(error))
    text = f"a launch makes: {'; '.join(missing)}" if missing else f"all there; bucket {bucket}"
    return Finding("what launches share", "good", text)


def _price(account: Account, kind: InstanceType) -> Finding:
    prices = hardware.prices(account, kind)
    spot = min(prices.spot.items(), key=lambda item: item[1], default=None)
    parts = [f"spot {dollars(spot[1])} in {spot[0]}"] if spot else ["no spot price"]
    if prices.on_demand is not None:
        parts.append(f"on demand {dollars(prices.on_demand)}")
    return Finding("price", "good", f"{', '.join(parts)}, an hour of one host")


def _quota(account: Account, kind: InstanceType, machines: int, spot: bool) -> Finding:
    what = f"quota, {'spot' if spot else 'on demand'}"
    codes = next((codes for form, *codes in _QUOTAS if re.fullmatch(form, kind.name)), None)
    if not codes:
        return Finding(what, "unknown", f"no quota is known for {kind.name}")
    code = codes[0] if spot else codes[1]
    try:
        told = account.client("service-quotas").get_service_quota(
            ServiceCode="ec2", QuotaCode=code
        )["Quota"]["Value"]
    except ClientError as error:
        return Finding(what, "unknown", f"Service Quotas: {error_code(error)}")
    room = int(told) // kind.vcpus
    text = f"{told:.0f} vCPUs: {room} x {kind.name}, less what runs already"
    if room >= machines:
        return Finding(what, "good", text)
    return Finding(what, "bad", f"{text}; raise {code} of EC2 in Service Quotas for {machines}")


def _programs() -> Finding:
    programs = [name for name in ("ssh", "git") if not shutil.which(name)]
    modules = [name for name in ("fabric", "tensorboard") if not importlib.util.find_spec(name)]
    if missing := programs + modules:
        return Finding("this machine", "bad", f"not installed: {', '.join(missing)}")
    mosh = "mosh" if shutil.which("mosh") else "no mosh"
    return Finding("this machine", "good", f"ssh, git, {mosh}, TensorBoard")


def _table(found: list[Finding]) -> Table:
    styles = {"good": "green", "bad": "bold red", "unknown": "yellow"}
    table = Table.grid(padding=(0, 2))
    for finding in found:
        verdict = Text(finding.verdict, styles[finding.verdict])
        table.add_row(verdict, Text(finding.what), Text(finding.text))
    return table
