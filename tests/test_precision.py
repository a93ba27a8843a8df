"""Training in the three types, and what a step does that overflows."""

import contextlib
import functools
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import tiny
from tests.tiny import Shell
from txl_jax import checks, divergence, precision, preflight, train
from txl_jax.checkpoint import Checkpoints
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.errors import UserError
from txl_jax.precision import CEILING, FIRST_SCALE, GIVE_UP_AFTER, GROW_AFTER, LossScale
from txl_jax.step import Totals, TrainState, init_state, make_train_step, place_batch

pytest_plugins = ["tests.tiny_runs"]

QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options: these tests compile for much longer than they compute."""

MESH = Mesh(np.asarray(jax.devices()[:1]), ("data",))
V, L, B, T, D, SEGMENTS = 9, 2, 4, 8, 16, 3


def device(platform: str, kind: str, **other: str) -> Any:
    return SimpleNamespace(platform=platform, device_kind=kind, **other)


CPU, TPU = device("cpu", "cpu"), device("tpu", "TPU v4")
K80 = device("gpu", "Tesla K80", compute_capability="3.7")
V100 = device("gpu", "Tesla V100-SXM2-16GB", compute_capability="7.0")
A100 = device("gpu", "NVIDIA A100-SXM4-40GB", compute_capability="8.0")
MI300 = device("gpu", "AMD Instinct MI300X", compute_capability="gfx942")


@pytest.mark.parametrize("where", [CPU, A100, MI300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_devices_that_can(where, dtype):
    precision.check_device(dtype, where)


@pytest.mark.parametrize("dtype, where", [("float16", V100), ("bfloat16", TPU), ("float32", K80)])
def test_types_that_older_devices_have(dtype, where):
    precision.check_device(dtype, where)


@pytest.mark.parametrize(
    "dtype, where, words",
    [
        ("bfloat16", V100, ["V100", "compute capability 7.0", "8.0 or more", "--dtype float16"]),
        ("float16", K80, ["K80", "compute capability 3.7", "6.0 or more", "--dtype float32"]),
        ("bfloat16", K80, ["K80", "--dtype float32"]),
        ("float16", TPU, ["TPU v4", "--dtype bfloat16"]),
    ],
)
def test_a_device_that_cannot_is_one_line(dtype, where, words):
    with pytest.raises(UserError) as raised:
        precision.check_device(dtype, where)
    message = str(raised.value)
    assert message.startswith(f"dtype is {dtype}") and "\n" not in message
    assert all(word in message for word in words), message


def test_training_refuses_it(monkeypatch):
    monkeypatch.setattr(checks, "_LEAST_CAPABILITY", {"float16": 99.0, "bfloat16": 99.0})
    mesh: Any = SimpleNamespace(devices=np.asarray([A100]))
    for dtype in ("float16", "bfloat16"):
        cfg = Config(model=ModelConfig(n_token=9, dtype=dtype))
        with pytest.raises(UserError, match=f"dtype is {dtype}"):
            preflight.check(cfg, mesh)


def numbers(scale: float, good: int = 0, stuck: int = 0, overflows: int = 0) -> LossScale:
    return LossScale(jnp.float32(scale), *map(jnp.int32, (good, stuck, overflows)))


@pytest.mark.parametrize(
    "old, overflowed, new",
    [
        ((64, 5), False, (64, 6)),
        ((64, GROW_AFTER - 2), False, (64, GROW_AFTER - 1)),
        ((64, GROW_AFTER - 1), False, (128, 0)),
        ((CEILING, GROW_AFTER - 1), False, (CEILING, 0)),
        ((64, GROW_AFTER - 1), True, (32, 0, 0, 1)),
        ((64, 0, 0, 3), True, (32, 0, 0, 4)),
        ((2, 0, 0, 0), True, (1, 0, 0, 1)),
        ((1, 0, 0, 0), True, (1, 0, 1, 1)),
        ((1, 0, 7, 9), True, (1, 0, 8, 10)),
        ((1, 0, 7, 9), False, (1, 1, 0, 9)),
        # Once it is hopeless it stays so until somebody looks.
        ((1, 0, GIVE_UP_AFTER, 30), False, (1, 1, GIVE_UP_AFTER, 30)),
    ],
)
def test_the_scale_after_a_step(old, overflowed, new):
    got = numbers(*old).after(jnp.asarray(overflowed))
    assert [float(field) for field in got] == [float(field) for field in numbers(*new)]
    assert [field.dtype for field in got] == [field.dtype for field in numbers(1)]


def test_only_float16_is_scaled():
    assert precision.begin("float32") is precision.begin("bfloat16") is None
    first = precision.begin("float16")
    assert first and float(first.scale) == FIRST_SCALE == 65536


def config(dtype: Any) -> Config:
    return Config(
        model=ModelConfig(
            n_token=V,
            n_layer=L,
            n_head=2,
            d_model=D,
            d_head=8,
            d_inner=32,
            tgt_len=T,
            mem_len=T,
            dtype=dtype,
        ),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(batch=B, max_tokens=10_000, accumulate=2),
    )


@functools.cache
def batch(step: int) -> Any:
    """Counting, upwards or downwards: there is something to learn, and memory helps."""
    rng = np.random.default_rng(step)
    start, way = rng.integers(0, V, (B, 1)), rng.choice([-1, 1], (B, 1))
    tokens = ((start + way * np.arange(T + 1)) % V).astype(np.int32)
    return place_batch(config("float32"), MESH, (tokens[:, :-1], tokens[:, 1:]))


@functools.cache
def first_state(dtype: str) -> TrainState:
    build = functools.partial(init_state, config(dtype), MESH)
    return jax.jit(build, compiler_options=QUICKLY)()


def begin(dtype: str = "float16") -> TrainState:
    """A first state that may be donated."""
    return jax.tree.map(jnp.copy, first_state(dtype))


@functools.cache
def compiled_step(dtype: str) -> Any:
    step: Any = make_train_step(config(dtype), MESH, SEGMENTS)
    return step.lower(begin(dtype), *batch(0)).compile(compiler_options=QUICKLY)


def look(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


@functools.cache
def losses(dtype: str) -> np.ndarray:
    """Losses of 100 steps from the same weights, in nats."""
    state = begin(dtype)._replace(params=begin("float32").params)
    found = []
    for n in range(100):
        state, _ = compiled_step(dtype)(state, *batch(n))
        assert state.memory.hidden.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        found.append(float(state.totals.loss / state.totals.tokens))
        state = state._replace(totals=jax.device_put(Totals.zero(), state.step.sharding))
    return np.asarray(found)


def test_the_three_types_train_alike():
    exact = losses("float32")
    assert exact[0] > 2.1 and exact[-10:].mean() < 0.7
    # The relative precision of the types is 2**-11 and 2**-8; steps multiply the difference.
    for dtype, first, later in (("float16", 5e-5, 0.06), ("bfloat16", 2e-3, 0.15)):
        difference = abs(losses(dtype) - exact)
        assert difference[:5].max() < first
        assert difference.max() < later
        assert abs(losses(dtype)[-20:].mean() - exact[-20:].mean()) < later / 3
        assert difference[:5].max() > 1e-6, "it is another type"


def test_the_scale_does_not_change_what_is_learned():
    """Small scales lose the smallest gradients, large ones none; norm and loss are unscaled."""
    norms = {}
    for scale in (2.0**10, 2.0**14):
        state = begin()._replace(loss_scale=jax.device_put(numbers(scale), MESH.devices.flat[0]))
        state, _ = compiled_step("float16")(state, *batch(0))
        norms[scale] = float(state.totals.grad_norm), float(state.totals.loss)
    assert norms[2.0**10] == pytest.approx(norms[2.0**14], rel=1e-3)
    exact, _ = compiled_step("float32")(begin("float32"), *batch(0))
    assert norms[2.0**14][0] == pytest.approx(float(exact.totals.grad_norm), rel=5e-3)


def with_scale(state: TrainState, scale: LossScale) -> TrainState:
    return state._replace(loss_scale=jax.device_put(scale, state.step.sharding))


@pytest.mark.parametrize("step, filled", [(1, T), (SEGMENTS, 0)])
def test_a_step_that_overflows_changes_nothing_but_the_scale(step, filled):
    state = begin()
    for n in range(step):
        state, _ = compiled_step("float16")(state, *batch(n))
    # The loss is finite; its gradient is too large for float16.
    state = with_scale(state, numbers(2.0**60, 7, 0, 2))
    before = look(state._replace(key=None))
    after, done = compiled_step("float16")(state, *batch(step))
    assert int(done) == int(after.step) == step + 1
    for name in ("params", "opt_state", "totals"):
        jax.tree.map(
            np.testing.assert_array_equal, look(getattr(after, name)), getattr(before, name)
        )
    # An epoch begins with empty memory all the same.
    np.testing.assert_array_equal(after.memory.hidden, before.memory.hidden)
    assert int(after.memory.filled) == filled
    assert look(after.loss_scale) == (min(2.0**59, CEILING), 0, 0, 3)
    assert int(after.totals.non_finite_step) == -1
    again, _ = compiled_step("float16")(with_scale(after, numbers(1024.0)), *batch(step + 1))
    assert int(again.totals.steps) == step + 1


def test_no_infinity_gets_into_memory_and_the_run_is_given_up():
    state = begin()
    table = state.params["embedding"]["tables"][0]
    state.params["embedding"]["tables"][0] = table.at[:].set(1e5)  # infinite in float16
    state = with_scale(state, numbers(4.0))
    for n in range(2 + GIVE_UP_AFTER):
        assert state.loss_scale and int(state.loss_scale.stuck) == max(n - 2, 0)
        divergence.finite_totals(state, Any)  # pyright: ignore[reportArgumentType]
        state, _ = compiled_step("float16")(state, *batch(n))
        assert np.isfinite(state.memory.hidden).all()
    assert look(state.loss_scale) == (1, 0, GIVE_UP_AFTER, 2 + GIVE_UP_AFTER)


HALF = [
    *tiny.WORDS,
    *("--dtype", "float16", "--optim", "lamb", "--lr", "0.2", "--weight-decay", "0.01"),
    *("--scheduler", "dev_perf", "--patience", "0", "--decay-rate", "0.25", "--lr-min", "0.02"),
    *("--batch", "8", "--warmup-tokens", "1000", "--clip-nonemb", "--accumulate", "2"),
    *("--max-tokens", str(40 * 8 * tiny.TGT_LEN), "--log-every", "5", "--eval-every", "4"),
    *("--eval-max-tokens", "100"),
]


@pytest.fixture(scope="module")
def half(shell: Shell, compiled: None) -> Path:
    """The folder of an undisturbed run of HALF."""
    logdir = shell.home / "runs" / "half"
    with contextlib.chdir(shell.home):
        assert train.main([*HALF, "--logdir", str(logdir)]) == 0
    return logdir


@pytest.mark.slow
def test_the_scale_and_the_plateau_outlive_a_stop(shell, half, compiled, monkeypatch):
    monkeypatch.chdir(shell.home)
    logdir = shell.home / "runs" / "half-stopped"
    for before, stop in ((0, 6), (6, 20)):
        with monkeypatch.context() as patch:
            tiny.stop_after(stop - before, patch)
            assert train.main([*HALF, "--logdir", str(logdir)]) == 128 + signal.SIGTERM
    assert train.main([*HALF, "--logdir", str(logdir)]) == 0
    tiny.same_run(logdir, half)


def test_the_log_shows_the_scale_and_how_often_it_overflowed(half):
    lines = [line for line in tiny.metrics(half) if "learning/loss_scale" in line]
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    for line in lines:
        assert line["learning/loss_scale"] == FIRST_SCALE / 2 ** line["learning/overflows"]
    assert lines[-1]["learning/loss"] < lines[0]["learning/loss"]


def test_the_rate_falls_with_every_validation_that_is_not_better(half):
    validations = {
        line["step"]: line["learning/val_loss"]
        for line in tiny.metrics(half)
        if "learning/val_loss" in line
    }
    best, rate, expected = math.inf, 0.2, {}
    for step in range(1, 41):
        warm = step * 8 * tiny.TGT_LEN / 1000
        expected[step] = min(warm, 1.0) * rate
        if (loss := validations.get(step)) and step * 8 * tiny.TGT_LEN >= 1000:
            if loss >= best * 0.9999:
                rate = max(rate / 4, 0.02)
            best = min(best, loss)
    assert rate < 0.2, "the rate should have fallen"
    for line in tiny.metrics(half):
        if "learning/lr" in line:
            assert line["learning/lr"] == pytest.approx(expected[line["step"]], rel=1e-5)


def test_a_run_that_float16_cannot_hold_stops_and_keeps_its_checkpoint(
    shell, half, compiled, monkeypatch
):
    monkeypatch.chdir(shell.home)
    logdir = shell.home / "runs" / "half-hopeless"
    words = [*HALF, "--logdir", str(logdir), "--eval-every", "100", "--log-every", "40"]
    words += ["--init-std", "1e5"]  # infinite in float16
    with monkeypatch.context() as patch:
        tiny.stop_after(3, patch)
        assert train.main(words) == 128 + signal.SIGTERM
    with pytest.raises(UserError) as raised:
        train.main(words)
    message = str(raised.value)
    assert "\n" not in message and "20 steps in a row" in message
    assert "(last checkpoint: step 3)" in message
    with Checkpoints(logdir / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3]
