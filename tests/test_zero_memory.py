"""Memory that begins as zeros that are seen, as that of TensorFlow's original and Hugging Face."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny import one_device
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.model import Memory, TransformerXL
from txl_jax.step import init_state, make_train_step, place_batch

PLAIN = ModelConfig(
    n_token=11, n_layer=2, n_head=2, d_model=8, d_head=4, d_inner=12, tgt_len=4, mem_len=6
)
ZEROS = dataclasses.replace(PLAIN, zero_memory=True)


def test_zeros_are_seen_from_the_first_segment_on():
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, 11, (3, 5)), jnp.int32)
    xl = TransformerXL(ZEROS, rngs=nnx.Rngs(0))
    memory = xl.init_memory(3)
    assert int(memory.filled) == 6 and not memory.hidden.any()
    loss, after = xl(tokens[:, :-1], tokens[:, 1:], memory)
    assert int(after.filled) == 6
    hidden = xl.init_memory(3).hidden
    unseen, _ = xl(tokens[:, :-1], tokens[:, 1:], Memory(hidden, jnp.int32(0)))
    assert jnp.abs(loss - unseen).max() > 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_epoch_of_training_begins_with_zeros(accumulate):
    cfg = Config(
        model=ZEROS,
        optim=OptimConfig(optim="sgd", lr=0.0),
        train=TrainConfig(batch=4, accumulate=accumulate),
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
