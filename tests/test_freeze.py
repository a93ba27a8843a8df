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
from txl_jax import freeze, train
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.errors import UserError
from txl_jax.freeze import zero_frozen
from txl_jax.model import Memory, abstract
from txl_jax.step import TrainState, init_state, make_train_step, place_batch

pytest_plugins = ["tests.tiny_runs"]

V, L, B, T = 11, 3, 4, 5
CONFIG = Config(
    model=ModelConfig(
        n_token=V, n_layer=L, n_head=2, d_model=8, d_head=4, d_inner=12, tgt_len=T, mem_len=T
    ),
    optim=OptimConfig(optim="sgd", lr=0.5, clip=0.3, scheduler="constant", freeze_below=2),
    train=TrainConfig(batch=B, accumulate=2),
)
UNTIED = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, untie_r=True))


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def start(cfg: Config) -> TrainState:
    """A first state whose weights are large enough that all of them matter."""
    state = init_state(cfg, tiny.one_device())
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda w: jnp.asarray(draw.normal(0, 0.4, w.shape), jnp.float32), state.params
    )
    return state._replace(params=params)


def step(cfg: Config, state: TrainState, seed: int = 0) -> TrainState:
    mesh = tiny.one_device()
    train_step = make_train_step(cfg, mesh, segments=100)
    return train_step(state, *place_batch(cfg, mesh, batch(seed)))[0]


def on_host(params: Any) -> dict[str, np.ndarray]:
    """Leaves by path; those of a donated state would be gone."""
    return {
        jax.tree_util.keystr(path): np.array(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def gradients(cfg: Config, params: Any) -> dict[str, np.ndarray]:
    """Of the mean loss over the batch, by the model alone."""
    graphdef, _ = abstract(cfg.model)
    inputs, targets = batch()

    def loss(params):
        return nnx.merge(graphdef, params)(inputs, targets, Memory.empty(cfg.model, B))[0].mean()

    return on_host(jax.grad(loss)(params))


def is_stacked(cfg: Config, path: str) -> bool:
    own = ("['layers']", "['r_w_bias']", "['r_r_bias']") if cfg.model.untie_r else ("['layers']",)
    return path.startswith(own)


@pytest.mark.parametrize("cfg", [CONFIG, UNTIED], ids=["shared biases", "own biases"])
def test_a_step_moves_only_what_is_not_frozen_and_clips_by_its_norm(cfg):
    state = start(cfg)
    before, by_hand = on_host(state.params), gradients(cfg, state.params)
    state = step(cfg, state)
    for path, gradient in by_hand.items():
        if is_stacked(cfg, path):
            assert np.abs(gradient[:2]).max() > 0, f"{path} would not have moved anyway"
            gradient[:2] = 0
    norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in by_hand.values()))
    assert norm > cfg.optim.clip
    assert float(state.totals.grad_norm) == pytest.approx(norm, rel=1e-5)
    for path, after in on_host(state.params).items():
        expected = before[path] - 0.5 * by_hand[path] * 0.3 / norm
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-7, err_msg=path)
        frozen = slice(0, 2 if is_stacked(cfg, path) else 0)
        assert after[frozen].tobytes() == before[path][frozen].tobytes(), path
        assert np.abs(after - before[path]).max() > 0, path


@pytest.mark.parametrize("optim", ["adam", "sgd"])
def test_what_an_optimizer_has_gathered_does_not_move_frozen_layers(optim):
    """As when a run is continued whose layers were trained before."""
    optimizer = dataclasses.replace(CONFIG.optim, optim=optim, momentum=0.9)
    cfg = dataclasses.replace(CONFIG, optim=optimizer)
    state = start(cfg)
    before = on_host(state.params["layers"])
    state = state._replace(opt_state=jax.tree.map(jnp.ones_like, state.opt_state))
    for seed in range(3):
        state = step(cfg, state, seed)
    for path, after in on_host(state.params["layers"]).items():
        assert after[:2].tobytes() == before[path][:2].tobytes(), path
        assert np.abs(after[2] - before[path][2]).max() > 0, path


def test_none_and_all_can_be_frozen():
    params = start(CONFIG).params
    of = lambda below: dataclasses.replace(  # noqa: E731
        CONFIG, optim=dataclasses.replace(CONFIG.optim, freeze_below=below)
    )
    assert zero_frozen(of(0), params) is params
    frozen = on_host(zero_frozen(of(L), params))
    for path, leaf in on_host(params).items():
        expected = np.zeros_like(leaf) if path.startswith("['layers']") else leaf
        np.testing.assert_array_equal(frozen[path], expected, err_msg=path)


@pytest.mark.parametrize("below", [-1, L + 1])
def test_there_are_no_such_layers(below):
    cfg = dataclasses.replace(CONFIG, optim=OptimConfig(freeze_below=below))
    with pytest.raises(UserError, match=rf"freeze_below is {below}; .* from 0 .* n_layer, {L}$"):
        freeze.check(cfg)


def test_a_run_refuses_before_it_writes(shell: Shell, monkeypatch):
    monkeypatch.chdir(shell.home)
    with pytest.raises(UserError, match="freeze_below is 3; .* n_layer, 2$"):
        train.main([*WORDS, "--freeze-below", "3", "--logdir", "runs/frozen"])
    assert not (shell.home / "runs" / "frozen").exists()
