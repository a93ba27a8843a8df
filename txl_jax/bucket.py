"""A store in S3, or in what speaks its language; imports boto3, which takes a moment.

Region, endpoint and credentials are found by boto3's own means: AWS_ENDPOINT_URL, AWS_PROFILE, the
role of an EC2 machine … A large file goes in parts, several at a time, and appears when all are
there. What a killed process has sent of one stays in the bucket, unseen and paid for, until a
lifecycle rule of the bucket (AbortIncompleteMultipartUpload) takes it away.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import batched
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from txl_jax import storage
from txl_jax.errors import UserError
from txl_jax.store import StoreRefused

_SETTINGS = Config(
    # A request is given up after some 9 s: connecting or waiting for an answer, twice.
    connect_timeout=4,
    read_timeout=4,
    retries={"mode": "standard", "total_max_attempts": 2},
    max_pool_connections=32,
)
_TRANSFER = TransferConfig(num_download_attempts=2, preferred_transfer_client="classic")
_DELETED_AT_ONCE = 1000  # as S3 says


class Bucket:
    """Files below `folder/` in a bucket. Threads may share it.

    Raises UserError if the settings of AWS on this machine are damaged.
    """

    def __init__(self, bucket: str, folder: str):
        self._bucket = bucket
        self._folder = folder
        try:
            self._client = boto3.Session().client("s3", config=_SETTINGS)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"cannot use {self._url()}: {_line(error)}") from error

    def names(self, prefix: str = "") -> list[str]:
        """As `Store.names`."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._translated(prefix):
            return sorted(
                found["Key"].removeprefix(f"{self._folder}/")
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._key(prefix))
                for found in page.get("Contents", [])
            )

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
        with path.open("rb"), self._translated(name):
            self._client.upload_file(str(path), self._bucket, self._key(name), Config=_TRANSFER)

    def download(self, name: str, path: Path) -> None:
        """As `Store.download`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as file, self._translated(name):
            self._client.download_fileobj(
                self._bucket, self._key(name), file, Config=_TRANSFER
            )

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

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _url(self, name: str = "") -> str:
        return f"s3://{self._bucket}/{self._key(name)}"
