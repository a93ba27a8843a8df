"""The schedule dev_perf against PyTorch's ReduceLROnPlateau, written out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from txl_jax import plateau, sharding
from txl_jax.config import Config, OptimConfig, TrainConfig
from txl_jax.model import Memory
from txl_jax.step import Totals, TrainState, after_validation

MESH = Mesh(np.asarray(jax.devices()[:1]), ("data",))


def config(**fields) -> Config:
    optim = OptimConfig(**{"scheduler": "dev_perf", "lr": 0.5, **fields})
    return Config(optim=optim, train=TrainConfig(batch=16))


def rates(cfg: Config, losses: list[float]) -> list[float]:
    state = plateau.begin(cfg)
    assert state is not None
    found = []
    for loss in losses:
        state = plateau.after_validation(cfg, state, loss)
        found.append(0.5 * float(state.scale))
    return found


def pytorchs(losses: list[float], factor: float, patience: int, lowest: float) -> list[float]:
    """From the documentation of ReduceLROnPlateau, with its default threshold."""
    rate, best, waited, found = 0.5, math.inf, 0, []
    for loss in losses:
        if loss < 0.9999 * best:
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            rate, waited = max(factor * rate, lowest), 0
        found.append(rate)
    return found


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("factor, lowest", [(0.5, 0.0), (0.7, 0.06)])
def test_the_rate_falls_as_pytorchs(patience, factor, lowest):
    rng = np.random.default_rng(patience)
    losses = list(3 * 0.8 ** np.arange(40) + 0.5 * rng.random(40))
    fields = {"patience": patience, "decay_rate": factor, "lr_min": lowest}
    expected = pytorchs(losses, factor, patience, lowest)
    assert len(set(expected)) > 2
    assert rates(config(**fields), losses) == pytest.approx(expected, rel=1e-6)


def test_a_hair_lower_is_not_lower_and_nan_is_not_either():
    assert rates(config(), [1.0, 0.99995, 0.9998, math.nan]) == [0.5, 0.25, 0.25, 0.125]


def test_a_floor_above_the_rate_does_not_raise_it():
    assert rates(config(lr_min=2.0), [1.0, 1.0]) == [0.5, 0.5]


def test_the_floor_is_a_rate_after_scaling_by_the_batch():
    cfg = config(lr_min=0.2, lr_batch=32)  # the peak is 0.25
    assert rates(cfg, [1.0, 1.0, 1.0]) == pytest.approx([0.5, 0.4, 0.4])


def test_other_schedules_have_no_such_state():
    assert plateau.begin(config(scheduler="cosine")) is None


def state_of(cfg: Config) -> TrainState:
    memory = Memory(jnp.zeros(()), jnp.int32(0))
    state = TrainState(
        jnp.int32(0), {}, (), memory, jax.random.key(0), Totals.zero(), None, plateau.begin(cfg)
    )
    return jax.device_put(state, sharding.repeated(MESH))


def test_validations_during_warmup_do_not_count():
    cfg = config(warmup_tokens=16 * 64 * 5)
    tokens = cfg.optim.warmup_tokens
    early, late = (
        after_validation(cfg, MESH, state_of(cfg), seen, 1.0) for seen in (tokens - 1, tokens)
    )
    assert early.plateau == state_of(cfg).plateau
    assert late.plateau and float(late.plateau.best) == 1.0
    again = after_validation(cfg, MESH, late, tokens, 1.0)
    assert again.plateau and float(again.plateau.scale) == 0.5
    # It lies where the compiled step expects it.
    for leaf in jax.tree.leaves(again.plateau):
        assert leaf.sharding == sharding.repeated(MESH)
    cosine = dataclasses.replace(cfg, optim=OptimConfig())
    assert after_validation(cosine, MESH, state_of(cosine), tokens, 1.0).plateau is None
