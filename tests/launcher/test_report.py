"""`report`: of a run in S3 with its hosts, and of a folder."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launcher import names, objects, record
from launcher.__main__ import main
from launcher.aws import Account
from launcher.record import Record
from launcher.request import parse
from tests import told_run
from tests.launcher.cloud import ACCOUNT, Cloud
from tests.test_report_page import Page
from tests.tiny import ROOT, files, one_line
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

BUCKET = f"txl-{ACCOUNT}-us-east-1"
PICTURES = (
    *("loss-tokens", "loss-time", "bpc-tokens", "bpc-time", "throughput", "processes"),
    *("learning-rate", "gradient-norm", "memory"),
)


@pytest.fixture
def bucket(account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Account:
    account.client("s3").create_bucket(Bucket=BUCKET)
    monkeypatch.chdir(tmp_path)
    return account


def put(account: Account, key: str, content: Any) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    objects.write(account, BUCKET, key, body)


def upload(account: Account, folder: Path) -> None:
    """Puts a run into S3, as its mirror does, with a checkpoint and what others could add."""
    for name, content in files(folder).items():
        put(account, f"runs/first/{name}", content)
    put(account, "runs/first/checkpoints/40.0/commit.json", {})
    put(account, "runs/first/heartbeats/../../../escaped.json", {})


def rent(aws: Cloud, account: Account, price: str, hours: float) -> None:
    """A host of the run that has stood for so long."""
    tags = {
        names.TAG_MADE_BY: names.MADE_BY,
        names.TAG_RUN: "first",
        names.TAG_LAUNCH: "launch-1",
        names.TAG_OWNER: account.caller,
        names.TAG_LOGDIR: f"s3://{BUCKET}/runs/first",
        names.TAG_PRICE: price,
        names.TAG_HOST: "0",
    }
    listed = [{"Key": key, "Value": value} for key, value in tags.items()]
    aws.client("ec2").run_instances(
        ImageId="ami-1",
        MinCount=1,
        MaxCount=1,
        InstanceType="p3dn.24xlarge",
        NetworkInterfaces=[{"DeviceIndex": 0, "SubnetId": aws.subnets()["us-east-1c"]}],
        TagSpecifications=[{"ResourceType": "instance", "Tags": listed}],
    )
    aws.instances()[-1].launch_time = datetime.now(UTC) - timedelta(hours=hours)


def keep_record(account: Account) -> None:
    words = ["--config=quickstart", "--lr", "0.5"]
    command = parse([*words, "--zone=us-east-1c", "--keep", "--name=first"]).command
    kept = Record(
        launch="0123456789abcdef",
        owner=account.caller,
        started=datetime(2026, 1, 2, tzinfo=UTC),
        config=command.experiment,
        words=tuple(words),
        options=record.options(command),
        zones=("us-east-1c",),
        source="00ff" * 16,
        corpus="",
        revision="abc",
    )
    record.write(account, BUCKET, "first", kept, replaces="")


def test_a_run_in_s3_is_told_with_its_hosts_and_its_watchers(bucket, aws, tmp_path, capsys):
    upload(bucket, told_run.write(tmp_path / "written"))
    put(bucket, "launches/first.watch.json", told_run.watched() | {"cost": None})
    keep_record(bucket)
    rent(aws, bucket, "9.5", 2)
    assert main(["report", "first"]) == 0
    assert capsys.readouterr().out == "report-first/index.html\n"
    made = files(tmp_path / "report-first")
    assert set(made) == {"index.html", *(f"{name}.png" for name in PICTURES)}
    assert all(made[f"{name}.png"].startswith(b"\x89PNG") for name in PICTURES)
    found = Page(made["index.html"])
    assert found.texts["h1"] == ["first"]
    assert found.tiles()["Cost"] == "$19.00" and found.tiles()["Steps"] == "402,560 tokens"
    again = "python -m launcher --config=quickstart --lr 0.5 --name first --zone us-east-1c --keep"
    assert again in found.texts["pre"]
    assert any(row[1] == "preempted" for row in found.rows() if len(row) == 7)
    (host,) = (row for row in found.rows() if len(row) == 8)
    assert host[2:] == ["p3dn.24xlarge", "us-east-1c", "running", "$9.5000", "2.00", "$19.00"]
    # Nothing else has come to lie here, and what was brought has gone.
    assert {path.name for path in tmp_path.iterdir()} <= {"written", "report-first", "home"}


def test_a_run_whose_hosts_are_forgotten_is_told_all_the_same(bucket, tmp_path):
    upload(bucket, told_run.write(tmp_path / "written"))
    assert main(["report", "first", "--out", "here"]) == 0
    found = Page((tmp_path / "here" / "index.html").read_bytes())
    assert "Cost" not in found.tiles() and found.tiles()["Training loss"] == "3.0000bpb 4.328"


def test_what_has_not_begun_is_refused(bucket, tmp_path):
    put(bucket, "runs/first/heartbeats/0.json", {})
    with pytest.raises(UserError, match=r"first/ holds no run that has begun: config\.json is"):
        main(["report", "first"])
    with pytest.raises(UserError, match="cannot be the name of a run"):
        main(["report", "First"])
    assert not (tmp_path / "report-first").exists()


def test_a_folder_needs_no_account(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    told_run.write(tmp_path / "runs" / "a")
    shown = []
    for words in (["runs/a"], [f"{tmp_path}/runs/a"], ["runs/a", "--out", "b"]):
        assert main(["report", *words]) == 0
        path = Path(capsys.readouterr().out.rstrip("\n"))
        shown.append(path.read_bytes())
    assert path == Path("b/index.html") and shown[0] == shown[1] == shown[2]
    monkeypatch.chdir(tmp_path / "runs")
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "report-a/index.html\n"


def test_an_error_is_one_line_and_status_2(tmp_path):
    folder = told_run.begin(tmp_path / "a")
    (tmp_path / "file").touch()
    for words, complaint in (
        ([f"{tmp_path}/none"], "no run in"),
        ([str(tmp_path)], "config.json is missing"),
        ([str(folder), "--out", f"{tmp_path}/file"], "cannot write to"),
        ([], "NAME"),
    ):
        command = [sys.executable, "-m", "launcher", "report", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert complaint in one_line(done.returncode, done.stderr)
