"""Whole runs of two processes, with their files in S3."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.tiny import WORDS, Shell

pytest_plugins = ["tests.buckets", "tests.tiny_runs"]

pytestmark = [pytest.mark.processes, pytest.mark.slow]

RESTART = 75
LAST = tiny.STEPS


class Hosts:
    """Hosts that train one run, with nothing in common but the network."""

    def __init__(self, shell: Shell, folder: Path, s3: Any):
        self.environment = os.environ | {  # the fixture has set AWS's
            "PYTHONPATH": str(tiny.ROOT),
            # But no cache of compiled programs: JAX has one for process 0 only, which then waits
            # for the others to compile, and Gloo lets it wait for half a minute.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
        }
        self.folder, self.shell, self.url = folder, shell, s3.url
        self.spool = Path("runs") / s3.url.removeprefix("s3://")

    def host(self, name: str) -> Path:
        """The working directory of a host; the text is there, and nothing of a run at first."""
        home = self.folder / name
        if not home.exists():
            shutil.copytree(self.shell.home / "text", home / "text")
        return home

    def start(self, *names: str) -> list[subprocess.Popen[str]]:
        """Starts a process on each of these hosts."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        words = [word for word in WORDS if word != "--local"]
        words += ["--logdir", self.url, "--zero", "1", "--checkpoint-minutes", "0.02"]
        words += ["--coordinator", coordinator, "--num-processes", str(len(names))]
        return [
            self.shell.start(
                "train",
                *words,
                *("--process-id", str(number)),
                cwd=self.host(name),
                env=self.environment,
                stderr=subprocess.STDOUT,
            )
            for number, name in enumerate(names)
        ]


def until_step(process: subprocess.Popen[str], step: int) -> str:
    """What a process prints until it is at a step."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            return "".join(lines)
    raise AssertionError("".join(lines))


def stop(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Sends SIGTERM to the second of two processes; what both say until they have ended."""
    os.kill(processes[1].pid, signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [RESTART, RESTART], outputs
    assert "stopped by SIGTERM after step" in outputs[0] and "stopped" not in outputs[1]
    return outputs


def committed(files: dict[str, bytes]) -> int:
    """The newest step that is whole in S3."""
    names = (re.fullmatch(r"checkpoints/(\d+)\.\d+/commit.json", name) for name in files)
    return max(int(name[1]) for name in names if name)


def losses(text: str) -> dict[int, float]:
    lines = map(json.loads, text.splitlines())
    found = [(line["step"], line["learning/loss"]) for line in lines if "learning/loss" in line]
    assert len(dict(found)) == len(found), "a step was logged twice"
    return dict(found)


def test_stopped_twice_once_without_s3_and_ended_on_other_hosts(shell, finished, tmp_path, s3):
    hosts = Hosts(shell, tmp_path, s3)
    processes = hosts.start("a", "a")  # as with --process-per-gpu
    try:
        until_step(processes[0], 100)
        outputs = stop(processes)
        first = committed(s3.contents())
        assert f"stopped by SIGTERM after step {first}: " in outputs[0]
        assert "S3" not in "".join(outputs)

        processes = hosts.start("a", "a")
        said = until_step(processes[0], first + 20)
        assert f"goes on after step {first} of {LAST} steps" in said
        s3.proxy.mode = "hang"
        until_step(processes[0], first + 60)
        outputs = stop(processes)
        second = committed(s3.contents())
        assert f"stopped by SIGTERM after step {second}: " not in outputs[0]
        for output in outputs:
            only = rf"only in {hosts.spool}: .*checkpoint (\d+)\.1\b"
            assert int(re.findall(only, output)[0]) > second
        s3.proxy.mode = "ok"

        processes = hosts.start("a", "b")
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert f"goes on after step {second} of {LAST} steps" in outputs[0]
        assert "bits per byte" in outputs[0] and "bits per byte" not in outputs[1]
    finally:
        for process in processes:
            process.kill()

    files = s3.contents()
    assert {"config.json", "run.json", "vocab.json", "results.json"} <= files.keys()
    assert len(json.loads(files["run.json"])["starts"]) == 3
    assert committed(files) == LAST
    expected = losses((finished / "metrics.jsonl").read_text())
    got = losses(files["metrics.jsonl"].decode())
    assert got.keys() == expected.keys()
    early = [step for step in got if step < 150]
    # Later ones too, but rounding has grown by then.
    assert [got[step] for step in early] == pytest.approx([expected[step] for step in early], 1e-3)
    for name, content in files.items():
        if name.startswith("events.out.tfevents") or name == "metrics.jsonl":
            (tmp_path / name).write_bytes(content)
    assert tiny.tensorboard(tmp_path) == tiny.shown_in_metrics(tmp_path)

    # The last signs are of the final evaluation, and the speeds of the last log line.
    for process, name in enumerate(("a", "b")):
        sign = f"heartbeats/{process}.json"
        assert files[sign] == (hosts.host(name) / hosts.spool / sign).read_bytes()
        assert json.loads(files[sign])["own_ms"] > 0

    home = hosts.host("c")
    words = ["--logdir", s3.url, "--split", "test"]
    output = shell.run("evaluate", *words, cwd=home, env=hosts.environment)
    assert output[0] == 0, output
    bits = json.loads(files["results.json"])["bits"]["test"][str(tiny.CONFIG.model.mem_len)]
    assert f"{bits:.4f}" in output[1]
