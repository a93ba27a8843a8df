"""Runs of two processes whose files are in a folder."""

import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import tiny
from tests.tiny import WORDS, Shell

pytest_plugins = ["tests.tiny_runs"]

pytestmark = [pytest.mark.processes]

LETTERS = 20_000
"""In each file of a text that takes many seconds to evaluate."""


@contextmanager
def two(shell: Shell, *words: str, folders: list[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    started = shell.start_two(*WORDS, *words, folders=folders)
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
    with two(shell, "--logdir", "runs/mine", folders=folders) as processes:
        for status, output in ends(processes):
            assert status == 2, output
            assert "error: --logdir runs/mine is not the same folder on all hosts: p" in output
    assert not any(path.is_file() for path in (tmp_path / "one" / "runs").rglob("*"))


@pytest.mark.parametrize("where", ["validation", "final evaluation"])
def test_sigterm_in_an_evaluation_ends_all_at_once(shell, long_text, tmp_path, where):
    every, tokens = (1, 0) if where == "validation" else (2, 64)
    words = ["--logdir", str(tmp_path / "run"), "--sample-tokens", "0", "--log-every", "1"]
    words += ["--max-tokens", str(2 * tiny.BATCH * tiny.TGT_LEN), "--eval-every", str(every)]
    words += ["--eval-max-tokens", str(tokens)]
    begins = r"^step 1/2 " if where == "validation" else "validation loss"
    with two(shell, *words, folders=[long_text] * 2) as processes:
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
