"""Frozen layers: they stay as they are, do not count in the norm, and leave the rest as it was."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.tiny import WORDS, Shell
from txl_jax import train
from txl_jax.checks import check_freeze
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.errors import UserError
from txl_jax.freeze import zero_frozen
from txl_jax.model import Memory, abstract
from txl_jax.step import (
    Totals,
    TrainState,
    init_state,
    make_train_step,
    place_batch,
    state_shardings,
)

pytest_plugins = ["tests.tiny_runs"]

pytestmark = pytest.mark.usefixtures("compiled")

V, L, B, T, FROZEN = 11, 3, 4, 5, 2
CONFIG = Config(
    model=ModelConfig(
        n_token=V,
        n_layer=L,
        n_head=2,
        d_model=8,
        d_head=4,
        d_inner=12,
        tgt_len=T,
        mem_len=T,
        untie_r=True,
    ),
    optim=OptimConfig(
        optim="sgd", lr=0.5, momentum=0.9, clip=0.3, scheduler="constant", freeze_below=FROZEN
    ),
    train=TrainConfig(batch=B, accumulate=2),
)
OVER_LAYERS = ("['layers']", "['r_w_bias']", "['r_r_bias']")


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def random_params(cfg: Config) -> Any:
    """Weights large enough that all of them matter."""
    draw = np.random.default_rng(1)
    shapes = abstract(cfg.model)[1]
    return jax.tree.map(lambda w: jnp.asarray(draw.normal(0, 0.4, w.shape), jnp.float32), shapes)


def begin(params: Any, gathered: float) -> TrainState:
    """A first state; the optimizer's is `gathered` everywhere."""
    shapes = jax.eval_shape(lambda: init_state(CONFIG, tiny.one_device()))
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, gathered, leaf.dtype), shapes.opt_state
        ),
        memory=Memory.empty(CONFIG.model, B),
        key=jax.random.key(0),
        totals=Totals.zero(),
    )
    return jax.device_put(state, state_shardings(CONFIG, tiny.one_device()))


def step(state: TrainState) -> TrainState:
    mesh = tiny.one_device()
    train_step = make_train_step(CONFIG, mesh, segments=100)
    return train_step(state, *place_batch(CONFIG, mesh, batch(int(state.step))))[0]


def on_host(params: Any) -> dict[str, np.ndarray]:
    """Leaves by path; those of a donated state would be gone."""
    return {
        jax.tree_util.keystr(path): np.array(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def gradients(params: Any) -> dict[str, np.ndarray]:
    """Of the mean loss over the first batch, by the model alone."""
    graphdef, _ = abstract(CONFIG.model)
    inputs, targets = map(jnp.asarray, batch(0))

    def loss(params):
        return nnx.merge(graphdef, params)(inputs, targets, Memory.empty(CONFIG.model, B))[0].mean()

    return on_host(jax.jit(jax.grad(loss))(params))


def test_a_step_moves_only_what_is_not_frozen_and_clips_by_its_norm():
    params = random_params(CONFIG)
    before, by_hand = on_host(params), gradients(params)
    state = step(begin(params, gathered=0.0))
    for path, gradient in by_hand.items():
        if path.startswith(OVER_LAYERS):
            assert np.abs(gradient[:FROZEN]).max() > 0, f"{path} would not have moved anyway"
            gradient[:FROZEN] = 0
    norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in by_hand.values()))
    assert norm > CONFIG.optim.clip
    assert float(state.totals.grad_norm) == pytest.approx(norm, rel=1e-5)
    for path, after in on_host(state.params).items():
        expected = before[path] - 0.5 * by_hand[path] * 0.3 / norm
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6, err_msg=path)
        frozen = slice(0, FROZEN if path.startswith(OVER_LAYERS) else 0)
        assert after[frozen].tobytes() == before[path][frozen].tobytes(), path
        assert np.abs(after - before[path]).max() > 0, path


def test_what_an_optimizer_has_gathered_does_not_move_frozen_layers():
    """As when a state goes on whose layers were trained before."""
    params = random_params(CONFIG)
    before = on_host(params)
    state = step(step(begin(params, gathered=1.0)))
    for path, after in on_host(state.params).items():
        if path.startswith(OVER_LAYERS):
            assert after[:FROZEN].tobytes() == before[path][:FROZEN].tobytes(), path
        assert np.abs(after[-1] - before[path][-1]).min() > 0, path


def frozen(below: int, **model: bool) -> Config:
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **model),
        optim=dataclasses.replace(CONFIG.optim, freeze_below=below),
    )


def test_none_and_all_can_be_frozen():
    params = random_params(CONFIG)
    assert zero_frozen(frozen(0), params) is params
    zeroed = on_host(zero_frozen(frozen(L), params))
    for path, leaf in on_host(params).items():
        expected = np.zeros_like(leaf) if path.startswith(OVER_LAYERS) else leaf
        np.testing.assert_array_equal(zeroed[path], expected, err_msg=path)


def test_biases_that_all_layers_share_are_not_frozen():
    shared = frozen(L, untie_r=False)
    params = random_params(shared)
    zeroed = zero_frozen(shared, params)
    assert zeroed["r_w_bias"] is params["r_w_bias"]
    assert not zeroed["layers"]["w_q"].any()


@pytest.mark.parametrize("below", [-1, L + 1])
def test_there_are_no_such_layers(below):
    with pytest.raises(UserError, match=rf"freeze_below is {below}; .* from 0 .* n_layer, {L}$"):
        check_freeze(frozen(below))


def test_a_run_refuses_before_it_writes(shell: Shell, monkeypatch):
    monkeypatch.chdir(shell.home)
    with pytest.raises(UserError, match=r"freeze_below is 3; .* n_layer, 2$"):
        train.main([*WORDS, "--freeze-below", "3", "--logdir", "runs/frozen"])
    assert not (shell.home / "runs" / "frozen").exists()
