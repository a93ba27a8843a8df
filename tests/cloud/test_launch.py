"""A launch from the command line to hosts that have ended, the launcher as it is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.cloud import LocalCloud, missing
from tests.cloud.typed import OPEN, ROOT, TINY, Typed

pytest_plugins = ["tests.cloud.fixtures"]
pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(missing()), reason=missing())]
BUCKET = "txl-123456789012-us-east-1"
SMALL_EIGHT = [
    *("--dataset=stdlib", "--vocab=bytes", "--cutoffs", "--div-val=1", "--d-embed=16"),
    *TINY,
    *("--batch=64", "--eval-batch=64", "--log-every=2"),
]
"""What makes eight_machines small."""


def keys(cloud: LocalCloud) -> set[str]:
    pages = cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return {entry["Key"] for page in pages for entry in page.get("Contents", [])}


def read(cloud: LocalCloud, key: str) -> Any:
    return json.loads(cloud.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read())


def until_finished(cloud: LocalCloud) -> None:
    """Until the trainers of all hosts have ended; fails if one did with an error."""
    hosts = [instance.id for instance in cloud.instances()]
    files = [cloud.home(host) / "txl" / "status" for host in hosts]
    while not all(file.exists() for file in files):
        assert len(cloud.instances()) == len(hosts)
        time.sleep(0.2)
    outputs = [(cloud.home(host) / "txl" / "output.txt").read_text() for host in hosts]
    assert {file.read_text().strip() for file in files} == {"0"}, "\n".join(outputs)


def until_off(cloud: LocalCloud, minutes: float) -> None:
    """Until the hosts have turned themselves off, as they do after so many minutes."""
    for host in [instance.id for instance in cloud.instances()]:
        wanted = f"+{minutes:g}"
        while not any(wanted in call for call in cloud.recorded(host, "shutdown")[-1:]):
            time.sleep(0.1)
    cloud.pass_minutes(minutes)
    while cloud.instances():
        time.sleep(0.05)


def test_a_run_trains_to_its_end_and_its_hosts_end_themselves(cloud: LocalCloud) -> None:
    words = ["--config=quickstart", "--machines=2", "--max-tokens=1280", *TINY]
    launch = Typed(cloud.environ, *words, "--yes", OPEN)
    assert launch.end() == 0, launch.text
    assert "quickstart trains on 2 hosts" in launch.text
    until_finished(cloud)
    there = keys(cloud)
    assert {f"runs/quickstart/{n}" for n in ("results.json", "metrics.jsonl", "run.json")} <= there
    assert {"launches/quickstart/output-0.txt", "launches/quickstart/output-1.txt"} <= there
    assert any("/checkpoints/20.0/commit.json" in key for key in there)
    assert any(key.startswith("runs/quickstart/events.out.tfevents.") for key in there)
    listed = Typed(cloud.environ, "ls", "--json")
    listed.end()
    (told,) = json.loads(listed.text)
    assert (told["state"], told["step"]) == ("finished", 20)
    until_off(cloud, 10)
    assert [instance.state for instance in cloud.ec2.instances()] == ["terminated"] * 2


@pytest.mark.slow
def test_eight_machines(cloud: LocalCloud) -> None:
    """Eight hosts with eight GPUs each, on 64 devices of the CPU."""
    words = ["--config=eight_machines", "--max-tokens=3072", *SMALL_EIGHT]
    began = time.monotonic()
    launch = Typed(cloud.environ, *words, "--yes", OPEN)
    assert launch.end() == 0, launch.text
    seconds = time.monotonic() - began
    assert len(cloud.instances("running")) == 8
    assert {instance.lifecycle for instance in cloud.instances()} == {"spot"}
    hosts = [instance.id for instance in cloud.instances()]
    for host in hosts:
        (call,) = [c for c in cloud.recorded(host, "apt-get") if "nvidia-utils-580-server" in c]
        assert "install" in call
    starts = [call for call in cloud.calls if call.operation == "RunInstances"]
    assert len(starts) == 1, "one request for all hosts"
    until_finished(cloud)
    assert "64 x cpu" in (cloud.home(hosts[0]) / "txl/output.txt").read_text()
    assert {f"launches/eight-machines/output-{host}.txt" for host in range(8)} <= keys(cloud)
    assert read(cloud, "runs/eight-machines/results.json")["step"] == 6
    until_off(cloud, 10)
    print(f"\n{launch.text}\nlaunched in {seconds:.1f} s")


@pytest.mark.slow
def test_stop_start_and_sync_go_on_from_the_last_checkpoint(cloud: LocalCloud) -> None:
    words = ["--config=quickstart", "--machines=2", "--max-tokens=640000", *TINY]
    launch = Typed(cloud.environ, *words, "--yes", "--nospot", OPEN)
    assert launch.end() == 0, launch.text
    until_step(cloud, 1)
    stop = Typed(cloud.environ, "stop", "quickstart")
    assert stop.end() == 0, stop.text
    assert [i.state for i in cloud.ec2.instances()] == ["stopped"] * 2
    saved = newest(cloud)
    start = Typed(cloud.environ, "start", "quickstart")
    assert start.end() == 0, start.text
    until_step(cloud, saved + 1)
    marker = ROOT / "txl_jax" / f"marker_{cloud.folder.parent.name}.py"
    marker.write_text("")
    try:
        sync = Typed(cloud.environ, "sync", "quickstart")
        assert sync.end() == 0, sync.text
    finally:
        marker.unlink()
    again = newest(cloud)
    assert again > saved
    until_step(cloud, again + 1)
    for instance in cloud.instances():
        assert (cloud.home(instance.id) / "txl/source/txl_jax" / marker.name).exists()
    starts = read(cloud, "runs/quickstart/run.json")["starts"]
    assert len(starts) == 3
    kill = Typed(cloud.environ, "kill", "quickstart", "--yes")
    assert kill.end() == 0, kill.text
    assert not cloud.instances()


def until_step(cloud: LocalCloud, step: int) -> None:
    """Until the trainer shows that it has made so many steps."""
    key = "runs/quickstart/heartbeats/0.json"
    while key not in keys(cloud) or read(cloud, key)["step"] < step:
        for instance in cloud.instances():
            folder = cloud.home(instance.id) / "txl"
            assert not (folder / "status").exists(), (folder / "output.txt").read_text()
        time.sleep(0.5)


def newest(cloud: LocalCloud) -> int:
    """The step of the newest checkpoint that is whole."""
    names = [key.split("/") for key in keys(cloud) if key.endswith("/commit.json")]
    return max(int(parts[3].split(".")[0]) for parts in names if parts[3] != "best")


def test_make_cloud_says_what_to_export(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.cloud", str(tmp_path / "cloud")]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as shown:
        assert shown.stdout
        assert shown.stderr
        first = shown.stdout.readline()
        if not first:
            pytest.skip(shown.stderr.read())
        lines = [first]
        while not lines[-1].startswith("export JAX_PLATFORMS"):
            lines.append(shown.stdout.readline())
        exported = "".join(lines) + "python -m launcher ls"
        done = subprocess.run(
            ["bash", "-c", exported.replace("python ", f"{sys.executable} ")],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("no runs in us-east-1"), done
        shown.terminate()
        assert shown.wait() == 0
