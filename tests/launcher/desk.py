"""A laptop before the local cloud: commands of the launcher that tests type there."""

import json
import os
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any

import pytest

from launcher import ec2, hardware, names, standing
from launcher.__main__ import main
from launcher.aws import Account
from launcher.bootstrap import HostKey, user_data
from launcher.on_host.keeper import StopRules
from launcher.request import parse
from launcher.runs import Run
from tests.cloud.cloud import LocalCloud
from txl_jax.errors import UserError

BUCKET = "txl-123456789012-us-east-1"


@dataclass
class Desk:
    """The laptop: its commands run in this process, and what they print is read."""

    cloud: LocalCloud
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: str) -> str:
        """What a command prints; it has to succeed."""
        self.capsys.readouterr()
        status = main(list(words))
        said = self.capsys.readouterr().out
        assert status == 0, said
        return said

    def rent(self, name: str, machines: int = 1, *options: str) -> Run:
        """Hosts of a run, as a launch starts them, without anything on them."""
        words = ["--config=quickstart", "--name", name, "--instance-type=c7i.large"]
        words += [f"--machines={machines}", "--ssh-cidr=127.0.0.0/8", *options]
        account, command = Account.open(), parse(words).command
        allowed = [ip_network("127.0.0.0/8")]
        made = standing.ensure(account, command, allowed, ["us-east-1a", "us-east-1b"])
        kind = hardware.describe(account, "c7i.large")
        launch = secrets.token_hex(8)
        host_key = HostKey.of(made.key_path.read_bytes(), launch)
        image = hardware.image(account, kind)
        order = ec2.Order(
            name=name,
            launch=launch,
            kind=kind,
            image=image,
            count=machines,
            standing=made,
            zones=("us-east-1a",),
            spot=command.spot,
            max_price=None,
            user_data=user_data(host_key, image.user, StopRules()),
            tags={
                names.TAG_CONFIG: "quickstart",
                names.TAG_LOGDIR: f"s3://{BUCKET}/runs/{name}",
                names.TAG_HOST_KEY: host_key.public,
                names.TAG_STARTED: datetime.now(UTC).isoformat(timespec="seconds"),
            },
            prices={"us-east-1a": 36.0},
        )
        return ec2.start(account, order, print)

    def put(self, key: str, content: Any) -> None:
        """Writes an object as a host does."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.cloud.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)

    def failure(self, *words: str) -> str:
        """What a command complains of."""
        with pytest.raises(UserError) as error:
            main(list(words))
        assert "\n" not in str(error.value)
        return str(error.value)


def as_user(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")


def heartbeat(step: int = 7, **changed: Any) -> dict[str, Any]:
    sign = {"step": step, "loss": 3.25, "tokens_per_s": 61000.5, "time": time.time(), "host": "h"}
    return sign | changed
