"""Fixtures: a bucket in a real S3 server (moto's), behind a proxy that can fail.

A pytest plugin: test modules say `pytest_plugins = ["tests.buckets"]`.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.faulty_s3 import FaultyS3

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
"""What keeps boto3 from this machine's own settings, and from the network."""


@dataclass(frozen=True)
class S3:
    """A bucket of its own for one test."""

    bucket: str
    url: str
    """Of a folder in the bucket, `s3://BUCKET/some/run`."""
    proxy: FaultyS3
    """Everything that the code under test asks for goes through it."""
    direct: Any
    """A client that goes past the proxy."""

    def contents(self) -> dict[str, bytes]:
        """Every file of the folder, by name."""
        prefix = self.url.removeprefix(f"s3://{self.bucket}/") + "/"
        keys = [
            found["Key"]
            for page in self.direct.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
            for found in page.get("Contents", [])
        ]
        return {
            key.removeprefix(prefix): self.direct.get_object(Bucket=self.bucket, Key=key)[
                "Body"
            ].read()
            for key in keys
        }


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture(scope="session")
def faulty_s3(moto_port: int) -> Iterator[FaultyS3]:
    with FaultyS3(moto_port) as proxy:
        yield proxy


@pytest.fixture
def s3(moto_port: int, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty_s3.url)
    direct = boto3.Session().client("s3", endpoint_url=f"http://127.0.0.1:{moto_port}")
    bucket = f"bucket-{uuid.uuid4().hex}"
    direct.create_bucket(Bucket=bucket)
    faulty_s3.requests.clear()
    faulty_s3.begun.clear()
    yield S3(bucket, f"s3://{bucket}/some/run", faulty_s3, direct)
    faulty_s3.mode = "ok"
    direct.close()
