"""The learning-rate finder: its sweep is the train step at the rates it says, and nothing else."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.tiny import LOGDIR, WORDS, Shell
from txl_jax import lr_finder, preflight, range_test, sharding, token_files
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.lr_finder_arguments import WARM
from txl_jax.range_test import Sweep, draw, first_state, run_sweep, smooth, suggest
from txl_jax.step import make_train_step, place_batch
from txl_jax.streams import Streams

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("compiled")


def test_smoothing_weighs_recent_losses_more_and_keeps_a_constant():
    assert smooth([3.0] * 30) == pytest.approx([3.0] * 30)
    losses = [5.0, 1.0, 2.0, 7.0]
    weights = np.array([0.9**3, 0.9**2, 0.9, 1.0])
    assert smooth(losses)[-1] == pytest.approx(weights @ losses / weights.sum())
    assert smooth([]) == []


def falling(rates: np.ndarray) -> np.ndarray:
    """Losses that fall by 2 nats around 1e-3, and rise from 1e-1 on."""
    place = np.log10(rates)
    return 4 - np.tanh(2 * (place + 3)) + 30 * np.maximum(0, place + 1) ** 2


def test_it_suggests_the_steepest_descent_and_a_tenth_of_the_lowest():
    rates = np.geomspace(1e-6, 1, 4000)
    sweep = Sweep(list(rates), list(falling(rates)), diverged=False)
    suggestion = suggest(sweep)
    assert suggestion
    # The smoothed loss trails by ten of the 667 steps of a decade.
    assert suggestion.steepest == pytest.approx(1e-3 * 10 ** (9 / 667), rel=0.02)
    assert suggestion.lowest == pytest.approx(1e-1, rel=0.15)
    said = range_test.advice(sweep, suggestion, tiny.CONFIG)
    assert f"--lr {suggestion.steepest:.2g}: the steepest descent" in said
    assert f"--lr {suggestion.lowest / 10:.2g}: a tenth of where it is lowest" in said
    assert "still falling" not in said


def test_rates_that_the_schedule_will_scale_are_suggested_unscaled():
    rates = np.geomspace(1e-6, 1, 4000)
    sweep = Sweep(list(rates), list(falling(rates)), diverged=False)
    suggestion = suggest(sweep)
    assert suggestion
    cfg = dataclasses.replace(
        tiny.CONFIG,
        optim=dataclasses.replace(tiny.CONFIG.optim, lr_batch=32),
        train=dataclasses.replace(tiny.CONFIG.train, batch=128),
    )
    said = range_test.advice(sweep, suggestion, cfg)
    assert f"--lr {suggestion.steepest / 4:.2g} (for a batch of 32)" in said


def test_what_the_first_steps_and_the_end_say_is_not_over_read():
    rates = list(np.geomspace(1e-6, 1, 50))
    rising = Sweep(rates, list(np.linspace(3, 9, 50)), diverged=False)
    assert suggest(rising) is None
    assert "it did not fall" in range_test.advice(rising, None, tiny.CONFIG)
    # One high loss at the beginning would be the steepest descent of all.
    suggestion = suggest(Sweep(rates, [9.0, *np.linspace(5, 2, 49)], diverged=False))
    assert suggestion and suggestion.steepest >= rates[WARM]
    still_falling = Sweep(rates, list(np.linspace(5, 2, 50)), diverged=False)
    said = range_test.advice(still_falling, suggest(still_falling), tiny.CONFIG)
    assert said.endswith("the loss was still falling at the end: try a higher --lr-to")


@pytest.mark.parametrize("losses", [[], [3.0], list(np.linspace(5, 400, 60))])
def test_any_sweep_can_be_drawn(tmp_path, losses):
    sweep = Sweep(list(np.geomspace(1e-6, 1, 60))[: len(losses)], losses, diverged=True)
    draw(sweep, suggest(sweep), "title", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 600))


@pytest.fixture
def cfg(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(shell.home)
    return tiny.CONFIG


def words(*more: str) -> list[str]:
    return [*WORDS, "--lr-from", "1e-4", "--lr-to", "0.1", "--steps", "30", *more]


def towards(fraction: np.float32, old: np.ndarray, new: jax.Array) -> np.ndarray:
    return old + fraction * (np.asarray(new) - old)


@pytest.mark.slow
def test_a_sweep_is_the_train_step_at_growing_rates(cfg):
    """Over more than one epoch, with memory, dropout and clipping as in training."""
    mesh, tokens = tiny.one_device(), token_files.prepare(cfg.data)
    cfg = preflight.with_vocabulary(cfg, tokens.vocab)
    streams = Streams.trimmed(tokens.splits["train"], tiny.BATCH, tiny.TGT_LEN)
    # An epoch of 20 segments, so that it begins anew within the sweep.
    streams = dataclasses.replace(streams, length=20 * tiny.TGT_LEN)
    sweep = run_sweep(cfg, mesh, streams, first_state(cfg, mesh, tokens), 1e-4, 1e-1, 30)
    assert sweep.lr == pytest.approx(list(np.geomspace(1e-4, 1e-1, 30)), rel=1e-5)
    assert not sweep.diverged

    # The same as updates of a rate of 1, scaled one by one: the schedule is constant here.
    plain = dataclasses.replace(cfg.optim, scheduler="constant", warmup_tokens=0, lr=1.0)
    train_step = make_train_step(dataclasses.replace(cfg, optim=plain), mesh, len(streams))
    state = first_state(cfg, mesh, tokens)
    losses, before = [], 0.0
    for n, lr in enumerate(sweep.lr):
        old = jax.tree.map(np.array, state.params)
        batch = place_batch(cfg, mesh, streams.segment(n % 20))
        state, _ = train_step(state, *batch)
        total = float(state.totals.loss)
        losses.append((total - before) / (tiny.BATCH * tiny.TGT_LEN))
        before = total
        moved = jax.tree.map(functools.partial(towards, np.float32(lr)), old, state.params)
        state = state._replace(params=jax.device_put(moved, sharding.repeated(mesh)))
    assert sweep.loss == pytest.approx(losses, rel=1e-3)
    assert losses[0] > 2.9 and min(losses) < 2.4


def test_the_command_leaves_points_picture_and_nothing_else(cfg, finished, capsys):
    """It starts where the run would and ends when the loss diverges."""
    before = tiny.files(Path.cwd())
    lr_finder.main(words("--lr-to", "1e9", "--steps", "60", "--init-from", LOGDIR))
    out = Path("runs/quickstart-lr-finder")
    found = json.loads((out / "lr_finder.json").read_text())
    lines = tiny.metrics(finished)
    best = min(line["learning/val_loss"] for line in lines if "learning/val_loss" in line)
    assert found["loss"][0] < best + 0.3 < 2
    assert found["diverged"] and 10 < len(found["lr"]) < 60
    assert all(math.isfinite(loss) for loss in found["loss"])
    assert found["smoothed"] == pytest.approx(smooth(found["loss"]))
    assert found["config"]["train"]["init_from"] == LOGDIR
    sweep = Sweep(found["lr"], found["loss"], found["diverged"])
    suggestion = suggest(sweep)
    assert found["suggestion"] == (suggestion and dataclasses.asdict(suggestion))
    said = capsys.readouterr().out
    assert said.startswith(f"{len(found['lr'])} steps; the loss diverged at ")
    assert said == (
        f"{range_test.advice(sweep, suggestion, tiny.CONFIG)}\n"
        f"{out}/lr_finder.png shows it, {out}/lr_finder.json has the points\n"
    )
    after = tiny.files(Path.cwd())
    new = {str(out / name) for name in ("lr_finder.json", "lr_finder.png")}
    assert after.keys() - before.keys() == new
    assert {name: after[name] for name in before} == before, "the run's folder was touched"


@pytest.mark.parametrize(
    "options, complaint",
    [
        ("--lr-from 0", "lr_from is 0.0 and lr_to 0.1; they have to be above 0, and lr_from below"),
        ("--lr-to 1e-5", "lr_from is 0.0001 and lr_to 1e-05; they have to be"),
        ("--lr-to inf", "lr_to inf"),
        ("--lr-to nan", "lr_to nan"),
        ("--steps 19", "steps is 19; it has to be at least 20"),
        (f"--out {LOGDIR}", f"{LOGDIR} is the folder of a run; take another --out"),
        ("--out text/000.txt", "cannot write to text/000.txt: File exists; take an --out that is"),
        ("--out new --n-layer 0", "n_layer is 0"),
        ("--out new --tgt-len 5000", "too short for a tgt_len of 5000"),
        ("--out new --init-from missing", "no run in missing"),
        ("--out new --lr-form 1", r"unknown option --lr-form \(did you mean --lr-from\?\)"),
    ],
)
def test_it_refuses_before_it_writes(cfg, finished, options, complaint):
    before = tiny.files(Path.cwd())
    with pytest.raises(UserError, match=complaint) as refused:
        lr_finder.main(words(*options.split()))
    assert "\n" not in str(refused.value)
    assert tiny.files(Path.cwd()) == before
    assert not Path("new").exists()
