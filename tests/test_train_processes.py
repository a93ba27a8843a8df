"""Runs of two processes whose files are in a folder."""

import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny
from tests.tiny import WORDS, Shell
from txl_jax import run_folder
from txl_jax.checkpoint_reader import restore_params
from txl_jax.checkpoint_shelf import FolderShelf, committed
from txl_jax.checks import WARM_UP
from txl_jax.model import abstract
from txl_jax.trained import CHECKPOINTS

pytest_plugins = ["tests.tiny_runs"]

pytestmark = [pytest.mark.processes]

SYNTHETIC = ("--config", "test_1", "--n-token", "300", "--cutoffs", "50", "100")
LETTERS = 20_000
"""In each file of a text that takes many seconds to evaluate."""


@contextmanager
def two(shell: Shell, *words: str, **options: Any) -> Iterator[list[subprocess.Popen[str]]]:
    started = shell.start_two(*words, **options)
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status of each, and what it said after what was read already."""
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """What a process says until a line has this."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a text of which every split is long."""
    folder = tmp_path_factory.mktemp("long")
    tiny.write_text(folder / "text")
    draw = random.Random(0)
    for path in (folder / "text").iterdir():
        path.write_text("".join(draw.choices("abcd ", k=LETTERS)))
    return folder


def test_a_folder_that_is_not_shared_is_refused_before_anything_is_written(shell, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        tiny.write_text(folder / "text")
    with two(shell, *WORDS, "--logdir", "runs/mine", folders=folders) as processes:
        for status, output in ends(processes):
            assert status == 2, output
            assert "error: --logdir runs/mine is not the same folder on all hosts: p" in output
    assert not any(path.is_file() for path in (tmp_path / "one" / "runs").rglob("*"))


def test_a_host_with_another_number_of_devices_is_named(shell, tmp_path):
    with two(shell, *WORDS, folders=[tmp_path] * 2, devices=(2, 1)) as processes:
        for status, output in ends(processes):
            assert status == 2, output
            assert re.search(r"process 1 \(.*\): devices 1 x cpu instead of 2 x cpu; make", output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_speed_of_two_processes_is_told_by_the_first(shell, tmp_path):
    words = [*SYNTHETIC, "--n-layer", "1", "--d-model", "16", "--n-head", "2", "--d-head", "4"]
    words += ["--d-inner", "16", "--tgt-len", "8", "--mem-len", "8", "--batch", "4"]
    words += ["--max-tokens", str((WARM_UP + 5) * 4 * 8)]
    with two(shell, *words, folders=[tmp_path] * 2) as processes:
        (first, output), (second, other) = ends(processes)
    assert (first, second) == (0, 0), output + other
    found = json.loads(output.splitlines()[-1])
    assert (found["devices"], found["processes"], found["timed_steps"]) == (2, 2, 5)
    assert (found["batch"], found["tokens_per_step"]) == (4, 32)
    assert found["tokens_per_s"]["median"] > 0 and found["loss"] > 0
    assert "tokens_per_s" not in other
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_checkpoint_comes_of_a_step_in_which_a_process_was_lost(shell, tmp_path):
    tiny.write_text(tmp_path / "text")
    words = [*WORDS, "--logdir", "run", "--log-every", "1", "--checkpoint-minutes", "0.00001"]
    with two(shell, *words, "--eval-every", "1000", folders=[tmp_path] * 2) as processes:
        said = until(processes[0], r"^step 30/")
        (trainer,) = psutil.Process(processes[1].pid).children()
        trainer.kill()
        output, _ = processes[0].communicate(timeout=200)
    said += output
    assert processes[0].returncode == 75, said
    assert re.search(r"^lost: process 1 ", said, re.M)
    logged = [int(step) for step in re.findall(r"^step (\d+)/", said, re.M)]
    folder = tmp_path / "run" / CHECKPOINTS
    steps = committed(FolderShelf(folder).found(""))
    assert len(steps) == 2 and 29 <= steps[-1].step <= logged[-1]
    cfg = run_folder.read_config(tmp_path / "run")
    for saved in steps:
        _, info = restore_params(folder, abstract(cfg.model)[1], saved.step)
        assert info["step"] == saved.step


@pytest.mark.slow
@pytest.mark.parametrize("where", ["validation", "final evaluation"])
def test_sigterm_in_an_evaluation_ends_all_at_once(shell, long_text, tmp_path, where):
    every, tokens = (1, 0) if where == "validation" else (2, 64)
    words = ["--logdir", str(tmp_path / "run"), "--sample-tokens", "0", "--log-every", "1"]
    words += ["--max-tokens", str(2 * tiny.BATCH * tiny.TGT_LEN), "--eval-every", str(every)]
    words += ["--eval-max-tokens", str(tokens)]
    begins = r"^step 1/2 " if where == "validation" else "validation loss"
    with two(shell, *WORDS, *words, folders=[long_text] * 2) as processes:
        said = until(processes[0], begins)
        os.kill(processes[1].pid, signal.SIGTERM)
        (first, output), (second, other) = ends(processes)
    assert (first, second) == (75, 75), said + output + other
    assert "bits per byte" not in output
    if where == "validation":
        assert "stopped by SIGTERM after step 1: the same command goes on" in output
        assert "validation loss" not in output
        assert not list((tmp_path / "run" / "checkpoints").glob("*.*"))
    else:
        assert "stopped by SIGTERM in the final evaluation" in output
        assert not (tmp_path / "run" / "results.json").exists()
