import contextlib
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.tiny import LOGDIR, Shell
from txl_jax import data, evaluate, sharding
from txl_jax.config import ModelConfig
from txl_jax.evaluate import Evaluator, Score
from txl_jax.model import abstract
from txl_jax.trained import Trained, load_trained

pytest_plugins = ["tests.tiny_runs"]


@pytest.fixture(scope="module")
def trained(finished: Path, compiled: None) -> Trained:
    return load_trained(finished, "best", tiny.one_device())


@pytest.fixture(scope="module")
def splits(shell: Shell, trained: Trained) -> dict[str, np.ndarray]:
    with contextlib.chdir(shell.home):
        files = data.prepare(trained.cfg.data)
    return {name: np.asarray(tokens) for name, tokens in files.splits.items()}


def plain_loop(trained: Trained, tokens: np.ndarray, batch: int, **changes) -> Score:
    """Stream after stream, segment after segment, without padding."""
    cfg: ModelConfig = dataclasses.replace(trained.cfg.model, **changes)
    xl = nnx.merge(abstract(cfg)[0], trained.params)
    losses = jax.jit(lambda inputs, targets, memory: xl(inputs, targets, memory))
    pairs = np.stack([tokens[:-1], tokens[1:]]).astype(np.int32)
    each = math.ceil(pairs.shape[1] / batch)
    found: list[float] = []
    for start in range(0, pairs.shape[1], each):
        stream = pairs[:, start : start + each]
        memory = xl.init_memory(1)
        for i in range(0, stream.shape[1], cfg.tgt_len):
            inputs, targets = jnp.asarray(stream[:, None, i : i + cfg.tgt_len])
            loss, memory = losses(inputs, targets, memory)
            found += loss[0].tolist()
    return Score(float(np.mean(found)), len(found))


OTHER_SETTINGS = {"tgt_len": 7, "mem_len": 24, "clamp_len": 5, "same_length": True}


@pytest.mark.parametrize(
    "batch, changes",
    [(1, {}), (3, {}), (4, {"mem_len": 0}), (3, {"mem_len": 64}), (4, OTHER_SETTINGS)],
)
def test_every_token_counts_once_whatever_the_batch(trained, splits, batch, changes):
    cfg = dataclasses.replace(trained.cfg.model, **changes)
    score = Evaluator(cfg, tiny.one_device(), batch)(trained.params, splits["valid"])
    expected = plain_loop(trained, splits["valid"], batch, **changes)
    assert score.tokens == expected.tokens == len(splits["valid"]) - 1
    assert score.loss == pytest.approx(expected.loss, rel=1e-5)


def test_streams_may_be_shorter_than_the_batch(trained, splits):
    few = splits["valid"][:6]
    evaluator = Evaluator(trained.cfg.model, tiny.one_device(), 4)
    for length in (2, 4, 6):
        score = evaluator(trained.params, few[:length])
        expected = plain_loop(trained, few[:length], 4)
        assert score.tokens == expected.tokens == length - 1
        assert score.loss == pytest.approx(expected.loss, rel=1e-5)


def test_several_devices_give_the_same_score(finished, splits, compiled):
    trained = load_trained(finished, "best", sharding.make_mesh())
    score = Evaluator(trained.cfg.model, sharding.make_mesh(), 8)(trained.params, splits["valid"])
    expected = plain_loop(trained, splits["valid"], 8)
    assert score.tokens == expected.tokens
    assert score.loss == pytest.approx(expected.loss, rel=1e-5)


def test_memory_is_worth_something(finished):
    for bits in json.loads((finished / "results.json").read_text())["bits"].values():
        assert bits["16"] < bits["0"] - 0.01


def test_the_command_gives_what_training_showed_at_its_end(shell, finished, splits):
    results = json.loads((finished / "results.json").read_text())
    words = ("--logdir", LOGDIR, "--split", "test", "--mem-len", "64", "--json")
    status, output, errors = shell.run("evaluate", *words)
    assert (status, errors) == (0, "")
    (line,) = output.splitlines()
    found = json.loads(line)
    loss = found["loss"]
    assert found == {
        **{"split": "test", "step": results["step"], "tokens": len(splits["test"]) - 1},
        **{"tgt_len": 16, "mem_len": 64, "clamp_len": -1, "same_length": False, "batch": 4},
        **{"loss": loss, "bits": loss / math.log(2), "perplexity": pytest.approx(math.exp(loss))},
    }
    assert found["tokens"] == results["tokens"]["test"]
    assert found["bits"] == pytest.approx(results["bits"]["test"]["64"], rel=1e-9)


def test_the_command_takes_every_setting(shell, trained, splits, monkeypatch, capsys):
    monkeypatch.chdir(shell.home)
    words = ["--logdir", LOGDIR, "--split", "train", "--batch", "8", "--tgt-len", "7"]
    words += ["--mem_len=24", "--clamp-len", "5", "--same-length", "True"]
    evaluate.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in OTHER_SETTINGS} == OTHER_SETTINGS
    assert (found["split"], found["batch"]) == ("train", 8)
    expected = plain_loop(trained, splits["train"], 8, **OTHER_SETTINGS)
    assert found["tokens"] == expected.tokens
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    evaluate.main(words)
    assert capsys.readouterr().out == (
        f"train: {found['bits']:.4f} bits per byte, loss {found['loss']:.4f} nats, over "
        f"{found['tokens']} tokens (step {trained.step}, tgt_len 7, mem_len 24)\n"
    )


def test_the_newest_step_can_be_taken_instead_of_the_best(copied, compiled, monkeypatch, capsys):
    monkeypatch.chdir(copied.home)
    folder = Path(LOGDIR, "checkpoints", "best")
    steps = sorted(int(path.name) for path in folder.iterdir())
    if steps[-1] == tiny.STEPS:
        (folder / str(tiny.STEPS) / "manifest.json").unlink()
        steps.pop()
    found = {}
    for which in ("best", "latest"):
        evaluate.main(["--logdir", LOGDIR, "--checkpoint", which, "--json"])
        found[which] = json.loads(capsys.readouterr().out)
    assert (found["best"]["step"], found["latest"]["step"]) == (steps[-1], tiny.STEPS)
    assert found["best"]["loss"] != found["latest"]["loss"]


def test_the_command_leaves_the_run_as_it_is(shell, finished, compiled, monkeypatch):
    before = tiny.files(shell.home)
    monkeypatch.chdir(shell.home)
    evaluate.main(["--logdir", LOGDIR])
    assert tiny.files(shell.home) == before
