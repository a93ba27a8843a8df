"""A host that is cut off from the others: all end, and meet again when it is back."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.members import Members
from txl_jax import distributed
from txl_jax.distributed import Cluster

pytest_plugins = ["tests.namespaces", "tests.tiny_runs"]
pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS = 250
SECONDS = 60
"""For all to end. They take a quarter of that where nothing else runs."""


def wait_until(happened: Callable[[], bool], seconds: float = 300) -> float:
    """How long it took."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return time.monotonic() - began


def all_ended(processes: Sequence[subprocess.Popen[Any]]) -> bool:
    return None not in [process.poll() for process in processes]


def members(hosts, folder: Path, *words: str) -> Members:
    """A small run on all hosts, each with a parent that does not start it again."""
    number = len(hosts.names)
    coordinator = f"{hosts.private[0]}:4321"
    environs = [distributed.environ(Cluster(coordinator, number, i)) for i in range(number)]
    within = [hosts.within(i) for i in range(number)]
    return Members(folder, number, *words, restarts=0, environs=environs, within=within)


def lost(hosts, host: int) -> list[str]:
    """For each host a pattern of what it says when one is cut off.

    To the coordinator that may be only one of the others, as they do not fall silent at once. On a
    very slow machine JAX may notice first that the coordinator is lost; then the parent says so.
    """
    names = [rf"process {i} \(host {name}\)" for i, name in enumerate(hosts.names)]
    at = rf", the coordinator at {re.escape(hosts.private[0])}:4321"
    silent = r": no sign of life for 12 s after step \d+"
    coordinator = rf"{names[0]}{at}{silent}|process 0{at}"
    others = "|".join([*names[1:], ", ".join(names[1:])])
    said = [names[host] + silent if host else coordinator] * len(names)
    said[host] = coordinator if host else f"({others}){silent}"
    return [f"(?m)^lost: ({line})" for line in said]


@pytest.mark.parametrize("host", [2, 0], ids=["another", "the coordinator"])
def test_all_say_who_is_lost_and_end(hosts, tmp_path, host):
    with members(hosts, tmp_path / "run", "1000000") as run:
        run.wait_for("step 50\n")
        with hosts.cut_off(host):
            took = wait_until(lambda: all_ended(run.started), SECONDS)
        print(f"all had ended {took:.1f} s after {hosts.names[host]} was cut off")
        assert run.statuses() == [75, 75, 75]
        for i, pattern in enumerate(lost(hosts, host)):
            assert re.search(pattern, run.log(i)), run.log(i)


def test_who_has_no_network_yet_waits_for_it(hosts, tmp_path):
    said = f"waiting for the network, {hosts.private[0]}: Network is unreachable\n"
    with contextlib.ExitStack() as stack:
        with hosts.cut_off(2, here=True):
            run = stack.enter_context(members(hosts, tmp_path / "run", "20"))
            wait_until(lambda: said in run.log(2))
        assert run.statuses() == [0, 0, 0]


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

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for parent in self.parents:
            parent.kill()
            parent.wait()


def test_a_run_that_was_cut_apart_ends_as_an_undisturbed_one(hosts, shell, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with Run(hosts, shell, tmp_path / "undisturbed") as undisturbed:
        wait_until(lambda: all_ended(undisturbed.parents))
        assert [parent.returncode for parent in undisturbed.parents] == [0, 0, 0]

    with Run(hosts, shell, tmp_path / "disturbed") as run:
        for times, (host, step) in enumerate([(2, 60), (0, 150)], start=1):
            wait_until(lambda step=step: run.step() >= step)
            with hosts.cut_off(host):
                again = rf"restart {times} of"
                wait_until(lambda again=again: run.said(again) == [1, 1, 1], SECONDS)
                for pattern, log in zip(lost(hosts, host), run.logs, strict=True):
                    assert re.search(pattern, log.read_text()), log.read_text()
                time.sleep(10)  # the trainers are there again, and look for one another
                assert not all_ended(run.parents)
        wait_until(lambda: all_ended(run.parents))
        assert [parent.returncode for parent in run.parents] == [0, 0, 0]
        assert run.said("restart 3 of") == [0, 0, 0]
    assert len(re.findall(r"goes on after step [1-9]", run.logs[0].read_text())) == 2
    tiny.same_run(run.logdir, undisturbed.logdir)
