"""The role of the hosts: what a program on them may do in the account, and nothing else.

They may list, read, write and delete in the launcher's bucket.
"""

import hashlib
import json
from typing import Any

from botocore.exceptions import ClientError

from launcher.aws import Account, error_code, explained
from launcher.things import TAGS, Thing, is_ours
from txl_jax.errors import UserError

PATH = "/txl/"
_POLICY = "txl-host"
_LONGEST = 64  # as IAM says
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    ],
}


def profile_name(account: Account, bucket: str) -> str:
    """Name of the role, and of the profile that gives it to instances, for hosts with a bucket."""
    name = f"{_prefix(account)}{bucket}"
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(bucket.encode()).hexdigest()[:12]
    return f"{name[: _LONGEST - 13]}-{digest}"


def policy(account: Account, bucket: str) -> dict[str, Any]:
    """What the hosts may do."""
    arn = f"arn:{account.partition}:s3:::{bucket}"
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Sid": "Bucket",
                "Effect": "Allow",
                "Action": [
                    "s3:GetBucketLocation",
                    "s3:ListBucket",
                    "s3:ListBucketMultipartUploads",
                ],
                "Resource": arn,
            },
            {
                "Sid": "Files",
                "Effect": "Allow",
                "Action": [
                    "s3:AbortMultipartUpload",
                    "s3:DeleteObject",
                    "s3:GetObject",
                    "s3:ListMultipartUploadParts",
                    "s3:PutObject",
                ],
                "Resource": f"{arn}/*",
            },
        ],
    }


@explained()
def missing(account: Account, bucket: str) -> list[str]:
    """What `ensure` would make, in words."""
    name = profile_name(account, bucket)
    if _has_policy(account, name, bucket) and _profile(account, name).get("Roles"):
        return []
    return [f"role and instance profile {name}: the bucket {bucket} alone"]


@explained()
def ensure(account: Account, bucket: str) -> str:
    """Makes role and profile; returns the profile's name.

    EC2 knows a new profile only some seconds later (`ec2.start` waits for that).

    Raises UserError if a role of that name is not the launcher's.
    """
    iam, name = account.client("iam"), profile_name(account, bucket)
    if not _role(account, name):
        _unless(
            "EntityAlreadyExists",
            iam.create_role,
            RoleName=name,
            Path=PATH,
            AssumeRolePolicyDocument=json.dumps(_TRUST),
            Description="Hosts that train Transformer-XL",
            Tags=TAGS,
        )
    if not is_ours(_role(account, name).get("Tags")):
        raise UserError(f"the role {name} was not made by this launcher: rename or remove it")
    if not _has_policy(account, name, bucket):
        document = json.dumps(policy(account, bucket))
        iam.put_role_policy(RoleName=name, PolicyName=_POLICY, PolicyDocument=document)
    if not _profile(account, name).get("Roles"):
        _unless(
            "EntityAlreadyExists",
            iam.create_instance_profile,
            InstanceProfileName=name,
            Path=PATH,
            Tags=TAGS,
        )
        # A profile has one role at most: another launch may have put it there.
        _unless(
            "LimitExceeded",
            iam.add_role_to_instance_profile,
            InstanceProfileName=name,
            RoleName=name,
        )
    return name


@explained()
def unused(account: Account, in_use: set[str]) -> list[Thing]:
    """Roles for this region's hosts that no instance has.

    Args:
      in_use: names of the profiles that the region's instances have.
    """
    pages = account.client("iam").get_paginator("list_roles").paginate(PathPrefix=PATH)
    return [
        Thing("role", role["RoleName"])
        for page in pages
        for role in page["Roles"]
        if role["RoleName"].startswith(_prefix(account)) and role["RoleName"] not in in_use
    ]


@explained()
def remove(account: Account, name: str) -> None:
    """Removes role and profile."""
    iam = account.client("iam")
    for delete, parameters in (
        (
            iam.remove_role_from_instance_profile,
            {"InstanceProfileName": name, "RoleName": name},
        ),
        (iam.delete_instance_profile, {"InstanceProfileName": name}),
        (iam.delete_role_policy, {"RoleName": name, "PolicyName": _POLICY}),
        (iam.delete_role, {"RoleName": name}),
    ):
        _unless("NoSuchEntity", delete, **parameters)


def _prefix(account: Account) -> str:
    """IAM is the same in all regions, so the names tell whose hosts a role is for."""
    return f"txl-host-{account.region}-"


def _unless(code: str, ask: Any, **parameters: Any) -> dict[str, Any]:
    """AWS' answer; empty if it is the error of this code."""
    try:
        return ask(**parameters)
    except ClientError as error:
        if error_code(error) != code:
            raise
        return {}


def _role(account: Account, name: str) -> dict[str, Any]:
    return _unless("NoSuchEntity", account.client("iam").get_role, RoleName=name).get("Role", {})


def _has_policy(account: Account, name: str, bucket: str) -> bool:
    iam = account.client("iam")
    answer = _unless("NoSuchEntity", iam.get_role_policy, RoleName=name, PolicyName=_POLICY)
    return answer.get("PolicyDocument") == policy(account, bucket)


def _profile(account: Account, name: str) -> dict[str, Any]:
    iam = account.client("iam")
    answer = _unless("NoSuchEntity", iam.get_instance_profile, InstanceProfileName=name)
    return answer.get("InstanceProfile", {})
