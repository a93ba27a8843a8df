"""A host that is cut off from the others: all end, and meet again when it is back."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.members import Members
from txl_jax import distributed
from txl_jax.distributed import Cluster

pytest_plugins = ["tests.namespaces", "tests.tiny_runs"]
pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS = 400
SECONDS = 60
"""For all to end. They take a quarter of that where nothing else runs."""


def wait_until(happened: Callable[[], bool], seconds: float = 300) -> float:
    """How long it took."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return time.monotonic() - began


def lost(hosts, host: int) -> list[str]:
    """For each host a pattern of what it says when one is cut off.

    To the coordinator that may be only one of the others, as they do not fall silent at once.
    """
    names = [rf"process {i} \(host {name}\)" for i, name in enumerate(hosts.names)]
    names[0] += rf", the coordinator at {re.escape(hosts.private[0])}:4321"
    others = [*names[1:], ", ".join(names[1:])]
    said = [names[host] if host else names[0]] * len(names)
    said[host] = names[0] if host else f"({'|'.join(others)})"
    return [rf"(?m)^lost: {line}: no sign of life for 12 s after step \d+$" for line in said]


@pytest.mark.parametrize("host", [2, 0], ids=["another", "the coordinator"])
def test_all_say_who_is_lost_and_end(hosts, tmp_path, host):
    number = len(hosts.names)
    coordinator = f"{hosts.private[0]}:4321"
    environs = [distributed.environ(Cluster(coordinator, number, i)) for i in range(number)]
    within = [hosts.within(i) for i in range(number)]
    with Members(tmp_path / "run", number, "1000000", environs=environs, within=within) as run:
        run.wait_for("step 50\n")
        with cut_off(hosts, host):
            took = wait_until(lambda: None not in [member.poll() for member in run.started], SECONDS)
        print(f"all had ended {took:.1f} s after {hosts.names[host]} was cut off")
        assert run.statuses() == [75] * number
        for i, pattern in enumerate(lost(hosts, host)):
            assert re.search(pattern, run.log(i)), run.log(i)
            assert "Traceback" not in run.log(i)


@contextlib.contextmanager
def cut_off(hosts, host: int) -> Iterator[None]:
    hosts.cut_off(host)
    try:
        yield
    finally:
        hosts.connect(host)


class Run:
    """A supervised training on all hosts, with one folder for what it leaves; `with` ends it."""

    def __init__(self, hosts, shell: tiny.Shell, folder: Path):
        self.logdir = folder / "run"
        self.logs: list[Path] = []
        self.parents: list[subprocess.Popen[str]] = []
        words = [word for word in tiny.WORDS if word != "--local"]
        words += ["--batch", "6", "--eval-batch", "6", "--max-tokens", str(STEPS * 6 * 16)]
        words += ["--eval-every", "100", "--checkpoint-minutes", "0.05"]
        words += ["--logdir", str(self.logdir), "--supervise", "--num-processes", "3"]
        words += ["--coordinator", f"{hosts.private[0]}:4321"]
        for i, name in enumerate(hosts.names):
            home = folder / name
            shutil.copytree(shell.home / "text", home / "text")
            self.logs.append(folder / f"log.{i}")
            with self.logs[-1].open("w") as output:
                self.parents.append(
                    replace(shell, home=home, within=(*hosts.within(i),)).start(
                        *("train", *words, "--process-id", str(i)),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def step(self) -> int:
        steps = re.findall(r"^step (\d+)/", self.logs[0].read_text(), re.M)
        return int(steps[-1]) if steps else 0

    def said(self, pattern: str) -> list[int]:
        """How often each host has said this."""
        return [len(re.findall(pattern, log.read_text())) for log in self.logs]

    def ended(self) -> bool:
        return None not in [parent.poll() for parent in self.parents]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for parent in self.parents:
            parent.kill()
            parent.wait()


def test_a_run_that_was_cut_apart_ends_as_an_undisturbed_one(hosts, shell, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with Run(hosts, shell, tmp_path / "undisturbed") as undisturbed:
        wait_until(undisturbed.ended)
        assert [parent.returncode for parent in undisturbed.parents] == [0, 0, 0]

    with Run(hosts, shell, tmp_path / "disturbed") as run:
        for times, (host, step) in enumerate([(2, 60), (0, 200)], start=1):
            wait_until(lambda step=step: run.step() >= step)
            with cut_off(hosts, host):
                again = rf"the trainer asks for it: restart {times} of"
                wait_until(lambda again=again: run.said(again) == [1, 1, 1], SECONDS)
                for pattern, log in zip(lost(hosts, host), run.logs, strict=True):
                    assert re.search(pattern, log.read_text()), log.read_text()
                time.sleep(10)  # the trainers are there again, and look for one another
                assert not run.ended()
        wait_until(run.ended)
        assert [parent.returncode for parent in run.parents] == [0, 0, 0]
        assert run.said("restart 3 of") == [0, 0, 0]
    assert len(re.findall(r"goes on after step [1-9]", run.logs[0].read_text())) == 2
    tiny.same_run(run.logdir, undisturbed.logdir)
