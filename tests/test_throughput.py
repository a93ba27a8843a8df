"""`--throughput`: the line of JSON that comes out is that of real steps, and nothing is written."""

import dataclasses
import json
import math
import platform
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import jax
import numpy as np
import pytest

from tests import tiny
from tests.members import free_port
from tests.tiny import WORDS, Shell
from txl_jax import config, metrics, observed_scaling, sharding, throughput, train
from txl_jax.checks import WARM_UP
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.model import abstract
from txl_jax.peers import Peers
from txl_jax.step import init_state, make_train_step, place_batch
from txl_jax.throughput import SEGMENTS, open_streams, zipf

pytest_plugins = ["tests.tiny_runs"]

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("compiled")]

BATCH, TGT_LEN, STEPS, N_TOKEN = 4, 8, WARM_UP + 7, 3000
SHAPE = (
    *("--n-layer", "1", "--d-model", "16", "--n-head", "2", "--d-head", "4", "--d-inner", "16"),
    *("--tgt-len", str(TGT_LEN), "--mem-len", "6", "--batch", str(BATCH)),
    *("--n-token", str(N_TOKEN), "--cutoffs", "100", "500"),
    *("--max-tokens", str(STEPS * BATCH * TGT_LEN)),
)
WORDS_OF_TEST_1 = ("--local", "--config", "test_1", *SHAPE)


@pytest.fixture(scope="module")
def printed(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The two lines of test_1 in a small shape: the one for people, and the JSON."""
    empty = tmp_path_factory.mktemp("empty")
    status, output, errors = shell.run("train", *WORDS_OF_TEST_1, cwd=empty)
    assert (status, errors) == (0, "")
    assert list(empty.iterdir()) == []
    line, numbers = output.splitlines()
    return line, json.loads(numbers)


def cfg() -> Config:
    return config.load("test_1", list(SHAPE))


def test_what_was_measured_is_said_with_all_that_it_depends_on(printed):
    _, found = printed
    expected = {
        "config": "test_1",
        "dataset": "synthetic",
        "parameters": metrics.count(abstract(cfg().model)[1]),
        "batch": BATCH,
        "tgt_len": TGT_LEN,
        "mem_len": 6,
        "tokens_per_step": BATCH * TGT_LEN,
        "warm_up_steps": WARM_UP,
        "timed_steps": STEPS - WARM_UP,
        "mfu": None,
        "peak_device_bytes": None,
        "devices": 1,
        "processes": 1,
        "device_kind": "cpu",
        "platform": "cpu",
        "dtype": "float16",
        "remat": False,
        "accumulate": 1,
        "zero": 0,
        "fsdp": False,
    }
    assert found == found | expected
    versions = found["versions"]
    assert versions["jax"] == jax.__version__
    assert versions["python"] == platform.python_version()
    assert {"jaxlib", "flax"} < versions.keys()
    assert 0 < found["loss"] < 2 * math.log(N_TOKEN)


def test_what_is_printed_is_what_scaling_reads(printed, tmp_path):
    line, found = printed
    (tmp_path / "output").write_text(f"{line}\n{json.dumps(found)}\n")
    (observed,) = observed_scaling.read(str(tmp_path / "output"))
    assert observed.tokens_per_s == found["tokens_per_s"]["median"]
    assert (observed.devices, observed.alike["each"]) == (1, BATCH)


def test_rates_are_those_of_the_time_of_a_step(printed):
    line, found = printed
    ms, rates, tokens = (found[name] for name in ("ms_per_step", "sequences_per_s", "tokens_per_s"))
    assert 0 < ms["q1"] <= ms["median"] <= ms["q3"] < 1000 * found["first_step_s"]
    for rate, time in (("q1", "q3"), ("median", "median"), ("q3", "q1")):
        assert rates[rate] == pytest.approx(1000 * BATCH / ms[time])
        assert tokens[rate] == pytest.approx(1000 * BATCH * TGT_LEN / ms[time])
    assert line.startswith(f"test_1: 1 x cpu | {BATCH} x {TGT_LEN} tokens a step | ")
    assert f"{ms['median']:.1f} ms/step ({ms['q1']:.1f} to {ms['q3']:.1f})" in line
    assert f"{rates['median']:.1f} sequences/s | {tokens['median']:,.0f} tokens/s" in line


def test_the_steps_are_those_of_training(printed):
    """The mean loss of all steps is that of the same steps made one by one."""
    mesh = tiny.one_device()
    known, streams = open_streams(cfg(), Peers(None))
    step = make_train_step(known, mesh, len(streams))
    state = init_state(known, mesh)
    for n in range(STEPS):
        state, _ = step(state, *place_batch(known, mesh, streams.segment(n % SEGMENTS)))
    assert printed[1]["loss"] == pytest.approx(float(state.totals.loss / state.totals.tokens))


def test_each_step_is_timed_and_all_devices_work():
    mesh = sharding.make_mesh()
    # In float32, where no step overflows and is left out of the totals.
    model = dataclasses.replace(cfg().model, dtype="float32")
    known, streams = open_streams(dataclasses.replace(cfg(), model=model), Peers(None))
    seconds, totals = throughput.time_steps(known, mesh, streams, init_state(known, mesh))
    assert seconds.shape == (STEPS,) and (seconds > 0).all()
    assert totals.tokens == STEPS * BATCH * TGT_LEN
    found = throughput.measure(known, mesh, streams)
    assert found["devices"] == mesh.devices.size == 4
    assert found["tokens_per_s"]["median"] == pytest.approx(
        1000 * BATCH * TGT_LEN / found["ms_per_step"]["median"]
    )


def test_a_loss_that_is_not_finite_is_null():
    optimizer = dataclasses.replace(cfg().optim, lr=1e30, clip=0.0, optim="sgd")
    model = dataclasses.replace(cfg().model, dtype="float32")
    changed = dataclasses.replace(cfg(), optim=optimizer, model=model)
    known, streams = open_streams(changed, Peers(None))
    assert throughput.measure(known, tiny.one_device(), streams)["loss"] is None


def test_a_real_data_set_is_measured_too_and_no_run_is_begun(shell):
    words = [*WORDS, "--throughput", "--logdir", "runs/measured", "--max-tokens", "900"]
    status, output, errors = shell.run("train", *words)
    assert (status, errors) == (0, "")
    found = json.loads(output.splitlines()[-1])
    assert (found["config"], found["dataset"]) == ("quickstart", "text")
    assert found["timed_steps"] == math.ceil(900 / tiny.BATCH / tiny.TGT_LEN) - WARM_UP
    assert not (shell.home / "runs" / "measured").exists()


@pytest.mark.parametrize("command", ["train", "lr_finder"])
def test_hosts_with_other_texts_are_told_so(shell, tmp_path, monkeypatch, command):
    words = [word for word in WORDS if word not in ("--local", "--no-throughput")]
    words += ["--max-tokens", "900", *(["--throughput"] if command == "train" else [])]
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    processes = []
    try:
        for number in range(2):
            home = tmp_path / str(number)
            tiny.write_text(home / "text")
            if number:
                (home / "text" / "003.txt").write_text("another text\n")
            monkeypatch.setenv("JAX_PROCESS_ID", str(number))
            processes.append(shell.start(command, *words, cwd=home, stderr=STDOUT))
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert "another token files; make all hosts the same" in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--no-throughput", "synthetic has nothing to learn from: add --throughput, or name a"),
        ("--n-token 0", r"--n-token says, and that is 0: give the size .* 267735 is WikiText"),
        ("--n-token 400", "cutoffs"),
        ("--max-tokens 320", r"320 are 10 steps, .* after the first 10: use --max-tokens 640 or"),
        ("--batch 0", "batch is 0"),
        ("--dataset text8 --vocab words --n-token 0", "text8 has no words"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, says, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as refusal:
        train.main([*WORDS_OF_TEST_1, *words.split()])
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_batch_for_validation_does_not_matter(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*WORDS_OF_TEST_1, "--eval-batch", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["devices"] == 4


def test_rare_words_are_as_rare_as_in_text():
    tokens = zipf(267_735, 1_000_000)
    assert tokens.dtype == np.int32 and 0 <= tokens.min() < tokens.max() < 267_735
    edges = [0, 20_000, 40_000, 200_000, 267_735]
    shares = np.histogram(tokens, edges)[0] / len(tokens)
    np.testing.assert_allclose(shares, [0.952, 0.017, 0.028, 0.004], atol=5e-4)
    counts = np.bincount(tokens)
    assert counts[0] > counts[1] > counts[10] > counts[1000]
    np.testing.assert_array_equal(zipf(267_735, 1_000_000), tokens)


def test_synthetic_streams_are_whole_segments_of_every_token():
    known, streams = open_streams(cfg(), Peers(None))
    assert known == cfg()
    assert len(streams) == SEGMENTS
    for i in range(SEGMENTS):
        inputs, targets = streams.segment(i)
        assert inputs.shape == (BATCH, TGT_LEN)
        assert targets.min() >= 0
        assert targets.max() < N_TOKEN
