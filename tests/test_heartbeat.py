"""Signs of life: the file, how often it is written, and that it gets to S3 from every process."""

import json
import math
import os
import re
import socket
import time

import pytest

from tests.tiny import STEPS
from txl_jax import heartbeat
from txl_jax.course import Course
from txl_jax.errors import UserError
from txl_jax.heartbeat import Heartbeat
from txl_jax.home import Home
from txl_jax.journal import Journal

pytest_plugins = ["tests.buckets", "tests.tiny_runs"]


def test_what_a_sign_says(tmp_path):
    beat = Heartbeat(tmp_path, 3, 100)
    before = time.time()
    beat.advance()
    path = tmp_path / "heartbeats" / "3.json"
    sign = json.loads(path.read_text())
    assert before <= sign.pop("time") <= time.time()
    host = socket.gethostname()
    nothing = {"loss": None, "tokens_per_s": None, "own_ms": None}
    assert sign == {"step": 101, "host": host, **nothing}
    beat.measured(2.5, 1000.0, 9.5)
    beat.show()
    sign = json.loads(path.read_text())
    assert (sign["step"], sign["loss"], sign["tokens_per_s"]) == (101, 2.5, 1000.0)
    assert sign["own_ms"] == 9.5
    assert os.listdir(path.parent) == ["3.json"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null(tmp_path, loss):
    beat = Heartbeat(tmp_path, 0, 0)
    beat.measured(loss, 1.0, None)
    beat.show()
    assert json.loads((tmp_path / "heartbeats" / "0.json").read_text())["loss"] is None


def test_not_every_step_shows_a_sign(tmp_path, monkeypatch):
    beat = Heartbeat(tmp_path, 0, 0)
    path = tmp_path / "heartbeats" / "0.json"
    monkeypatch.setattr(heartbeat, "SECONDS", 3600.0)
    for _ in range(10):
        beat.advance()
    assert json.loads(path.read_text())["step"] == 1
    monkeypatch.setattr(heartbeat, "SECONDS", 0.0)
    beat.advance()
    assert json.loads(path.read_text())["step"] == 11


def test_a_long_evaluation_shows_signs_and_counts_no_steps(tmp_path, monkeypatch):
    path = tmp_path / "heartbeats" / "0.json"
    made = Heartbeat(tmp_path, 0, 4)
    made.measured(2.5, 1000.0, None)
    made.advance()
    monkeypatch.setattr(heartbeat, "SECONDS", 0.0)
    ended = Heartbeat(tmp_path, 0)
    for _ in range(2):
        path.unlink(missing_ok=True)
        ended.work_on()
        sign = json.loads(path.read_text())
        assert (sign["step"], sign["loss"], sign["tokens_per_s"]) == (5, 2.5, 1000.0)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_sign_that_cannot_be_read_is_no_earlier_one(tmp_path, content):
    path = tmp_path / "heartbeats" / "0.json"
    path.parent.mkdir()
    path.write_text(content)
    Heartbeat(tmp_path, 0).work_on()
    assert json.loads(path.read_text())["step"] == 0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "heartbeats").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*0\.json: "):
        Heartbeat(tmp_path, 0, 0).advance()


def test_the_journal_shows_them(tmp_path):
    with Journal(tmp_path, 0, 10, Course(32)) as journal:
        for _ in range(3):
            journal.advance()
        journal.scalars(3, {"learning/loss": 1.5, "times/tokens_per_sec": 7.0})
        journal.scalars(3, {"learning/val_loss": 9.0})
    sign = json.loads((tmp_path / "heartbeats" / "0.json").read_text())
    assert (sign["step"], sign["loss"], sign["tokens_per_s"]) == (3, 1.5, 7.0)


def test_every_process_brings_its_own_to_s3(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = Home(s3.url)
    with home.mirrored(1):
        (home.folder / "metrics.jsonl").parent.mkdir(parents=True)
        (home.folder / "metrics.jsonl").write_text("")
        Heartbeat(home.folder, 1, 4).advance()
        Heartbeat(home.folder, 2, 3).advance()  # as an earlier start has left it
    assert list(s3.contents()) == ["heartbeats/1.json"]


def test_that_of_an_earlier_start_is_not_taken_for_a_new_one(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = Home(s3.url)
    Heartbeat(home.folder, 0, 4).advance()
    with home.mirrored(0):
        (home.folder / "metrics.jsonl").write_text("")
    assert list(s3.contents()) == ["metrics.jsonl"]
    with home.mirrored(0):
        Heartbeat(home.folder, 0).advance()
    assert json.loads(s3.contents()["heartbeats/0.json"])["step"] == 6


@pytest.mark.processes
def test_a_run_leaves_its_last_step(finished):
    sign = json.loads((finished / "heartbeats" / "0.json").read_text())
    last = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["learning/loss"] for line in last if "learning/loss" in line]
    assert sign["step"] == STEPS and sign["loss"] == losses[-1]
    assert re.fullmatch(r"[0-9.]+", str(sign["tokens_per_s"]))
