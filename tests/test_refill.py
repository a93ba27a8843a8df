"""Memory made anew: what reading the streams from their start leaves behind."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from txl_jax import sharding
from txl_jax.data import Streams
from txl_jax.model import Memory, abstract
from txl_jax.refill import refilled
from txl_jax.step import init_state

CONFIG = dataclasses.replace(
    tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, n_token=50, mem_len=20, init_std=0.3)
)
STREAMS = Streams.trimmed(np.random.default_rng(0).integers(0, 50, 1000), tiny.BATCH, tiny.TGT_LEN)


@pytest.mark.parametrize("segment", [0, 1, 9])
def test_memory_is_as_if_all_had_been_read(segment):
    mesh = sharding.make_mesh()
    params = init_state(CONFIG, mesh).params
    got = refilled(CONFIG, mesh, params, STREAMS, segment)
    assert len(got.hidden.addressable_shards) == 4
    assert got.hidden.addressable_shards[0].data.shape[1] == tiny.BATCH // 4

    xl = nnx.merge(abstract(CONFIG.model)[0], jax.device_put(jax.device_get(params)))
    memory = Memory.empty(CONFIG.model, tiny.BATCH)
    for i in range(segment):
        _, memory = xl.hidden(STREAMS.segment(i)[0], memory)
    assert int(got.filled) == int(memory.filled) == min(segment * tiny.TGT_LEN, 20)
    filled = np.s_[:, :, 20 - int(got.filled) :]
    np.testing.assert_allclose(got.hidden[filled], memory.hidden[filled], atol=1e-5)
