"""Scores of a random model, against a plain loop that reads a text from beginning to end."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from tests import tiny
from txl_jax import sharding
from txl_jax.config import ModelConfig
from txl_jax.errors import UserError
from txl_jax.evaluator import Evaluator, Score, context_segments
from txl_jax.model import Memory, TransformerXL, abstract
from txl_jax.streams import Streams

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("compiled")

PLAIN = ModelConfig(
    n_token=19,
    n_layer=2,
    n_head=2,
    d_model=8,
    d_head=4,
    d_inner=16,
    tgt_len=5,
    mem_len=10,
)
CONFIGS = {
    "whole segments": PLAIN,
    "part of a segment": dataclasses.replace(PLAIN, mem_len=3),
    "one and a part, same_length": dataclasses.replace(PLAIN, mem_len=7, same_length=True),
    "no memory": dataclasses.replace(PLAIN, mem_len=0),
    "three layers, cutoffs": dataclasses.replace(PLAIN, n_layer=3, mem_len=5, cutoffs=(4, 9)),
}
TEXT = np.random.default_rng(0).integers(PLAIN.n_token, size=302)
"""301 predictions: 60 segments and one more."""


@functools.cache
def parameters(cfg: ModelConfig) -> Any:
    """Random ones, so large that losses depend on what was read long ago."""
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, abstract(cfg)[1])


@functools.cache
def steps(cfg: ModelConfig) -> Any:
    """(inputs [1, t], memory) → log-probabilities [1, t, V] and the next memory."""
    xl: TransformerXL = nnx.merge(abstract(cfg)[0], parameters(cfg))

    @jax.jit
    def step(inputs, memory):
        hidden, memory = xl.hidden(inputs, memory)
        return xl.log_probs(hidden), memory

    return step


@functools.cache
def in_order(cfg: ModelConfig, n: int = len(TEXT), reset_every: int = 1000) -> dict[str, float]:
    """Segment after segment of one stream, and ranks by sorting each distribution."""
    memory, found = Memory.empty(cfg, 1), []
    for i, start in enumerate(range(0, n - 1, cfg.tgt_len)):
        if i % reset_every == 0:
            memory = Memory.empty(cfg, 1)
        stop = min(start + cfg.tgt_len, n - 1)
        log_p, memory = steps(cfg)(jnp.asarray(TEXT[None, start:stop], jnp.int32), memory)
        found.append(log_p[0])
    log_p, targets = np.concatenate(found).astype(np.float64), TEXT[1:n]
    places = 1 + np.argmax(np.argsort(-log_p, axis=-1) == targets[:, None], axis=-1)
    return {
        "loss": -log_p[np.arange(n - 1), targets].mean(),
        "accuracy_1": (places == 1).mean(),
        "accuracy_5": (places <= 5).mean(),
        "mrr_5": np.where(places <= 5, 1 / places, 0).mean(),
    }


def flat(score: Score) -> dict[str, float]:
    assert score.ranking is not None
    return {"loss": score.loss, **dataclasses.asdict(score.ranking)}


def devices(n: int) -> Mesh:
    return sharding.make_mesh() if n == 4 else tiny.one_device()


ALL = "three layers, cutoffs"


@pytest.mark.parametrize(
    "name, batch, n_devices",
    [*((name, 8, 1) for name in CONFIGS), (ALL, 1, 1), (ALL, 4, 4), (ALL, 8, 4)],
)
def test_the_exact_score_is_that_of_one_stream(name, batch, n_devices):
    cfg = CONFIGS[name]
    evaluator = Evaluator(cfg, devices(n_devices), batch, ranks=True)
    score = evaluator.exact(parameters(cfg), TEXT)
    assert score.tokens == len(TEXT) - 1
    assert flat(score) == pytest.approx(in_order(cfg), rel=2e-6)
    again = (batch - 1) * cfg.n_layer * -(-cfg.mem_len // cfg.tgt_len) * cfg.tgt_len
    assert score.context == again


def test_texts_of_any_length():
    """From a single prediction to as many segments as there is context, and one more."""
    cfg = PLAIN
    evaluator = Evaluator(cfg, tiny.one_device(), 4, ranks=True)
    for n in (2, 6, 7, 21, 22, 26, 27, 42):
        score = evaluator.exact(parameters(cfg), TEXT[:n])
        assert score.tokens == n - 1
        assert flat(score) == pytest.approx(in_order(cfg, n), rel=2e-6), n


def test_every_segment_is_told():
    told = []
    evaluator = Evaluator(PLAIN, tiny.one_device(), 4, on_segment=lambda: told.append(len(told)))
    evaluator(parameters(PLAIN), TEXT)
    assert len(told) == len(Streams.covering(TEXT, 4, PLAIN.tgt_len))


@pytest.mark.parametrize("name", ["whole segments", ALL])
def test_less_context_would_not_be_enough(name):
    """Nor would other places to cut: so the tests above would notice."""
    cfg = CONFIGS[name]
    evaluator = Evaluator(cfg, tiny.one_device(), 8)
    needed = context_segments(cfg)
    assert needed == {"whole segments": 4, ALL: 3}[name]
    losses = [
        evaluator.over(parameters(cfg), Streams.seamless(TEXT, 8, cfg.tgt_len, context)).loss
        for context in (needed + 1, needed, needed - 1, 0)
    ]
    off = [abs(loss / in_order(cfg)["loss"] - 1) for loss in losses]
    assert max(off[:2]) < 2e-6 < 1e-5 < off[2] < off[3]
    quick = evaluator(parameters(cfg), TEXT)
    assert abs(quick.loss / in_order(cfg)["loss"] - 1) > 1e-5
    assert (quick.tokens, quick.context, quick.ranking) == (len(TEXT) - 1, 0, None)


@pytest.mark.parametrize(
    "reset_every, batch, n_devices", [(1, 8, 1), (2, 1, 1), (3, 8, 4), (40, 4, 4), (1000, 4, 4)]
)
def test_memory_is_emptied_every_n_segments(reset_every, batch, n_devices):
    evaluator = Evaluator(PLAIN, devices(n_devices), batch, ranks=True, reset_every=reset_every)
    score = evaluator.exact(parameters(PLAIN), TEXT)
    assert (score.tokens, score.context) == (len(TEXT) - 1, 0)
    expected = in_order(PLAIN, reset_every=reset_every)
    assert flat(score) == pytest.approx(expected, rel=2e-6)


def test_without_memory_is_what_resetting_at_every_segment_gives():
    none = dataclasses.replace(PLAIN, mem_len=0)
    expected = in_order(PLAIN, reset_every=1)
    assert in_order(none) == pytest.approx(expected, rel=2e-6)
    assert abs(in_order(PLAIN)["loss"] / expected["loss"] - 1) > 1e-3


@pytest.mark.parametrize("n", [0, -1])
def test_memory_cannot_be_emptied_more_often_than_every_segment(n):
    with pytest.raises(UserError, match=f"reset_every is {n}; it has to be at least 1"):
        Evaluator(PLAIN, tiny.one_device(), 1, reset_every=n)


def test_a_model_that_gives_nan_is_never_right():
    cfg = PLAIN
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, parameters(cfg))
    score = Evaluator(cfg, tiny.one_device(), 2, ranks=True).exact(broken, TEXT)
    assert np.isnan(score.loss)
    assert score.ranking is not None
    assert dataclasses.astuple(score.ranking) == (0, 0, 0)
