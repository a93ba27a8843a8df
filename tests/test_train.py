import contextlib
import gc
import json
import math
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import tiny
from tests.tiny import LOGDIR, STEPS, WORDS, Shell
from txl_jax import findings, run_folder, sharding, token_files, vocab
from txl_jax.checkpoint import Checkpoints
from txl_jax.evaluator import Evaluator
from txl_jax.prefetch import Prefetch
from txl_jax.step import Totals, init_state, make_train_step, place_batch
from txl_jax.streams import Streams
from txl_jax.train import main
from txl_jax.trained import load_trained

pytest_plugins = ["tests.tiny_runs"]

STEP_TOKENS = tiny.BATCH * tiny.TGT_LEN
LOGGED = sorted({*range(tiny.LOG_EVERY, STEPS, tiny.LOG_EVERY), STEPS})
VALIDATED = sorted({*range(tiny.EVAL_EVERY, STEPS, tiny.EVAL_EVERY), STEPS})

OTHER_WORDS = [
    *WORDS,
    *("--optim", "sgd", "--momentum", "0.9", "--lr", "0.6", "--clip", "0"),
    *("--scheduler", "inv_sqrt", "--lr-batch", "16"),
    *("--dtype", "bfloat16", "--pre-lnorm", "--untie-r", "--no-tie-weight"),
    *("--same-length", "--clamp-len", "20"),
    *("--batch", "8", "--accumulate", "2", "--max-tokens", str(9 * 8 * tiny.TGT_LEN * 8)),
    *("--log-every", "5", "--eval-every", "13", "--eval-max-tokens", "20"),
]
"""Every other way through the train step. In this process it runs on four devices."""
OTHER_STEPS = 72


def tagged(logdir: Path, tag: str) -> dict[int, float]:
    """The values of a tag in metrics.jsonl, by step."""
    return {line["step"]: line[tag] for line in tiny.metrics(logdir) if tag in line}


def starts(logdir: Path) -> list[dict]:
    return json.loads((logdir / run_folder.STARTS).read_text())["starts"]


def test_a_run_shows_its_progress_and_what_came_of_it(shell, undisturbed, finished):
    output, errors = undisturbed
    assert errors == ""
    lines = output.splitlines()
    home = shell.home
    data = replace(tiny.CONFIG.data, text_dir=f"{home}/text", data_dir=f"{home}/data")
    files = token_files.prepare(data)
    found = findings.table(replace(files, folder=files.folder.relative_to(home))).splitlines()
    assert not files.new and lines[: len(found)] == found
    assert lines[len(found)] == (
        f"{LOGDIR}: {STEPS} steps of {tiny.BATCH} x {tiny.TGT_LEN} tokens, "
        f"{int(tagged(finished, 'sizes/params')[0]):,} parameters, 1 x cpu"
    )
    progress = [line for line in lines if line.startswith("step ") and "lr" in line]
    assert [int(line.split("/")[0].removeprefix("step ")) for line in progress] == LOGGED
    losses = tagged(finished, "learning/loss")
    for step, line in zip(LOGGED, progress, strict=True):
        assert f"| loss {losses[step]:.4f} | bpb {losses[step] / math.log(2):.3f} |" in line
        assert re.search(r"\| lr \S+ \| \S+ ms/step \| \S+ tokens/s \| \d+s left$", line), line
    for step, loss in tagged(finished, "learning/val_loss").items():
        bits = f"bpb {loss / math.log(2):.3f}"
        assert f"step {step} | validation loss {loss:.4f} | {bits}" in lines

    results = json.loads((finished / "results.json").read_text())
    head = lines.index(f"Step {results['step']}, the best by validation loss:")
    assert lines[head + 2].split("  ")[0] == "bits per byte"
    assert re.findall(r"memory (\d+)", lines[head + 2]) == ["0", "16", "64"]
    for split, line in zip(("valid", "test"), lines[head + 3 : head + 5], strict=True):
        bits = [f"{results['bits'][split][length]:.4f}" for length in ("0", "16", "64")]
        assert line.split() == [split, str(results["tokens"][split]), *bits]
    sample = [f"    {line}" for line in results["sample"].split("\n")]
    assert "\n".join(sample) in output
    assert len(results["sample"]) > 200
    assert f"tensorboard --logdir {LOGDIR}" in lines[-2]
    assert LOGDIR in lines[-3]


def test_the_folder_holds_all_that_is_needed_to_know_the_run(shell, finished):
    names = {path.name for path in finished.iterdir()}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names - {events} == {
        *("config.json", "run.json", "vocab.json", "metrics.jsonl", "samples.txt"),
        *("results.json", "checkpoints", "heartbeats"),
    }
    cfg = run_folder.read_config(finished)
    n_token = len(vocab.load(finished / "vocab.json"))
    assert cfg == replace(
        tiny.CONFIG,
        model=replace(tiny.CONFIG.model, n_token=n_token),
        train=replace(tiny.CONFIG.train, logdir=LOGDIR),
    )
    (start,) = starts(finished)
    program = [sys.executable, "-m", "txl_jax.train"]
    assert shlex.split(start["command"]) == [*program, *WORDS]
    assert start["devices"] == "1 x cpu"
    assert start["versions"]["jax"] == jax.__version__
    samples = re.findall(r"^step (\d+), ", (finished / "samples.txt").read_text("utf-8"), re.M)
    assert [int(step) for step in samples] == VALIDATED


def test_metrics_have_the_names_that_the_original_users_know(finished):
    lines = tiny.metrics(finished)
    assert all(line["tokens"] == line["step"] * STEP_TOKENS for line in lines)
    assert list(tagged(finished, "sizes/params")) == [0]
    assert list(tagged(finished, "sizes/non_emb_params")) == [0]
    for tag in ("learning/val_loss", "learning/val_bpc"):
        assert list(tagged(finished, tag)) == VALIDATED
    regular = [
        *("learning/loss", "learning/bpc", "learning/lr", "learning/grad_norm"),
        *("times/step", "times/tokens_per_sec", "times/samples_per_sec", "memory/host_peak"),
    ]
    for tag in regular:
        assert list(tagged(finished, tag)) == LOGGED
        assert min(tagged(finished, tag).values()) > 0


def test_metrics_are_what_their_names_say(finished):
    for loss, bits in (
        ("learning/loss", "learning/bpc"),
        ("learning/val_loss", "learning/val_bpc"),
    ):
        in_bits = {step: value / math.log(2) for step, value in tagged(finished, loss).items()}
        assert tagged(finished, bits) == pytest.approx(in_bits)
    losses = list(tagged(finished, "learning/loss").values())
    assert losses[0] > 2.5 and losses[-1] < 0.65
    for step, rate in tagged(finished, "learning/lr").items():
        # The rate of a step is read at the tokens before it, and that of warm-up after it.
        before = (step - 1) * STEP_TOKENS
        cosine = (1 + math.cos(math.pi * before / (STEPS * STEP_TOKENS))) / 2
        expected = step * STEP_TOKENS / 640 if before < 640 else cosine
        assert rate == pytest.approx(1e-2 * expected, rel=1e-4, abs=1e-8)
    speeds = [tagged(finished, f"times/{name}") for name in ("step", "samples_per_sec")]
    for step, rate in tagged(finished, "times/tokens_per_sec").items():
        assert rate == pytest.approx(STEP_TOKENS * 1000 / speeds[0][step])
        assert rate == pytest.approx(tiny.TGT_LEN * speeds[1][step])
    n_token, width, layers = run_folder.read_config(finished).model.n_token, 16, 2
    attention = 5 * width * width + 2 * width
    feed_forward = 2 * width * 32 + 32 + width + 2 * width
    in_layers = layers * (attention + feed_forward)
    others = 2 * width + n_token * (width + 1)  # r_w_bias, r_r_bias; embedding, output bias
    assert tagged(finished, "sizes/params") == {0: in_layers + others}
    assert tagged(finished, "sizes/non_emb_params") == {0: in_layers}


def test_tensorboard_shows_the_same_over_tokens(finished):
    assert tiny.tensorboard(finished) == tiny.shown_in_metrics(finished)


def test_a_finished_run_says_so_and_stays_as_it_is(copied):
    logdir = copied.home / LOGDIR
    before = tiny.files(logdir)
    status, output, errors = copied.run("train", *WORDS)
    assert (status, errors) == (0, "")
    assert output.startswith(f"{LOGDIR} is finished: all {STEPS} steps are done\nStep ")
    after = tiny.files(logdir)
    first, second = starts(logdir)
    assert json.loads(before.pop("run.json")) == {"starts": [first]}
    assert second["command"] == first["command"]
    assert after.pop("run.json") and after == before


def test_results_that_were_lost_are_made_again(copied):
    path = copied.home / LOGDIR / "results.json"
    results = path.read_text("utf-8")
    path.write_text(results[:100], "utf-8")
    status, output, errors = copied.run("train", *WORDS)
    assert (status, errors) == (0, "")
    assert path.read_text("utf-8") == results
    assert "memory 64" in output


def test_signals_save_and_the_same_command_goes_on(shell, finished):
    logdir = shell.home / "runs" / "signals"
    words = [*WORDS, "--logdir", str(logdir)]
    done = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = shell.start("train", *words)
        tiny.wait_for_step(process, logdir, done + 1)
        process.send_signal(number)
        output, errors = process.communicate()
        assert (process.returncode, errors) == (128 + number, "")
        first, *_, last = output.splitlines()
        assert first.startswith(f"{logdir}: {f'goes on after step {done} of ' if done else ''}400 ")
        said = re.fullmatch(
            rf"stopped by {number.name} after step (\d+): the same command goes on from the last "
            "checkpoint",
            last,
        )
        assert said and done < int(said[1]) < STEPS
        done = int(said[1])
        assert list((logdir / "checkpoints").glob(f"{done}.*/commit.json"))
    status, output, errors = shell.run("train", *words)
    assert (status, errors) == (0, "")
    assert output.startswith(f"{logdir}: goes on after step {done} of {STEPS} steps")
    tiny.same_run(logdir, finished)
    assert tiny.tensorboard(logdir) == tiny.shown_in_metrics(logdir)
    assert len(starts(logdir)) == 3


@pytest.fixture(scope="module")
def other(shell: Shell, compiled: None) -> Path:
    """The folder of an undisturbed run of OTHER_WORDS."""
    logdir = shell.home / "runs" / "other"
    with contextlib.chdir(shell.home):
        assert main([*OTHER_WORDS, "--logdir", str(logdir)]) == 0
    return logdir


def test_every_step_is_one_to_go_on_from(shell, other, compiled, monkeypatch, capsys):
    """In the middle of log intervals and of the epoch, at their ends, before and after those."""
    monkeypatch.chdir(shell.home)
    logdir = shell.home / "runs" / "stopped"
    words = [*OTHER_WORDS, "--logdir", str(logdir)]
    streams = Streams.trimmed(
        token_files.prepare(run_folder.read_config(other).data).splits["train"], 8, 16
    )
    epoch = len(streams)
    assert epoch > 14 and epoch + 2 < 2 * epoch < OTHER_STEPS
    assert streams.length % streams.tgt_len, "the last segment of an epoch should be padded"
    stops = [1, 13, epoch, epoch + 1, OTHER_STEPS - 1, OTHER_STEPS]
    best = json.loads((other / "results.json").read_text())["step"]
    assert stops[0] < best < stops[-2], "what was best should outlive a stop, and worse come after"
    for before, stop in zip([0, *stops], stops, strict=False):
        with monkeypatch.context() as patch:
            tiny.stop_after(stop - before, patch)
            assert main(words) == 128 + signal.SIGTERM
        assert f"stopped by SIGTERM after step {stop}:" in capsys.readouterr().out
    assert main(words) == 0
    tiny.same_run(logdir, other)
    assert len(starts(logdir)) == len(stops) + 1


def test_no_second_state_is_held_while_one_is_restored(shell, other, compiled, monkeypatch):
    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    params = load_trained(other, "latest", tiny.one_device()).params
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    restore, then = Checkpoints.restore, []

    def watched(*given: Any, **named: Any) -> Any:
        then.append(held())
        return restore(*given, **named)

    monkeypatch.chdir(shell.home)
    monkeypatch.setattr(Checkpoints, "restore", watched)
    gc.collect()
    before = held()
    assert main([*OTHER_WORDS, "--logdir", str(other)]) == 0
    assert then[0] - before < state_bytes / 2


def test_the_loop_is_these_steps(shell, other, compiled):
    """The segments in order, epoch after epoch; what is logged is the mean since the last line."""
    cfg, mesh = run_folder.read_config(other), sharding.make_mesh()
    with contextlib.chdir(shell.home):
        splits = token_files.prepare(cfg.data).splits
    streams = Streams.trimmed(splits["train"], 8, tiny.TGT_LEN)
    state, train_step = init_state(cfg, mesh), make_train_step(cfg, mesh, len(streams))
    losses, norms = tagged(other, "learning/loss"), tagged(other, "learning/grad_norm")
    logged = Totals.zero()
    for n in range(OTHER_STEPS):
        batch = place_batch(cfg, mesh, streams.segment(n % len(streams)))
        state, _ = train_step(state, *batch)
        if n + 1 in losses:
            sums = jax.device_get(state.totals)
            nats, tokens, norm, steps = (sums[i] - logged[i] for i in range(4))
            assert losses[n + 1] == pytest.approx(nats / tokens, rel=1e-5)
            assert norms[n + 1] == pytest.approx(norm / steps, rel=1e-5)
            logged = sums
    last = load_trained(other, "latest", mesh)
    assert last.step == OTHER_STEPS
    jax.tree.map(np.testing.assert_array_equal, last.params, state.params)
    evaluator = Evaluator(cfg.model, mesh, cfg.train.eval_batch)
    validated = tagged(other, "learning/val_loss")[OTHER_STEPS]
    assert validated == pytest.approx(evaluator(state.params, splits["valid"][:20]).loss)


@pytest.mark.slow
def test_waiting_for_a_slow_stream_is_logged(shell, compiled, monkeypatch):
    monkeypatch.chdir(shell.home)
    logdir, steps, waiting = shell.home / "runs" / "slow-stream", 6, threading.Event()
    take, at, taken = Prefetch.take, Streams.at, []

    def take_one(batches):
        taken.append(batches)
        if len(taken) == steps:
            waiting.set()
        return take(batches)

    def slow_at(streams, n, rows):
        if n == steps - 1:
            assert waiting.wait(100)
            time.sleep(0.5)
        return at(streams, n, rows)

    monkeypatch.setattr(Prefetch, "take", take_one)
    monkeypatch.setattr(Streams, "at", slow_at)
    words = [*WORDS, "--max-tokens", str(steps * STEP_TOKENS), "--log-every", "3"]
    assert main([*words, "--logdir", str(logdir)]) == 0
    waited, of = tagged(logdir, "times/input"), tagged(logdir, "times/step")
    assert 500 / 3 <= waited[6] <= of[6]
    assert 0 <= waited[3] <= of[3]


def test_other_optimizers_and_types_learn_as_well(other):
    losses = tagged(other, "learning/loss")
    assert list(losses) == [*range(5, OTHER_STEPS, 5), OTHER_STEPS]
    assert losses[5] > 2.3 and losses[OTHER_STEPS] < 1.2
    rates = tagged(other, "learning/lr")
    peak, warmup = 0.6 * 8 / 16, 640
    for step, rate in rates.items():
        after = step * 8 * tiny.TGT_LEN
        expected = peak * min(after / warmup, math.sqrt(warmup / after))
        assert rate == pytest.approx(expected, rel=1e-4)
    trained = load_trained(other, "best", tiny.one_device())
    assert trained.step == min((v, s) for s, v in tagged(other, "learning/val_loss").items())[1]
