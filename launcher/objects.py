"""Objects in the launcher's bucket, which has to be the account's own."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from launcher.aws import Account, error_code, explained
from launcher.names import printable
from txl_jax import storage
from txl_jax.errors import UserError
from txl_jax.json_values import parse

_DOWNLOADS = 8
_ABSENT = {"404", "NoSuchBucket", "NoSuchKey"}
_EMPTY = "InvalidRange"
_CHANGED = {"412", "ConditionalRequestConflict", "PreconditionFailed"}


class Changed(UserError):
    """An object is not the one any more that was to be replaced."""


def read(account: Account, bucket: str, key: str, last_bytes: int = 0) -> bytes | None:
    """An object, or the end of it; None if there is no such object or bucket."""
    content, _ = read_version(account, bucket, key, last_bytes)
    return content


@explained()
def read_version(
    account: Account, bucket: str, key: str, last_bytes: int = 0
) -> tuple[bytes | None, str]:
    """As `read`, and which version of the object it is; an empty one where there is none."""
    part = {"Range": f"bytes=-{last_bytes}"} if last_bytes else {}
    try:
        answer = account.client("s3").get_object(
            Bucket=bucket, Key=key, ExpectedBucketOwner=account.id, **part
        )
        return answer["Body"].read(), answer["ETag"]
    except ClientError as error:
        if error_code(error) == _EMPTY:
            return b"", ""
        if error_code(error) not in _ABSENT:
            raise
        return None, ""


@explained()
def read_from(account: Account, bucket: str, key: str, start: int) -> bytes | None:
    """What an object holds from its byte `start` on; None if there is no such object."""
    try:
        answer = account.client("s3").get_object(
            Bucket=bucket, Key=key, ExpectedBucketOwner=account.id, Range=f"bytes={start}-"
        )
        return answer["Body"].read()
    except ClientError as error:
        if error_code(error) == _EMPTY:
            return b""
        if error_code(error) not in _ABSENT:
            raise
        return None


def download(account: Account, bucket: str, root: str, names: Iterable[str], folder: Path) -> None:
    """Copies objects whose keys are `root` and a name to files of these names in a folder.

    Folders are made if need be; each file comes whole or not at all. The names must not lead out of
    the folder. Raises UserError if a file cannot be written.
    """
    with ThreadPoolExecutor(_DOWNLOADS) as threads:
        copies = [
            threads.submit(_download, account, bucket, root + name, folder / name) for name in names
        ]
        for copied in copies:
            copied.result()


@explained()
def _download(account: Account, bucket: str, key: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as file:
            account.client("s3").download_fileobj(
                bucket, key, file, ExtraArgs={"ExpectedBucketOwner": account.id}
            )
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {printable(str(path))}: {reason}") from error


def read_json(account: Account, bucket: str, key: str) -> Any:
    """What an object says in JSON; None if it is not there, or is no JSON."""
    return parse(read(account, bucket, key))


@explained()
def write(
    account: Account, bucket: str, key: str, content: bytes, replaces: str | None = None
) -> str:
    """Makes an object, or replaces one; returns its version.

    `replaces`: the version that is to be replaced, empty for none; None: whatever is there.

    Raises Changed if another one is there.
    """
    condition = {}
    if replaces is not None:
        condition = {"IfMatch": replaces} if replaces else {"IfNoneMatch": "*"}
    try:
        answer = account.client("s3").put_object(
            Bucket=bucket, Key=key, Body=content, ExpectedBucketOwner=account.id, **condition
        )
        return answer["ETag"]
    except ClientError as error:
        if error_code(error) not in _CHANGED:
            raise
        raise Changed(f"s3://{bucket}/{key} was written by another at this moment") from error


def write_json(
    account: Account, bucket: str, key: str, content: Any, replaces: str | None = None
) -> str:
    """As `write`, of something that JSON can say."""
    content = json.dumps(content, indent=2).encode() + b"\n"
    return write(account, bucket, key, content, replaces)


@explained()
def clock(account: Account, bucket: str) -> datetime:
    """What time it is by S3's clock, as `written` tells it: this machine's may be wrong."""
    answer = account.client("s3").head_bucket(Bucket=bucket, ExpectedBucketOwner=account.id)
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])


@explained()
def exists(account: Account, bucket: str, key: str) -> bool:
    """Whether there is such an object."""
    try:
        account.client("s3").head_object(Bucket=bucket, Key=key, ExpectedBucketOwner=account.id)
    except ClientError as error:
        if error_code(error) not in _ABSENT:
            raise
        return False
    return True


@explained()
def written(account: Account, bucket: str, prefix: str) -> dict[str, datetime]:
    """When each object was written whose key begins so; none where there is no such bucket."""
    pages = account.client("s3").get_paginator("list_objects_v2")
    try:
        return {
            found["Key"]: found["LastModified"].astimezone(UTC)
            for page in pages.paginate(Bucket=bucket, Prefix=prefix, ExpectedBucketOwner=account.id)
            for found in page.get("Contents", [])
        }
    except ClientError as error:
        if error_code(error) not in _ABSENT:
            raise
        return {}
