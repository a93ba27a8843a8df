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

from launcher import hardware, host_role, key_pair, log_bucket, network, standing
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
# What launches and commands do that cannot be tried without doing it, by what it is done to.
_EC2 = (
    *("AuthorizeSecurityGroupEgress", "AuthorizeSecurityGroupIngress", "CreatePlacementGroup"),
    *("CreateSecurityGroup", "CreateTags", "DescribeInstanceStatus", "ImportKeyPair"),
    *("RevokeSecurityGroupIngress", "RunInstances", "StartInstances", "StopInstances"),
    *("TerminateInstances",),
)
_BUCKET = (
    *("CreateBucket", "GetBucketPolicy", "ListBucket", "PutBucketOwnershipControls"),
    *("PutBucketPolicy", "PutBucketPublicAccessBlock", "PutBucketTagging"),
    *("PutEncryptionConfiguration", "PutLifecycleConfiguration"),
)
_FILES = ("GetObject", "PutObject")
_ROLE = ("CreateRole", "GetRole", "GetRolePolicy", "PassRole", "PutRolePolicy", "TagRole")
_PROFILE = (
    *("AddRoleToInstanceProfile", "CreateInstanceProfile", "GetInstanceProfile"),
    *("TagInstanceProfile",),
)
_PARAMETER = ("AddTagsToResource", "GetParameter", "PutParameter")
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
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("permissions", lambda: _permissions(account)),
        ("what launches share", lambda: _standing(account)),
    ]
    if kind:
        yield Finding("instance type", "good", f"{kind.name} is offered in {', '.join(kind.zones)}")
        looks += [
            ("starting hosts", lambda: _starting(account, kind)),
            ("price", lambda: _price(account, kind)),
            ("quota, spot", lambda: _quota(account, kind, options.machines, spot=True)),
            ("quota, on demand", lambda: _quota(account, kind, options.machines, spot=False)),
        ]
    with ThreadPoolExecutor() as threads:
        yield from threads.map(lambda look: _looked(*look), looks)
    yield _programs()


def _looked(what: str, look: Callable[[], Finding]) -> Finding:
    """What a look finds; that it is denied, or AWS away, is a finding too."""
    try:
        with explained():
            return look()
    except UserError as error:
        return Finding(what, "bad", str(error))


def _starting(account: Account, kind: InstanceType) -> Finding:
    """Whether the caller may start hosts; EC2 is asked without starting any."""
    image = hardware.image(account, kind)
    place = network.find(account, "")
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
    """What the caller's policies say of the actions that launches take."""
    what = "permissions"
    if account.caller.endswith(":root"):
        return Finding(what, "good", "the account's root may do everything")
    try:
        who = _principal(account)
        told = [each for group in _actions(account) for each in _simulated(account, who, *group)]
    except ClientError as error:
        return Finding(what, "unknown", f"not checked, as you may not ask: {error_code(error)}")
    denied = [each for each in told if each["EvalDecision"] != "allowed"]
    # What hangs on something that only a real request has may be allowed all the same.
    open_ones = [each for each in denied if each.get("MissingContextValues")]
    if names := sorted(each["EvalActionName"] for each in denied if each not in open_ones):
        return Finding(what, "bad", f"your policies do not allow {', '.join(names)}")
    if names := sorted(each["EvalActionName"] for each in open_ones):
        return Finding(what, "unknown", f"your policies set conditions to {', '.join(names)}")
    return Finding(what, "good", f"{len(told)} actions of EC2, IAM, S3 and SSM are allowed")


def _principal(account: Account) -> str:
    """ARN of the user or role whose policies hold; a session's does not tell its role's path."""
    assumed = _ASSUMED.fullmatch(account.caller)
    if not assumed:
        return account.caller
    return account.client("iam").get_role(RoleName=assumed[3])["Role"]["Arn"]


def _actions(account: Account) -> Iterator[tuple[list[str], str]]:
    """Actions, and what they are done to."""
    iam = f"arn:{account.partition}:iam::{account.id}"
    ssm = f"arn:{account.partition}:ssm:{account.region}:{account.id}"
    bucket = log_bucket.bucket_name(account, "")
    role = host_role.profile_name(account, bucket)
    for service, actions, resource in (
        ("ec2", _EC2, "*"),
        ("pricing", ("GetProducts",), "*"),
        ("s3", _BUCKET, f"arn:{account.partition}:s3:::{bucket}"),
        ("s3", _FILES, f"arn:{account.partition}:s3:::{bucket}/runs/a"),
        ("iam", _ROLE, f"{iam}:role{host_role.PATH}{role}"),
        ("iam", _PROFILE, f"{iam}:instance-profile{host_role.PATH}{role}"),
        ("ssm", _PARAMETER, f"{ssm}:parameter{key_pair.parameter(key_pair.key_name(account))}"),
    ):
        yield [f"{service}:{action}" for action in actions], resource


def _simulated(
    account: Account, who: str, actions: list[str], resource: str
) -> list[dict[str, Any]]:
    context = {"aws:RequestedRegion": account.region, "iam:PassedToService": "ec2.amazonaws.com"}
    pages = account.client("iam").get_paginator("simulate_principal_policy")
    return [
        told
        for page in pages.paginate(
            PolicySourceArn=who,
            ActionNames=actions,
            ResourceArns=[resource],
            ContextEntries=[
                {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
                for key, value in context.items()
            ],
        )
        for told in page["EvaluationResults"]
    ]


def _standing(account: Account) -> Finding:
    """What a launch would make."""
    bucket = log_bucket.bucket_name(account, "")
    missing = standing.missing(account, LaunchCommand(experiment=Config()), ())
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
