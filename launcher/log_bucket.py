"""The bucket of logs, checkpoints and launch records: private, encrypted, over TLS only.

Every request says whose the bucket must be, so that nothing is ever written to, or read from, a
bucket that somebody else has made under the expected name.
"""

import json
import re
from typing import Any

from botocore.exceptions import ClientError

from launcher.aws import Account, error_code, explained
from launcher.names import printable
from launcher.things import TAGS, Thing, is_ours
from txl_jax.errors import UserError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")  # a dot would not fit S3's certificates
_NOT_PUBLIC = {
    "BlockPublicAcls": True,
    "IgnorePublicAcls": True,
    "BlockPublicPolicy": True,
    "RestrictPublicBuckets": True,
}
_TLS_ONLY = "TlsOnly"
_ABSENT = {"404", "NoSuchBucket"}
_FORBIDDEN = {"403", "AccessDenied"}
_UNSET = {
    *("NoSuchBucketPolicy", "NoSuchLifecycleConfiguration", "NoSuchTagSet"),
    *("NoSuchPublicAccessBlockConfiguration", "ServerSideEncryptionConfigurationNotFoundError"),
}
_ABANDONED_UPLOADS = {
    "ID": "abandoned uploads",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
}


def bucket_name(account: Account, wanted: str) -> str:
    """The bucket that a launch uses: the wanted one, or the account's own in the region.

    Raises UserError for a name that it cannot have.
    """
    if wanted and not _NAME.fullmatch(wanted):
        raise UserError(
            f"{printable(wanted)!r} cannot be a bucket: 3 to 63 small letters, digits and hyphens"
        )
    return wanted or f"txl-{account.id}-{account.region}"


@explained()
def missing(account: Account, bucket: str) -> list[str]:
    """What `ensure` would make or set, in words."""
    if not _stands(account, bucket):
        return [f"bucket {bucket}: private, encrypted, over TLS only"]
    if _is_ours(account, bucket) and not _is_closed(account, bucket):
        return [f"settings of the bucket {bucket}: private, encrypted, over TLS only"]
    return []


@explained()
def ensure(account: Account, bucket: str) -> None:
    """Makes the bucket, or closes it again if its settings were opened.

    A bucket that the user made is used as it stands.

    Raises UserError if it belongs to another account or lies in another region.
    """
    if not _stands(account, bucket):
        _create(account, bucket)
        _call(account, "put_bucket_tagging", bucket, Tagging={"TagSet": TAGS})
    if _is_ours(account, bucket) and not _is_closed(account, bucket):
        _close(account, bucket)


@explained()
def unused(account: Account) -> list[Thing]:
    """The account's own bucket, if nothing is in it."""
    bucket = bucket_name(account, "")
    if not _stands(account, bucket) or not _is_ours(account, bucket):
        return []
    listed = _call(account, "list_objects_v2", bucket, MaxKeys=1)
    return [] if listed.get("Contents") else [Thing("bucket", bucket)]


@explained()
def remove(account: Account, name: str) -> None:
    """Removes an empty bucket."""
    try:
        _call(account, "delete_bucket", name)
    except ClientError as error:
        if error_code(error) not in _ABSENT:
            raise


def _call(account: Account, operation: str, bucket: str, **parameters: Any) -> dict[str, Any]:
    ask = getattr(account.client("s3"), operation)
    return ask(Bucket=bucket, ExpectedBucketOwner=account.id, **parameters)


def _setting(account: Account, operation: str, bucket: str) -> dict[str, Any]:
    """What is set; empty if nothing is."""
    try:
        return _call(account, operation, bucket)
    except ClientError as error:
        if error_code(error) not in _UNSET:
            raise
        return {}


def _stands(account: Account, bucket: str) -> bool:
    try:
        answer = _call(account, "head_bucket", bucket)
    except ClientError as error:
        if error_code(error) in _ABSENT:
            return False
        if error_code(error) in _FORBIDDEN:
            raise _not_ours(bucket) from error
        raise
    region = answer.get("BucketRegion", account.region)
    if region != account.region:
        raise UserError(
            f"the bucket {bucket} is in {region} and the hosts would be in {account.region}: name "
            "another with --bucket, or the same region with --region"
        )
    return True


def _not_ours(bucket: str) -> UserError:
    return UserError(
        f"the bucket {bucket} belongs to another account, or these credentials may not see it: "
        "name another with --bucket"
    )


def _create(account: Account, bucket: str) -> None:
    s3 = account.client("s3")
    # us-east-1 is where buckets are without a word, and its name is refused.
    elsewhere = {"CreateBucketConfiguration": {"LocationConstraint": account.region}}
    try:
        s3.create_bucket(Bucket=bucket, **(elsewhere if account.region != "us-east-1" else {}))
    except ClientError as error:
        if error_code(error) == "BucketAlreadyExists":
            raise _not_ours(bucket) from error
        # Another launch makes it at this moment, or has just done so.
        if error_code(error) not in ("BucketAlreadyOwnedByYou", "OperationAborted"):
            raise
    s3.get_waiter("bucket_exists").wait(
        Bucket=bucket,
        ExpectedBucketOwner=account.id,
        WaiterConfig={"Delay": 1, "MaxAttempts": 30},
    )


def _is_ours(account: Account, bucket: str) -> bool:
    # A launch that was killed between making and tagging has left the account's own name.
    return bucket == bucket_name(account, "") or is_ours(
        _setting(account, "get_bucket_tagging", bucket).get("TagSet")
    )


def _is_closed(account: Account, bucket: str) -> bool:
    public = _setting(account, "get_public_access_block", bucket)
    return (
        public.get("PublicAccessBlockConfiguration") == _NOT_PUBLIC
        and _tls_only(account, bucket) in _statements(account, bucket)
        and bool(_setting(account, "get_bucket_encryption", bucket))
    )


def _close(account: Account, bucket: str) -> None:
    _call(
        account,
        "put_public_access_block",
        bucket,
        PublicAccessBlockConfiguration=_NOT_PUBLIC,
    )
    _call(account, "put_bucket_tagging", bucket, Tagging={"TagSet": TAGS})
    if not _setting(account, "get_bucket_encryption", bucket):
        by_s3 = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
        _call(
            account,
            "put_bucket_encryption",
            bucket,
            ServerSideEncryptionConfiguration={"Rules": [by_s3]},
        )
    _call(
        account,
        "put_bucket_ownership_controls",
        bucket,
        OwnershipControls={"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]},
    )
    if not _setting(account, "get_bucket_lifecycle_configuration", bucket):
        _call(
            account,
            "put_bucket_lifecycle_configuration",
            bucket,
            LifecycleConfiguration={"Rules": [_ABANDONED_UPLOADS]},
        )
    others = [
        statement for statement in _statements(account, bucket) if statement.get("Sid") != _TLS_ONLY
    ]
    statements = [*others, _tls_only(account, bucket)]
    policy = {"Version": "2012-10-17", "Statement": statements}
    # Last: it is what shows that the bucket is closed, should this be cut off.
    _call(account, "put_bucket_policy", bucket, Policy=json.dumps(policy))


def _statements(account: Account, bucket: str) -> list[dict[str, Any]]:
    told = _setting(account, "get_bucket_policy", bucket).get("Policy")
    return json.loads(told)["Statement"] if told else []


def _tls_only(account: Account, bucket: str) -> dict[str, Any]:
    arn = f"arn:{account.partition}:s3:::{bucket}"
    return {
        "Sid": _TLS_ONLY,
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [arn, f"{arn}/*"],
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
