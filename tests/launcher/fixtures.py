"""Fixtures: an empty account of AWS, and no way to a real one.

A pytest plugin: test modules say `pytest_plugins = ["tests.launcher.fixtures"]`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.backends import get_backend
from moto.server import ThreadedMotoServer

from launcher.aws import Account
from tests.launcher.cloud import Cloud

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    # moto would make 1,300 images anew for each test.
    "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",
}
_SERVICES = ("ec2", "iam", "s3", "ssm", "sts")


@pytest.fixture(scope="session")
def launcher_moto_url() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture(scope="session")
def kept() -> dict[str, Any]:
    """What is the same for all tests: boto3 takes a second to learn what EC2 speaks."""
    return {}


@pytest.fixture
def aws(
    launcher_moto_url: str, kept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cloud]:
    """An empty account; HOME is a folder of the test."""
    for name, value in {**_ENVIRONMENT, "AWS_ENDPOINT_URL": launcher_moto_url}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for service in _SERVICES:
        for regions in get_backend(service).values():
            for backend in regions.values():
                backend.reset()
    kept.setdefault("session", boto3.Session())
    aws = Cloud(launcher_moto_url, kept["session"])
    with aws.in_place():
        yield aws


@pytest.fixture
def account(aws: Cloud, kept: dict[str, Any]) -> Account:
    """Of the credentials; its clients are those of other tests too."""
    if "account" not in kept:
        kept["account"] = aws.account()
    return kept["account"]
