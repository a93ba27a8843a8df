"""A run that goes on with another batch, or with other parts of it."""

import contextlib
import dataclasses
import math
import random
import shutil
import signal
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.members import free_port
from tests.tiny import TGT_LEN, WORDS
from txl_jax import config, run_folder, sharding, token_files, train, training
from txl_jax.checkpoint import Checkpoints
from txl_jax.config import ClusterConfig, Config
from txl_jax.course import Course
from txl_jax.model import Memory, abstract
from txl_jax.refill import refilled
from txl_jax.sentences import Sentences
from txl_jax.step import (
    TrainState,
    init_state,
    make_train_step,
    place_batch,
    state_shardings,
)
from txl_jax.streams import Streams, training_streams

pytest_plugins = ["tests.tiny_runs"]

CONFIG = dataclasses.replace(
    tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, n_token=50, mem_len=20, init_std=0.3)
)
TEXT = np.random.default_rng(0).integers(0, 50, 1000)
STREAMS = Streams.trimmed(TEXT, tiny.BATCH, TGT_LEN)

SHORT = [
    *WORDS,
    *("--batch", "8", "--lr-batch", "16", "--eps", "1e-3", "--warmup-tokens", "1000"),
    *("--max-tokens", str(40 * 8 * TGT_LEN), "--mem-len", "20", "--init-std", "0.2"),
    *("--log-every", "2", "--eval-every", "25", "--eval-max-tokens", "20", "--sample-tokens", "0"),
]


def read_slowly(cfg: Config, params: Any, streams: Streams, segment: int) -> Memory:
    """The memory before a segment, on one device, from the first segment of the streams on."""
    graphdef, _ = abstract(cfg.model)
    read = jax.jit(
        lambda params, inputs, memory: nnx.merge(graphdef, params).hidden(inputs, memory)[1]
    )
    params, memory = jax.device_get(params), Memory.empty(cfg.model, streams.batch)
    for i in range(segment):
        memory = read(params, streams.segment(i)[0], memory)
    return memory


def assert_same_memory(got: Memory, expected: Memory, atol: float = 1e-5) -> None:
    assert int(got.filled) == int(expected.filled)
    mem_len = expected.hidden.shape[2]
    filled = np.s_[:, :, mem_len - int(got.filled) :]
    np.testing.assert_allclose(got.hidden[filled], expected.hidden[filled], atol=atol)


@pytest.mark.parametrize(
    "tokens, said, zero_memory",
    [
        (32 * 64 + 1, "segment 0 of 16, 1 tokens back; memory is empty", False),
        (64, "segment 1 of 16; memory refilled from segment 0 on", False),
        (23 * 64 + 63, "segment 7 of 16, 63 tokens back; memory refilled from segment 3 on", False),
        (7 * 64, "segment 7 of 16; memory refilled from segment 3 on", True),
    ],
)
def test_memory_is_as_if_all_had_been_read(tokens, said, zero_memory, compiled):
    cfg = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, zero_memory=zero_memory),
        cluster=dataclasses.replace(CONFIG.cluster, zero=1),
    )
    mesh = sharding.make_mesh()
    state = init_state(cfg, mesh)._replace(step=jnp.int32(5))
    new, line = refilled(cfg, mesh, state, STREAMS, Course.after(64, 5, tokens), 3)
    assert line == f"batch 4 instead of 3: the streams are cut anew and go on at {said}"
    assert new._replace(memory=state.memory) == state
    assert int(new.memory.filled) == (20 if zero_memory else min(tokens // 64 % 16 * TGT_LEN, 20))
    assert_same_memory(new.memory, read_slowly(cfg, state.params, STREAMS, tokens // 64 % 16))
    for left, right in zip(
        jax.tree.leaves(new.memory),
        jax.tree.leaves(state_shardings(cfg, mesh).memory),
        strict=True,
    ):
        assert left.sharding.is_equivalent_to(right, left.ndim)


def stop_after(steps: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process, which receives SIGTERM in the course of the `steps`-th step."""
    with monkeypatch.context() as patch:
        tiny.stop_after(steps, patch)
        assert train.main(words) == 128 + signal.SIGTERM


def newest(logdir: Path) -> tuple[TrainState, dict[str, Any]]:
    """The newest state of a run, and what was noted with it."""
    cfg = run_folder.read_config(logdir)
    with Checkpoints(logdir / "checkpoints") as checkpoints:
        found = checkpoints.restore(init_state(cfg, sharding.make_mesh()))
    assert found is not None
    return found


def in_parts(cfg: Config, home: Path, parts: list[tuple[int, int]]) -> TrainState:
    """The state after so many steps of one batch, then of another, …; parts: (batch, steps).

    Each part is a run of its own batch at the step that the tokens seen come to. Of the parts
    before it has parameters and optimizer state; its memory is that of a slow reading.
    """
    with contextlib.chdir(home):
        text = token_files.prepare(cfg.data).splits["train"]
    mesh, tokens = sharding.make_mesh(), 0
    state = None
    for batch, steps in parts:
        part = dataclasses.replace(
            cfg, train=dataclasses.replace(cfg.train, batch=batch), cluster=ClusterConfig()
        )
        state = state or init_state(part, mesh)
        streams = Streams.trimmed(text, batch, TGT_LEN)
        first, rest = divmod(tokens, batch * TGT_LEN)
        assert rest == 0
        memory = read_slowly(part, state.params, streams, first % len(streams))
        state = state._replace(step=jnp.int32(first), memory=memory)
        state = jax.device_put(state, state_shardings(part, mesh))
        train_step = make_train_step(part, mesh, len(streams))
        for n in range(first, first + steps):
            segment = streams.segment(n % len(streams))
            state, _ = train_step(state, *place_batch(part, mesh, segment))
        tokens += steps * batch * TGT_LEN
    assert state is not None
    return state


@pytest.mark.slow
def test_a_run_of_batch_8_then_16_then_8(shell, compiled, monkeypatch, capsys):
    monkeypatch.chdir(shell.home)
    logdir = shell.home / "runs" / "refill-batches"
    words = [*SHORT, "--dropout", "0", "--dropatt", "0", "--logdir", str(logdir)]
    stop_after(6, words, monkeypatch)
    stop_after(4, words, monkeypatch)
    (logdir / "checkpoints" / "10.1" / "commit.json").write_text("{")
    capsys.readouterr()

    # Steps 7 to 10 were logged and are overtaken by fewer, larger ones.
    stop_after(3, [*words, "--batch", "16", "--zero", "1"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{logdir}: goes on after step 6 of 23 steps of 16 x 16 tokens, ")
    segments = len(Streams.trimmed(np.zeros(n_tokens(shell.home), int), 16, TGT_LEN))
    assert lines[1] == (
        "batch 16 instead of 8: the streams are cut anew and go on at segment 3 of "
        f"{segments}; memory refilled from segment 0 on"
    )
    saved = {path.parent.name for path in (logdir / "checkpoints").glob("*/commit.json")}
    assert saved == {"6.0", "9.2"}
    state, info = newest(logdir)
    assert (info["step"], info["tokens"], info["batch"]) == (9, 6 * 128 + 3 * 256, 16)
    assert int(state.opt_state.count) == int(state.step) == 9

    stop_after(28, [*words, "--accumulate", "2"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{logdir}: goes on after step 9 of 37 steps of 8 x 16 tokens, ")
    assert lines[1].startswith("batch 8 instead of 16: ")
    assert ": the streams are cut anew and go on at segment 12 of " in lines[1]
    assert lines[1].endswith("; memory refilled from segment 8 on")

    def seen(step: int) -> int:
        return 128 * step + 128 * min(max(step - 6, 0), 3)

    cfg = run_folder.read_config(logdir)
    assert (cfg.train.batch, cfg.train.accumulate) == (8, 2)
    logged = tiny.metrics(logdir)
    assert [line["step"] for line in logged] == [0, *range(2, 25, 2), 25, *range(26, 37, 2), 37, 37]
    assert [line["tokens"] for line in logged] == [seen(line["step"]) for line in logged]
    assert logged[-1]["tokens"] == cfg.train.max_tokens
    assert tiny.tensorboard(logdir) == tiny.shown_in_metrics(logdir)
    for line in logged:
        if (rate := line.get("learning/lr")) is not None:
            before, batch = seen(line["step"] - 1), 16 if 6 < line["step"] <= 9 else 8
            cosine = (1 + math.cos(math.pi * before / cfg.train.max_tokens)) / 2
            shape = seen(line["step"]) / 1000 if before < 1000 else cosine
            assert rate == pytest.approx(1e-2 * batch / 16 * min(shape, 1), rel=1e-4, abs=1e-8)

    state, info = newest(logdir)
    assert (info["step"], info["tokens"], info["batch"]) == (37, 40 * 128, 8)
    expected = in_parts(cfg, shell.home, [(8, 6), (16, 3), (8, 28)])
    got, wished = ((s.params, s.opt_state) for s in (state, expected))
    for left, right in zip(*map(jax.tree.leaves, (got, wished)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    assert_same_memory(state.memory, expected.memory, 1e-4)


def n_tokens(home: Path) -> int:
    (path,) = (home / "data").glob("*/train.npy")
    return len(np.load(path))


CORPORA = {
    "sentences": ["--dataset", "lm1b", "--vocab", "words", "--text-dir", "", "--data-dir", "lm"],
    "skip_files": ["--skip-files", "20.5"],
}


@pytest.fixture(params=["sentences", pytest.param("skip_files", marks=pytest.mark.slow)])
def corpus(request, shell, compiled, any_size, monkeypatch) -> list[str]:
    """Words that name a corpus that is not simply read from its beginning; it is prepared."""
    monkeypatch.chdir(shell.home)
    root = shell.home / "lm" / "one-billion-words"
    if not root.exists():
        root.mkdir(parents=True)
        known = [f"word{i}" for i in range(40)]
        (root / "1b_word_vocab.txt").write_text("\n".join(["<S>", "<UNK>", *known, ""]))
        draw = random.Random(0)
        for name, n in (("train", 500), ("valid", 20), ("test", 20)):
            lines = [" ".join(draw.choices(known, k=draw.randint(3, 12))) for _ in range(n)]
            (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    words = [*SHORT, "--eval-every", "100", *CORPORA[request.param]]
    # What is prepared here, commands use, though its size is not that of the real data set.
    token_files.prepare(config.parse("", words, config.TrainCommand).experiment.data)
    return words


def read_by_hand(cfg: Config, segment: int) -> np.ndarray:
    """The inputs [B, T] after so many segments, of this epoch and those before."""
    files = token_files.prepare(cfg.data)
    whole, batch = files.splits["train"], cfg.train.batch
    if cfg.data.skip_files:
        begin, end = files.documents["train"][20:22]
        whole = whole[begin + (end - begin) // 2 :]
    n = len(whole) // batch
    epoch, i = divmod(segment, -(-(n - 1) // TGT_LEN))
    if files.sentences:
        whole = Sentences(whole, int(files.vocab.start[0]), cfg.train.seed).epoch(epoch)[:]
    inputs = np.zeros((batch, TGT_LEN), np.int32)
    for row, stream in zip(inputs, whole[: batch * n].reshape(batch, n), strict=True):
        part = stream[: n - 1][i * TGT_LEN :][:TGT_LEN]
        row[: len(part)] = part
    return inputs


def test_another_batch_reads_on_from_the_same_count_of_tokens(corpus, shell, monkeypatch, capsys):
    """Over the end of the epoch, after which sentences have another order."""
    logdir = shell.home / "runs" / f"refill-{corpus[-1]}"
    words = [*corpus, "--logdir", str(logdir), "--max-tokens", "1000000"]
    with contextlib.chdir(shell.home):
        known = config.parse("", words, config.TrainCommand).experiment
        streams = training_streams(known, token_files.prepare(known.data))
    stop = len(streams) - 1
    stop_after(stop, words, monkeypatch)
    read, place = [], training.place_batch

    def note(cfg: Config, mesh: Any, rows: tuple[np.ndarray, np.ndarray]) -> Any:
        read.append(rows[0])
        return place(cfg, mesh, rows)

    monkeypatch.setattr(training, "place_batch", note)
    capsys.readouterr()
    stop_after(4, [*words, "--batch", "16"], monkeypatch)
    segment, back = divmod(stop * 8 * TGT_LEN, 16 * TGT_LEN)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("batch 16"))
    assert f"go on at segment {segment} of " in line
    assert (f", {back} tokens back; " in line) == (back > 0)
    cfg = run_folder.read_config(logdir)
    for i in range(4):
        np.testing.assert_array_equal(read[i], read_by_hand(cfg, segment + i))
    assert newest(logdir)[1]["tokens"] == stop * 8 * TGT_LEN + 4 * 16 * TGT_LEN


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_read_on_as_one_does(corpus, shell, monkeypatch, capsys):
    name = corpus[-1]
    alone, together = (shell.home / "runs" / f"refill-{name}-{how}" for how in ("one", "two"))
    words = [*corpus, "--max-tokens", str(50 * 8 * TGT_LEN)]
    stop_after(20, [*words, "--logdir", str(alone)], monkeypatch)
    shutil.copytree(alone, together)
    stop_after(25, [*words, "--logdir", str(alone)], monkeypatch)
    capsys.readouterr()
    outputs = in_two_processes(shell, [*words, "--logdir", str(together)])
    assert "goes on after step 20 of 50 steps" in outputs[0]
    assert "memory" not in outputs[0].split("Step ")[0]
    expected, got = (
        {n["step"]: n["learning/loss"] for n in tiny.metrics(logdir) if "learning/loss" in n}
        for logdir in (alone, together)
    )
    assert list(expected)[-1] == 44
    assert {step: got[step] for step in expected} == pytest.approx(expected, abs=1e-4)


def in_two_processes(shell: tiny.Shell, words: list[str]) -> list[str]:
    """What two processes say that train together to the end of the run."""
    words = [word for word in words if word != "--local"]
    words += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    started = [
        shell.start("train", *words, "--process-id", str(number), stderr=STDOUT)
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    return outputs


@pytest.mark.slow
def test_other_parts_of_the_batch_change_nothing(shell, compiled, monkeypatch, capsys):
    monkeypatch.chdir(shell.home)
    words = [*SHORT, "--eval-every", "100", "--max-tokens", str(14 * 8 * TGT_LEN)]
    folders = [shell.home / "runs" / name for name in ("refill-whole", "refill-parts")]
    for logdir, then in zip(folders, ([], ["--accumulate", "2"]), strict=True):
        stop_after(7, [*words, "--logdir", str(logdir)], monkeypatch)
        capsys.readouterr()
        stop_after(6, [*words, "--logdir", str(logdir), *then], monkeypatch)
        assert "memory" not in capsys.readouterr().out
    whole, parts = (
        [line["learning/loss"] for line in tiny.metrics(logdir) if "learning/loss" in line]
        for logdir in folders
    )
    assert len(whole) == 6
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    states = [newest(logdir)[0] for logdir in folders]
    assert int(states[1].opt_state.count) == 13
    for left, right in zip(*map(jax.tree.leaves, (s.params for s in states)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)
    assert_same_memory(states[1].memory, states[0].memory, 1e-4)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_refill_what_one_does(shell, compiled, monkeypatch, capsys):
    monkeypatch.chdir(shell.home)
    words = [*SHORT, "--eval-every", "100", "--max-tokens", str(20 * 8 * TGT_LEN)]
    alone, together = (shell.home / "runs" / name for name in ("refill-alone", "refill-together"))
    stop_after(10, [*words, "--logdir", str(alone)], monkeypatch)
    shutil.copytree(alone, together)
    words += ["--batch", "16", "--zero", "1"]
    stop_after(5, [*words, "--logdir", str(alone)], monkeypatch)

    outputs = in_two_processes(shell, [*words, "--logdir", str(together)])
    (line,) = (line for line in outputs[0].splitlines() if line.startswith("batch 16 instead of 8"))
    assert "segment 5 of" in line and line.endswith("; memory refilled from segment 1 on")
    assert line in capsys.readouterr().out
    assert "batch" not in outputs[1]
    expected, got = (
        {n["step"]: n["learning/loss"] for n in tiny.metrics(logdir) if "learning/loss" in n}
        for logdir in (alone, together)
    )
    assert list(expected)[-1] == 15
    assert got == pytest.approx(expected, abs=1e-5)
