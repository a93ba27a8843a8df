"""Whole runs of two processes, each on a host of its own, with their files in S3."""

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

pytestmark = pytest.mark.processes

RESTART = 75
LAST = tiny.STEPS


class Hosts:
    """Two hosts that train one run, with nothing in common but the network."""

    def __init__(self, shell: Shell, folder: Path, s3: Any):
        self.environment = dict(os.environ)  # the fixture has set AWS's
        self.environment["PYTHONPATH"] = str(tiny.ROOT)
        self.environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "True"
        self.folder, self.shell, self.url = folder, shell, s3.url

    def host(self, name: str) -> Path:
        """The working directory of a host: the text is there, and nothing of a run."""
        home = self.folder / name
        home.mkdir()
        shutil.copytree(self.shell.home / "text", home / "text")
        return home

    def start(self, *names: str) -> list[subprocess.Popen[str]]:
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


def losses(text: str) -> dict[int, float]:
    lines = map(json.loads, text.splitlines())
    found = [(line["step"], line["learning/loss"]) for line in lines if "learning/loss" in line]
    assert len(dict(found)) == len(found), "a step was logged twice"
    return dict(found)


def test_stopped_on_two_hosts_and_ended_on_two_others(shell, finished, tmp_path, s3):
    hosts = Hosts(shell, tmp_path, s3)
    first, second = hosts.start("a", "b")
    try:
        until_step(first, 100)
        os.kill(second.pid, signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
        assert [first.returncode, second.returncode] == [RESTART, RESTART], outputs
        stopped = re.search(r"stopped by SIGTERM after step (\d+)", outputs[0])
        assert stopped and "stopped" not in outputs[1] and "step" not in outputs[1]

        first, second = hosts.start("c", "d")
        outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], outputs
        assert f"goes on after step {stopped[1]} of {LAST} steps" in outputs[0]
        assert "bits per byte" in outputs[0] and "bits per byte" not in outputs[1]
    finally:
        for process in (first, second):
            process.kill()

    files = s3.contents()
    assert {"config.json", "run.json", "vocab.json", "results.json"} <= files.keys()
    assert len(json.loads(files["run.json"])["starts"]) == 2
    assert sum(name.startswith("events.out.tfevents") for name in files) == 2
    ends = [name for name in files if re.fullmatch(rf"checkpoints/{LAST}\.\d+/commit.json", name)]
    assert len(ends) == 1
    expected = losses((finished / "metrics.jsonl").read_text())
    got = losses(files["metrics.jsonl"].decode())
    assert got.keys() == expected.keys()
    early = [step for step in got if step < 150]
    # Later ones too, but rounding has grown by then.
    assert [got[step] for step in early] == pytest.approx([expected[step] for step in early], 1e-3)

    home = hosts.host("e")
    words = ["--logdir", s3.url, "--split", "test"]
    output = shell.run("evaluate", *words, cwd=home, env=hosts.environment)
    assert output[0] == 0, output
    bits = json.loads(files["results.json"])["bits"]["test"][str(tiny.CONFIG.model.mem_len)]
    assert f"{bits:.4f}" in output[1]
