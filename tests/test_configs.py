"""The experiments in configs/: what they build, and that a run accepts them."""

import dataclasses
import importlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txl_jax import adaptive, config, metrics, optim, preflight
from txl_jax.config import Config
from txl_jax.model import abstract

VOCABULARY = {"wikitext-103": 267_735, "enwik8": 204, "text8": 27, "lm1b": 793_470}
"""Entries of the vocabulary of each data set; `stdlib` depends on the Python."""
STDLIB = 100

SMALL, LARGE = 186_707_162, 285_170_506
"""Parameters of the fork's models with the vocabulary of WikiText-103 as it is."""


class Expected(NamedTuple):
    """What is known of an experiment."""

    parameters: int
    devices: int
    batch: int
    steps: int
    lr: float
    """The highest learning rate."""


def tokens(number: int, batch: int, tgt_len: int) -> int:
    """Steps that it takes to see a number of tokens."""
    return -(-number // (batch * tgt_len))


def small(machines: int, lr: float) -> Expected:
    batch = 768 * machines
    return Expected(SMALL, 8 * machines, batch, tokens(1_500_000_000, batch, 128), lr)


def large(machines: int, lr: float, steps: int | None = None) -> Expected:
    batch = 128 * machines
    steps = steps or tokens(1_500_000_000, batch, 384)
    return Expected(LARGE, 8 * machines, batch, steps, lr)


GPUS = {
    "c7i.xlarge": 0,
    "p3.2xlarge": 1,
    "p3dn.24xlarge": 8,
    "p4d.24xlarge": 8,
    "p4de.24xlarge": 8,
    "g5.12xlarge": 4,
    "g6e.2xlarge": 1,
}
"""GPUs of EC2's instance types."""

EXPECTED = {
    "quickstart": Expected(532_580, 1, 16, 7422, 1.75e-3),
    "one_gpu": Expected(SMALL, 1, 32, 366_211, 0.0010416666666666667),
    "one_machine": small(1, 0.005),
    "one_machine_fp16": small(1, 0.005),
    "two_machines": small(2, 0.01),
    "two_machines_fp16": small(2, 0.01),
    "four_machines": small(4, 0.012),
    "eight_machines": small(8, 0.012),
    "one_machine_fp16_large": large(1, 0.001),
    "four_machine_fp16_large": large(4, 0.004),
    "eight_machine_fp16_large": large(8, 0.008),
    "test_1": large(1, 1 / 1200, steps=300),
    "test_2": large(2, 1 / 600, steps=300),
    "test_4": large(4, 0.002, steps=300),
    "test_8": large(8, 0.008, steps=300),
    "test_16": large(16, 0.016, steps=300),
    "wt103_base": Expected(151_107_538, 4, 60, 200_000, 0.00025),
    "wt103_large": Expected(LARGE, 8, 128, 4_000_000, 0.00025),
    "enwik8_base": Expected(41_055_436, 1, 22, 400_000, 0.00025),
    "enwik8_large": Expected(277_231_820, 8, 64, 400_000, 0.00025),
    "text8_base": Expected(40_964_635, 1, 22, 400_000, 0.00025),
    "text8_large": Expected(277_050_395, 8, 64, 400_000, 0.00025),
    "lm1b_base": Expected(357_812_065, 8, 224, 500_000, 0.00025),
    "lm1b_large": Expected(841_295_961, 8, 512, 1_200_000, 0.00025),
    "nvidia_base": Expected(191_950_298, 8, 256, 40_000, 0.01),
    "nvidia_large": Expected(285_167_482, 8, 128, 100_000, 0.01),
    "one_gpu_bf16": Expected(191_950_298, 1, 256, 40_000, 0.01),
    "one_gpu_bf16_large": Expected(285_167_482, 1, 128, 100_000, 0.01),
}


def test_every_experiment_is_known():
    assert sorted(EXPECTED) == config.experiments()


def with_vocabulary(cfg: Config, size: int) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_token=size))


def parameters(cfg: Config) -> int:
    return metrics.count(abstract(cfg.model)[1])


def by_hand(cfg: Config) -> int:
    """Number of parameters, from the paper's description of the model."""
    m = cfg.model
    edges = [0, *m.cutoffs, m.n_token]
    sizes = np.diff(edges)
    widths = [m.d_model // m.div_val**i for i in range(len(sizes))]
    tables = sum(int(size) * (width + 1) for size, width in zip(sizes, widths, strict=True))
    clusters = (len(sizes) - 1) * (widths[0] + 1)
    projected = m.div_val > 1
    inputs = projected * sum(m.d_model * width for width in widths)
    untied = (not tied for tied in adaptive.tied_projections(m))
    outputs = projected * sum(
        m.d_model * width for width, own in zip(widths, untied, strict=True) if own
    )
    attention = 5 * m.d_model * m.n_head * m.d_head
    feed_forward = 2 * m.d_model * m.d_inner + m.d_inner + m.d_model
    layer = attention + feed_forward + 2 * 2 * m.d_model
    return tables + clusters + inputs + outputs + m.n_layer * layer + 2 * m.n_head * m.d_head


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_experiment_is_what_it_says_and_a_run_accepts_it(name):
    cfg, expected = config.load(name), EXPECTED[name]
    synthetic = cfg.data.dataset == "synthetic"
    assert cfg.train.throughput == synthetic == name.startswith("test_")
    assert cfg.model.n_token == (VOCABULARY["wikitext-103"] if synthetic else 0), "the corpus knows"
    assert cfg.train.batch == expected.batch
    assert tokens(cfg.train.max_tokens, cfg.train.batch, cfg.model.tgt_len) == expected.steps
    mesh: Any = SimpleNamespace(devices=np.array(jax.devices()[:1] * expected.devices))
    preflight.check(cfg, mesh)
    assert cfg.cluster.machines * cfg.cluster.gpus == expected.devices
    assert max(1, GPUS[cfg.cluster.instance_type]) == cfg.cluster.gpus

    size = cfg.model.n_token or VOCABULARY.get(cfg.data.dataset, STDLIB)
    known = with_vocabulary(cfg, size)
    assert parameters(known) == expected.parameters == by_hand(known)

    step_tokens = cfg.train.batch * cfg.model.tgt_len
    rate = optim.make_schedule(cfg.optim, cfg.train, step_tokens)
    peak = rate(jnp.float32(max(0, cfg.optim.warmup_tokens - step_tokens)))
    assert float(peak) == pytest.approx(expected.lr, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "count"), [("one_machine", 186_707_675), ("one_machine_fp16_large", 285_170_523)]
)
def test_the_forks_models_have_its_counts_with_its_rounded_vocabulary(name, count):
    assert parameters(with_vocabulary(config.load(name), 267_736)) == count


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_help_shows_how_to_run_an_experiment_and_what_to_expect(name, capsys):
    about = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert "Expect: " in about
    if name != "quickstart":
        assert "Source: " in about
        assert f" --config {name}\n" in about
        several = EXPECTED[name].devices > 8
        assert ("--local" in about) is not several
    with pytest.raises(SystemExit) as ended:
        config.parse("train", ["--config", name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert about.split("\n")[0][:40] in shown
    assert "--max-tokens" in shown
