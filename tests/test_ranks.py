"""The rank of each token in the vocabulary, counted from log-probabilities in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.test_adaptive import EACH, B, Both, T, case, make, shapes
from txl_jax import adaptive, sharding
from txl_jax.config import ModelConfig


def ranks(cfg: ModelConfig, params, hidden, targets) -> np.ndarray:
    both = nnx.merge(make(cfg)[0], params)
    hidden, targets = jnp.asarray(hidden, jnp.float32), jnp.asarray(targets, jnp.int32)
    return np.asarray(jax.jit(both.output.ranks)(hidden, targets, both.embedding))


def counted(cfg: ModelConfig, params, hidden, targets) -> np.ndarray:
    """Place of the target when all words are sorted, the likeliest first."""
    both = nnx.merge(make(cfg)[0], params)
    log_p = np.asarray(both.output.log_probs(jnp.asarray(hidden, jnp.float32), both.embedding))
    order = np.argsort(-log_p, axis=-1)
    return np.argmax(order == targets[..., None], axis=-1)


@EACH
def test_ranks_are_places_in_the_sorted_vocabulary(cfg):
    hidden, targets = case(cfg)
    _, params = make(cfg)
    got = ranks(cfg, params, hidden, targets)
    assert got.dtype == np.int32 and set(got.flat) == set(range(cfg.n_token))
    np.testing.assert_array_equal(got, counted(cfg, params, hidden, targets))


def test_ties_share_the_best_place_and_nan_never_wins():
    cfg = ModelConfig(n_token=6, d_model=2)
    _, params = make(cfg)
    params = jax.tree.map(jnp.zeros_like, params)
    params["output"]["biases"][0] = jnp.asarray([2.0, 1.0, 1.0, 1.0, 0.0, 3.0])
    targets = np.array([[0, 1, 2, 3, 4, 5]])
    hidden = np.zeros((1, 6, 2))
    np.testing.assert_array_equal(ranks(cfg, params, hidden, targets), [[1, 2, 2, 2, 5, 0]])
    np.testing.assert_array_equal(ranks(cfg, params, hidden * np.nan, targets), [[6] * 6])


def make_abstract(cfg: ModelConfig):
    """As `make`, but only shapes and types."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Both(cfg, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(params)


@pytest.mark.parametrize("streams, length", [(1, 50), (3, 17), (16, 3)])
def test_a_large_vocabulary_is_scored_a_few_positions_at_a_time(streams, length):
    """2**24 log-probabilities, or one position where that has more of them."""
    cfg = ModelConfig(n_token=2_000_000, d_model=2, cutoffs=(1000,))
    graphdef, wanted = make_abstract(cfg)

    def run(params, hidden, targets):
        both = nnx.merge(graphdef, params)
        return both.output.ranks(hidden, targets, both.embedding)

    arguments = (wanted, jax.ShapeDtypeStruct((streams, length, 2), jnp.float32))
    arguments += (jax.ShapeDtypeStruct((streams, length), jnp.int32),)
    program = jax.make_jaxpr(run)(*arguments)
    largest = max(int(np.prod(shape)) for shape in shapes(program.jaxpr))
    positions = max(1, 2**24 // (streams * cfg.n_token))
    assert largest == positions * streams * cfg.n_token < streams * length * cfg.n_token


@pytest.mark.parametrize("positions", [1, 7, 40])
def test_turns_of_positions_give_what_all_at_once_gives(positions, monkeypatch):
    """40 positions, 7 at a time, leave 5 for the last turn."""
    cfg = ModelConfig(n_token=23, d_model=8, cutoffs=(5, 11, 20))
    hidden, targets = case(cfg)
    _, params = make(cfg)
    monkeypatch.setattr(adaptive, "RANKED_AT_A_TIME", positions * B * cfg.n_token)
    got = ranks(cfg, params, hidden, targets)
    np.testing.assert_array_equal(got, counted(cfg, params, hidden, targets))


def test_each_device_ranks_its_own_streams():
    mesh = sharding.make_mesh()
    assert mesh.devices.size == 4
    cfg = ModelConfig(n_token=23, d_model=8, cutoffs=(5, 11, 20), div_val=2)
    hidden, targets = case(cfg)
    graphdef, params = make(cfg)
    rows, everywhere = sharding.split(mesh, axis=0), sharding.repeated(mesh)

    def run(params, hidden, targets):
        both = nnx.merge(graphdef, params)
        return both.output.ranks(hidden, targets, both.embedding)

    split = jax.jit(run, in_shardings=(everywhere, rows, rows), out_shardings=rows)
    arguments = (params, jnp.asarray(hidden, jnp.float32), jnp.asarray(targets))
    got = split(*arguments)
    assert got.shape == (B, T)
    np.testing.assert_array_equal(got, ranks(cfg, params, hidden, targets))
    program = split.lower(*arguments).compile().as_text() or ""
    assert not re.search("all-(reduce|gather|to-all)|collective|reduce-scatter", program)
