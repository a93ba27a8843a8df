"""A run that is killed again and again ends as one that never was."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from tests import tiny
from tests.tiny import LOGDIR, WORDS

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.slow

STEPS, STARTS, KILLS = 3000, 3, 10
LONG = [*WORDS, "--max-tokens", str(STEPS * tiny.BATCH * tiny.TGT_LEN), "--eval-every", "300"]


def follow(process: subprocess.Popen[str], step: int) -> int:
    """Returns when a run has printed that it made this step: the step that it went on from."""
    assert process.stdout
    went_on = re.match(r".*: goes on after step (\d+) of", process.stdout.readline())
    for line in process.stdout:
        made = re.match(r"step (\d+)/", line)
        if made and int(made[1]) >= step:
            return int(went_on[1]) if went_on else 0
    raise AssertionError(process.communicate())


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a run as a power cut does and leaves nothing of it."""
    process.kill()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (-signal.SIGKILL, "")
    end = time.monotonic() + 10  # git, which it asks for its version, ends by itself
    while True:
        try:
            os.killpg(process.pid, 0)  # it has a session, and so a group, of its own
        except ProcessLookupError:
            return
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_that_is_killed_at_any_moment_ends_as_an_undisturbed_one(shell, tmp_path):
    """Killed while it starts, then ten times while it trains, then while it shows its results."""
    shell = replace(shell, cache=tmp_path / "compiled", optimized=True)
    undisturbed = replace(shell, home=tmp_path / "undisturbed")
    killed = replace(shell, home=tmp_path / "killed")
    for home in (undisturbed.home, killed.home):
        shutil.copytree(shell.home / "text", home / "text")
    status, _, errors = undisturbed.run("train", *LONG)
    assert (status, errors) == (0, "")

    draw, logdir = random.Random(0), killed.home / LOGDIR
    words = [*LONG, "--checkpoint-minutes", "0.01"]
    for _ in range(STARTS):
        process = killed.start("train", *words)
        time.sleep(draw.uniform(0, 3))
        kill(process)
    went_on_from = []
    moments = [draw.uniform(i, i + 1) / (KILLS + 1) for i in range(KILLS)]
    for moment in [*moments, 1]:
        process = killed.start("train", *words)
        went_on_from.append(follow(process, int(moment * STEPS)))
        time.sleep(draw.uniform(0, 0.2))
        kill(process)
    assert went_on_from == sorted(went_on_from)
    assert len(set(went_on_from)) > KILLS / 2, "most kills should come after a new checkpoint"

    status, _, errors = killed.run("train", *words)
    assert (status, errors) == (0, "")
    tiny.same_run(logdir, undisturbed.home / LOGDIR)
    assert tiny.tensorboard(logdir) == tiny.shown_in_metrics(logdir)
    # Files of locks stay, as they would beside a run that was never killed.
    left = r"\.tmp|draft|/\.(?!.*\.lock$)"
    assert [name for name in tiny.files(killed.home) if re.search(left, name)] == []
