"""Processes of a run that agree, and that lose one another."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.members import DEVICE_ERROR, Members
from txl_jax import peers, run_folder
from txl_jax.config import Config
from txl_jax.peers import Peers

ENDLESS = "1000000"
RUNS = {
    "slow": (2, "100", "slow=1"),
    "bug": (2, ENDLESS, "bug=1"),
    "mistake": (2, ENDLESS, "mistake=1"),
    "device": (2, ENDLESS, "device=1"),
    "broken": (2, ENDLESS, "break=1"),
    "facts": (3, ENDLESS, "facts=1"),
    "killed": (3, ENDLESS),
    "stopped": (3, ENDLESS),
    "coordinator": (2, ENDLESS),
    "asked": (2, ENDLESS),
    "interrupted": (2, ENDLESS),
}
EVENTS = {
    "killed": (1, signal.SIGKILL),
    "stopped": (2, signal.SIGSTOP),
    "coordinator": (0, signal.SIGSTOP),
    "asked": (1, signal.SIGTERM),
    "interrupted": (1, signal.SIGINT),
}
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Members]]:
    """Runs side by side: each waits for long, and computes little."""
    folder = tmp_path_factory.mktemp("runs")
    # What tests start in the background would inherit that Ctrl-C is ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        started = {
            name: stack.enter_context(Members(folder / name, number, *words))
            for name, (number, *words) in RUNS.items()
        }
        signal.signal(signal.SIGINT, handler)
        for name, event in EVENTS.items():
            started[name].wait_for("step 100\n")
            started[name].kill(*event)
        yield started


def test_a_run_ends_when_all_have_ended_and_a_slow_one_is_not_lost(runs):
    assert runs["slow"].statuses() == [0, 0]
    for member in range(2):
        log = runs["slow"].log(member)
        assert "all well True one not False\nends after 100\n" in log
        assert "lost" not in log
        assert not runs["slow"].logs[member].with_name(f"last.{member}").exists()


def test_a_bug_in_one_ends_all_and_keeps_its_traceback(runs):
    assert runs["bug"].statuses() == [1, 1]
    assert runs["bug"].log(1).endswith("ZeroDivisionError: a bug\n")
    assert "Traceback" in runs["bug"].log(1)
    assert "Traceback" not in runs["bug"].log(0)
    said = f"error: process 1 (host {HOST}): ZeroDivisionError: a bug\n"
    assert runs["bug"].log(0).endswith(said)


def test_a_connection_that_breaks_is_no_bug(runs):
    assert runs["broken"].statuses() == [75, 75]
    for member in range(2):
        log = runs["broken"].log(member)
        assert re.search(rf"^lost: process [01] \(host {HOST}\): .*: Gloo .* failed: ", log, re.M)
        assert "Traceback" not in log


def test_a_device_that_fails_is_a_loss(runs):
    assert runs["device"].statuses() == [75, 75]
    for member in range(2):
        said = f"lost: process 1 (host {HOST}): jax.errors.JaxRuntimeError: {DEVICE_ERROR}\n"
        assert runs["device"].log(member).endswith(said)


@pytest.mark.parametrize(
    "text, loss",
    [
        (DEVICE_ERROR, True),
        ("INTERNAL: Failed to complete all kernels launched on stream 0x55: was in use", True),
        ("UNAVAILABLE: connection reset", True),
        ("RESOURCE_EXHAUSTED: CUDA_ERROR_OUT_OF_MEMORY: out of memory", False),
        ("INTERNAL: no such operation", False),
    ],
)
def test_which_failures_of_a_computation_are_losses(text, loss):
    assert peers.is_loss(jax.errors.JaxRuntimeError(text)) == loss
    assert peers.is_loss(ValueError(text)) == loss
    assert not peers.is_loss(RuntimeError(text))
    with pytest.raises(SystemExit if loss else ValueError) as caught, Peers(None):
        raise ValueError(text)
    assert getattr(caught.value, "code", None) == (75 if loss else None)


def test_a_users_mistake_on_one_host_is_told_on_all(runs):
    assert runs["mistake"].statuses() == [2, 2]
    assert runs["mistake"].log(1).endswith("\nerror: the disk is full; make room\n")
    said = f"error: process 1 (host {HOST}): the disk is full; make room\n"
    assert runs["mistake"].log(0).endswith(said)
    assert "Traceback" not in runs["mistake"].log(0) + runs["mistake"].log(1)


def test_a_host_that_is_not_like_the_first_is_named_on_all(runs):
    assert runs["facts"].statuses() == [2, 2, 2]
    for member in range(3):
        assert (
            runs["facts"]
            .log(member)
            .endswith(
                f"error: these are not as on process 0 (host {HOST}): process 1 (host {HOST}): "
                "another code, jax 0.11.0 instead of 0.10.2; make all hosts the same\n"
            )
        )
        assert "begins" not in runs["facts"].log(member)


@pytest.mark.parametrize("name, lost", [("killed", 1), ("stopped", 2), ("coordinator", 0)])
def test_who_is_lost_is_named_by_all_others(runs, name, lost):
    run = runs[name]
    others = [member for member in range(len(run.logs)) if member != lost]
    assert run.statuses(*others) == [75] * len(others)
    at = r", the coordinator at 127\.0\.0\.1:\d+" if lost == 0 else ""
    line = rf"lost: process {lost} \(host {HOST}\){at}: no sign of life for 12 s after step \d+\n"
    for member in others:
        (found,) = re.findall(rf"^{line}", run.log(member), re.M)
        assert int(re.findall(r"\d+", found)[-1]) >= 20
        assert "Traceback" not in run.log(member)
        assert run.logs[member].with_name(f"last.{member}").exists()


@pytest.mark.slow
def test_who_comes_too_late_is_met_again(tmp_path):
    with Members(tmp_path / "late", 2, "100", "late=1") as run:
        assert run.statuses() == [75, 75]
        found = [re.findall(r"^lost: process (\d) .*", run.log(member), re.M) for member in (0, 1)]
        assert found == [["0"], ["0"]]
        assert "Traceback" not in run.log(0) + run.log(1)


@pytest.mark.slow
def test_who_compiles_for_long_is_waited_for(tmp_path):
    with Members(tmp_path / "compiles", 2, "100", "compiles=1") as run:
        assert run.statuses() == [0, 0]


@pytest.mark.parametrize("name", ["asked", "interrupted"])
def test_a_signal_to_one_ends_all_at_the_same_step(runs, name):
    run = runs[name]
    assert set(run.statuses()) == {75}
    assert len({re.findall("ends after .*", run.log(i))[0] for i in range(len(run.logs))}) == 1


def test_alone_there_is_nobody_to_wait_for():
    with Peers.join(None) as alone:
        assert alone.gather("name", "value") == ["value"]
        assert alone.everyone(True) and not alone.everyone(False)
        alone.check_same({"code": "1"})
        assert not alone.stop_agreed(3)
        assert not alone.several
    with pytest.raises(ZeroDivisionError), Peers.join(None):
        raise ZeroDivisionError


def test_facts_are_code_versions_and_fields_but_not_names_of_folders(monkeypatch, tmp_path):
    found = peers.facts(Config())
    assert {"code", "python", *run_folder.versions(), "train.batch", "optim.lr"} <= found.keys()
    assert found["train.batch"] == repr(Config().train.batch)
    assert not {"train.logdir", "data.data_dir", "data.text_dir"} & found.keys()

    assert peers.local_devices() == {"devices": f"{len(jax.devices())} x cpu"}

    source = tmp_path / "txl_jax" / "deep" / "more.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "txl_jax" / "peers.py"))
    codes = []
    for text in ("", "x = 1\n", "x = 2\n"):
        source.write_text(text)
        codes.append(peers.facts(Config())["code"])
    source.rename(source.with_name("other.py"))
    codes.append(peers.facts(Config())["code"])
    Path(tmp_path / "notes.txt").write_text("no code")
    assert len({found["code"], *codes}) == 5
    assert peers.facts(Config())["code"] == codes[-1]
