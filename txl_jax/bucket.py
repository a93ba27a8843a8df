"""A store in S3, or in what speaks its language; imports boto3, which takes a moment.

Region, endpoint and credentials are found by boto3's own means: AWS_ENDPOINT_URL, AWS_PROFILE, the
role of an EC2 machine … A large file goes in parts, several at a time, and appears when all are
there. What a killed process has sent of one stays in the bucket, unseen and paid for, until a
lifecycle rule of the bucket (AbortIncompleteMultipartUpload) takes it away.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.exceptions import RetriesExceededError as Boto3RetriesExceededError
from boto3.s3.transfer import TransferConfig
from botocore.awsrequest import AWSPreparedRequest
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)

from txl_jax import storage
from txl_jax.errors import UserError
from txl_jax.store import StoreAway, StoreRefused

_SETTINGS = Config(
    # A request is given up after some 11 s: connecting or waiting for an answer, three times.
    connect_timeout=3,
    read_timeout=3,
    retries={"mode": "standard", "total_max_attempts": 3},
    max_pool_connections=32,
)
_TRANSFER = TransferConfig(
    multipart_chunksize=16 << 20, num_download_attempts=3, preferred_transfer_client="classic"
)
_DELETED_AT_ONCE = 1000  # as S3 says
_NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
_REFUSED = (301, 401, 403)
_REFUSED_CODES = {
    *("AccessDenied", "AuthorizationHeaderMalformed"),
    *("ExpiredToken", "InvalidToken", "NoSuchBucket"),
}
_ABSENT_CODES = {"404", "NoSuchKey", "NotFound"}


class Bucket:
    """Files below `folder/` in a bucket. Threads may share it.

    Raises UserError if the settings of AWS on this machine are damaged.
    """

    def __init__(self, bucket: str, folder: str):
        self._bucket = bucket
        self._folder = folder
        self._stopped = threading.Event()
        try:
            self._client = boto3.Session().client("s3", config=_SETTINGS)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"cannot use {self._url('')}: {_line(error)}") from error
        self._client.meta.events.register("before-send.s3", self._before_send)

    def names(self, prefix: str = "") -> list[str]:
        """As `Store.names`."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._translated(prefix):
            keys = [
                found["Key"]
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._key(prefix))
                for found in page.get("Contents", [])
            ]
        # Some programs make empty objects that stand for folders.
        return sorted(key.removeprefix(self._key("")) for key in keys if not key.endswith("/"))

    def read(self, name: str) -> bytes:
        """As `Store.read`."""
        with self._translated(name):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name))
            return answer["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        """As `Store.write`."""
        with self._translated(name):
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content)

    def upload(self, name: str, path: Path) -> None:
        """As `Store.upload`; of a file that grows meanwhile, what was there at the beginning."""
        with self._translated(name):
            self._client.upload_file(str(path), self._bucket, self._key(name), Config=_TRANSFER)

    def download(self, name: str, path: Path) -> None:
        """As `Store.download`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as file, self._translated(name):
            self._client.download_fileobj(self._bucket, self._key(name), file, Config=_TRANSFER)

    def delete(self, names: Iterable[str]) -> None:
        """As `Store.delete`."""
        keys = sorted({self._key(name) for name in names})
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            some = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
            with self._translated(""):
                answer = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": some, "Quiet": True}
                )
                if failed := answer.get("Errors"):
                    raise ClientError({"Error": failed[0]}, "DeleteObjects")

    def stop(self) -> None:
        """As `Store.stop`; parts of a file that were sent are taken back, if S3 answers at once."""
        self._stopped.set()

    def _before_send(self, event_name: str, request: AWSPreparedRequest, **_: object) -> None:
        """Called by botocore before each try of each request."""
        takes_back = event_name.endswith(".AbortMultipartUpload")
        if not (takes_back and "attempt=1;" in str(request.headers["amz-sdk-request"])):
            self._check_stopped()
        if hasattr(request.body, "read"):
            request.body = _Body(request.body, self._check_stopped)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise StoreAway("given up")

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _url(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._key(name)}"

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turns what boto3 raises about a file into the errors of `Store`."""
        try:
            yield
        except (BotoCoreError, Boto3Error, ClientError) as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: BaseException) -> OSError:
        cause = error.last_exception if isinstance(error, Boto3RetriesExceededError) else error
        if isinstance(cause, Boto3Error) and cause.__context__:
            cause = cause.__context__  # boto3 raises its own error while it handles the client's
        line = f"{self._url(name)}: {_line(cause)}"
        if isinstance(cause, _NO_CREDENTIALS):
            return StoreRefused(f"{line} (by the environment, ~/.aws or the role of the machine)")
        if not isinstance(cause, ClientError):
            return StoreAway(line)
        code = cause.response.get("Error", {}).get("Code", "")
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status in _REFUSED or code in _REFUSED_CODES:
            return StoreRefused(line)
        return FileNotFoundError(line) if code in _ABSENT_CODES else StoreAway(line)


class _Body:
    """What a request sends, but each piece only if `check` does not raise: one may be slow."""

    def __init__(self, body: Any, check: Callable[[], None]):
        self._body = body
        self._check = check

    def read(self, *size: int) -> bytes:
        self._check()
        return self._body.read(*size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
