"""`report`: of a run in S3 with its hosts, and of a folder."""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
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


def rent(aws: Cloud, account: Account, price: str) -> None:
    """A host of the run that stood for two hours."""
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
    (host,) = aws.instances()
    aws.client("ec2").terminate_instances(InstanceIds=[host.id])
    host.launch_time = datetime(2026, 1, 2, 2, tzinfo=UTC)
    host._reason = "User initiated (2026-01-02 04:00:00 GMT)"


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


def test_a_run_in_s3_is_told_with_its_hosts_and_its_watchers(
    bucket, aws, tmp_path, monkeypatch, capsys
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    upload(bucket, told_run.write(tmp_path / "written"))
    put(bucket, "launches/first.watch.json", told_run.watched() | {"cost": None})
    keep_record(bucket)
    rent(aws, bucket, "9.5")
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
    assert host[2:] == ["p3dn.24xlarge", "us-east-1c", "terminated", "$9.5000", "2.00", "$19.00"]
    # What was brought has gone, and nothing has come to lie elsewhere.
    assert not list((tmp_path / "temporary").iterdir())


def test_a_run_whose_hosts_are_forgotten_is_told_all_the_same(bucket, tmp_path):
    upload(bucket, told_run.begin(tmp_path / "written"))
    keep_record(bucket)
    assert main(["report", "first", "--out", "here"]) == 0
    found = Page((tmp_path / "here" / "index.html").read_bytes())
    assert "Not known: EC2 forgets hosts an hour after they have ended." in found.texts["p"]
    assert found.tiles() == {"Restarts": "0"}


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
    told_run.begin(tmp_path / "b")
    for words, page in (
        (["runs/a"], "report-a/index.html"),
        (["b"], "report-b/index.html"),
        ([f"{tmp_path}/b", "--out", "c/d"], "c/d/index.html"),
    ):
        assert main(["report", *words]) == 0
        assert capsys.readouterr().out == f"{page}\n"
    assert (tmp_path / "c/d/index.html").read_bytes() == Path("report-b/index.html").read_bytes()
    assert Page(Path("report-a/index.html").read_bytes()).tiles()["Steps"] == "402,560 tokens"
    assert len(list(Path("report-a").iterdir())) == 1 + len(PICTURES)
    assert [path.name for path in Path("report-b").iterdir()] == ["index.html"]


def test_what_is_no_folder_of_a_run_and_where_nothing_can_be_written_is_refused(tmp_path):
    folder = told_run.begin(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        main(["report", str(tmp_path)])
    with pytest.raises(UserError, match=r"cannot write to .*/file: File exists; take an --out"):
        main(["report", str(folder), "--out", f"{tmp_path}/file"])


def test_an_error_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "launcher", "report", f"{tmp_path}/none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "there is no such folder" in one_line(done.returncode, done.stderr)
