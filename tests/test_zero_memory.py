"""Memory that begins as zeros that are seen, as that of TensorFlow's original and Hugging Face."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import one_device
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.model import Memory
from txl_jax.step import init_state, make_train_step, place_batch

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("compiled")

PLAIN = ModelConfig(
    n_token=11,
    n_layer=2,
    n_head=2,
    d_model=8,
    d_head=4,
    d_inner=12,
    tgt_len=4,
    mem_len=6,
    init_std=0.5,
)
ZEROS = dataclasses.replace(PLAIN, zero_memory=True)


def test_it_is_full_of_zeros_or_empty():
    for cfg, filled in ((ZEROS, 6), (PLAIN, 0)):
        memory = Memory.empty(cfg, 3)
        assert int(memory.filled) == filled and memory.filled.dtype == jnp.int32
        assert memory.hidden.shape == (2, 3, 6, 8) and not memory.hidden.any()


def test_each_epoch_of_training_begins_with_zeros():
    cfg = Config(
        model=ZEROS,
        optim=OptimConfig(optim="sgd", lr=0.0),
        train=TrainConfig(batch=4, accumulate=2),
    )
    mesh, draw = one_device(), np.random.default_rng(0)
    step, state = make_train_step(cfg, mesh, segments=2), init_state(cfg, mesh)
    assert int(state.memory.filled) == 6
    rows = draw.integers(0, 11, (2, 4, 4)).astype(np.int32)
    sums = [0.0]
    for _ in range(4):
        state, _ = step(state, *place_batch(cfg, mesh, (rows[0], rows[1])))
        sums.append(float(jax.device_get(state.totals.loss)))
    losses = np.diff(sums)
    # The parameters stay, the segment is always the same: only memory differs.
    np.testing.assert_allclose(losses[2:], losses[:2], rtol=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3
