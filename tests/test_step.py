"""The compiled train step against the same steps written out, on one device and on several."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from txl_jax.collectives import collectives
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.model import Memory, abstract
from txl_jax.optim import make_optimizer
from txl_jax.step import (
    Totals,
    TrainState,
    init_state,
    make_train_step,
    place_batch,
    state_shardings,
)

QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options: these tests compile for much longer than they compute."""

V, L, B, T, M, D = 11, 2, 8, 4, 6, 8
SEGMENTS = 3
"""Steps in an epoch."""
STEPS = 5

PLAIN = Config(
    model=ModelConfig(
        n_token=V, n_layer=L, n_head=2, d_model=D, d_head=4, d_inner=12, tgt_len=T, mem_len=M
    ),
    optim=OptimConfig(
        optim="sgd", lr=0.5, momentum=0.5, clip=0.9, warmup_tokens=2 * B * T, final_lr=0.1
    ),
    train=TrainConfig(batch=B, max_tokens=10 * B * T),
)
DROPPED = Config(
    model=dataclasses.replace(PLAIN.model, dropout=0.3, dropatt=0.2),
    optim=OptimConfig(optim="adam", lr=0.01, eps=1e-3),
    train=dataclasses.replace(PLAIN.train, accumulate=2),
)


def parts(accumulate: int) -> Config:
    return dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, accumulate=accumulate))


def mesh_of(devices: int) -> Mesh:
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices")
    return Mesh(np.asarray(jax.devices()[:devices]), ("data",))


def random_params() -> Any:
    """Weights large enough that every part of the model matters."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray((mean + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, abstract(PLAIN.model)[1])


def begin(cfg: Config, mesh: Mesh) -> TrainState:
    """A first state; its memory is full of what the step has to forget."""
    params = random_params()
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=make_optimizer(cfg).init(params),
        memory=Memory(jnp.full((L, B, M, D), 3.0), jnp.int32(M)),
        key=jax.random.key(1),
        totals=Totals.zero(),
    )
    return jax.device_put(state, state_shardings(cfg, mesh))


@functools.cache
def rows() -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of each step. Parts and devices have unequal shares of the padding."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(STEPS):
        inputs, targets = rng.integers(0, V, (2, B, T), dtype=np.int32)
        targets[0, 1:] = targets[3] = targets[5, -1] = -1
        steps.append((inputs, targets))
    return steps


@functools.cache
def compiled(cfg: Config, devices: int) -> Any:
    mesh = mesh_of(devices)
    step: Any = make_train_step(cfg, mesh, SEGMENTS)
    batch = place_batch(cfg, mesh, rows()[0])
    return step.lower(begin(cfg, mesh), *batch).compile(compiler_options=QUICKLY)


class Seen(NamedTuple):
    """A state as NumPy sees it."""

    params: Any
    totals: Totals
    hidden: np.ndarray
    filled: int


def look(state: TrainState) -> Seen:
    return Seen(
        jax.tree.map(np.asarray, state.params),
        jax.tree.map(np.asarray, state.totals),
        np.asarray(state.memory.hidden),
        int(state.memory.filled),
    )


@functools.cache
def run(cfg: Config, devices: int) -> list[Seen]:
    mesh = mesh_of(devices)
    state, seen = begin(cfg, mesh), []
    for batch in rows():
        state, done = compiled(cfg, devices)(state, *place_batch(cfg, mesh, batch))
        seen.append(look(state))
        assert int(done) == int(state.step) == len(seen)
    return seen


@functools.cache
def written_out() -> list[Seen]:
    """The steps of PLAIN, each line of the algorithm as a paper has it."""
    graphdef, _ = abstract(PLAIN.model)

    def mean_loss(params, inputs, targets, memory, n_targets):
        loss, memory = nnx.merge(graphdef, params)(inputs, targets, memory)
        return loss.sum() / n_targets, memory

    gradient_of = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), compiler_options=QUICKLY)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), random_params())
    velocity = jax.tree.map(np.zeros_like, params)
    memory = Memory.empty(PLAIN.model, B)
    loss_sum = n_sum = norm_sum = 0.0
    seen, clipped = [], 0
    for step, (inputs, targets) in enumerate(rows()):
        if step % SEGMENTS == 0:
            memory = Memory.empty(PLAIN.model, B)
        n_targets = (targets >= 0).sum()
        (loss, memory), gradient = gradient_of(
            jax.tree.map(np.float32, params), inputs, targets, memory, np.float32(n_targets)
        )
        gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)
        norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
        factor = min(1.0, 0.9 / norm)
        clipped += factor < 1
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10))
        rate = 0.5 * ((step + 1) / 2 if step < 2 else cosine)
        velocity = jax.tree.map(lambda v, g, f=factor: 0.5 * v + f * g, velocity, gradient)
        params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, velocity)
        loss_sum += float(loss) * n_targets
        n_sum += n_targets
        norm_sum += norm
        totals = Totals(loss_sum, n_sum, norm_sum, step + 1, -1, rate)  # pyright: ignore[reportArgumentType]
        seen.append(Seen(params, totals, np.asarray(memory.hidden), int(memory.filled)))
    # Some gradients are clipped and some are not.
    assert 0 < clipped < STEPS
    return seen


def assert_same(got: Seen, expected: Seen, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert got.filled == expected.filled
    # Slots of memory that are not filled may hold anything.
    newest = np.s_[:, :, M - expected.filled :]
    np.testing.assert_allclose(got.hidden[newest], expected.hidden[newest], rtol, atol)
    for name, left, right in zip(Totals._fields, got.totals, expected.totals, strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, err_msg=name)
    assert jax.tree.structure(got.params) == jax.tree.structure(expected.params)
    for left, right in zip(*map(jax.tree.leaves, (got.params, expected.params)), strict=True):
        np.testing.assert_allclose(left, right, rtol, atol)


@pytest.mark.parametrize("accumulate, devices", [(1, 1), (2, 4), (4, 2)])
def test_steps_are_those_written_out_whatever_the_parts_and_devices(accumulate, devices):
    for got, expected in zip(run(parts(accumulate), devices), written_out(), strict=True):
        assert_same(got, expected)
    # Memory starts empty at the steps 0 and 3; M slots hold one and a half segments.
    assert [seen.filled for seen in run(parts(accumulate), devices)] == [4, 6, 6, 4, 6]


def test_one_device_has_nothing_to_send():
    assert collectives(compiled(PLAIN, 1).as_text()) == []
    assert collectives(compiled(parts(2), 4).as_text()) != []


def test_with_dropout_the_number_of_devices_changes_nothing():
    for got, expected in zip(run(DROPPED, 4), run(DROPPED, 1), strict=True):
        assert_same(got, expected)


def test_the_same_state_gives_the_same_steps_bit_for_bit():
    first = run(DROPPED, 1)
    again = run.__wrapped__(DROPPED, 1)
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_every_step_and_every_part_has_its_own_dropout():
    mesh = mesh_of(1)
    # Both parts and all steps read the same tokens.
    inputs, targets = (np.repeat(array[:4], 2, axis=0) for array in rows()[0])
    state, dropped = begin(DROPPED, mesh), []
    key = np.asarray(jax.random.key_data(state.key))
    for _ in range(2):
        state, _ = compiled(DROPPED, 1)(state, *place_batch(DROPPED, mesh, (inputs, targets)))
        # The first layer's memory holds the dropped embeddings of the segment.
        dropped += [np.asarray(state.memory.hidden)[0, part::2, -T:] == 0 for part in range(2)]
    for i, mask in enumerate(dropped):
        assert 0.15 < mask.mean() < 0.45
        for other in dropped[:i]:
            assert (mask != other).mean() > 0.2
    np.testing.assert_array_equal(jax.random.key_data(state.key), key)


def test_the_first_step_that_is_not_finite_is_recorded():
    mesh = mesh_of(1)
    state, recorded = begin(PLAIN, mesh), []
    for step, batch in enumerate(rows()):
        if step == 2:
            token = batch[0][1, 1]
            table = state.params["embedding"]["tables"][0].at[token, 0].set(jnp.nan)
            embedding = {"tables": {0: table}}
            state = state._replace(params=state.params | {"embedding": embedding})
        state, _ = compiled(PLAIN, 1)(state, *place_batch(PLAIN, mesh, batch))
        recorded.append(int(state.totals.non_finite_step))
    assert recorded == [-1, -1, 3, 3, 3]


def test_a_gradient_that_overflows_is_recorded_though_the_loss_is_finite():
    mesh = mesh_of(1)
    state = begin(PLAIN, mesh)
    norm = state.params["layers"]["norm_feed_forward"]
    norm["scale"] = norm["scale"].at[-1].multiply(1e25)
    state, _ = compiled(PLAIN, 1)(state, *place_batch(PLAIN, mesh, rows()[0]))
    assert np.isfinite(state.totals.loss)
    assert not np.isfinite(state.totals.grad_norm)
    assert int(state.totals.non_finite_step) == 1


def test_the_state_is_donated():
    mesh = mesh_of(1)
    old = begin(PLAIN, mesh)
    new, done = compiled(PLAIN, 1)(old, *place_batch(PLAIN, mesh, rows()[0]))
    for part in (old.params, old.opt_state, old.memory.hidden):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(part))
    compiled(PLAIN, 1)(new, *place_batch(PLAIN, mesh, rows()[1]))
    # What says that a step is done outlives the state.
    assert int(done) == 1


def assert_lies_as_it_should(state: TrainState, devices: int) -> None:
    layers, batch, *rest = state.memory.hidden.shape
    shards = state.memory.hidden.addressable_shards
    assert {shard.data.shape for shard in shards} == {(layers, batch // devices, *rest)}
    assert len({shard.index[1].start for shard in shards}) == len(shards) == devices
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        state._replace(memory=state.memory._replace(hidden=None))
    ):
        assert leaf.is_fully_replicated, path
        assert len(leaf.sharding.device_set) == devices, path


def test_memory_is_split_over_devices_and_everything_else_repeated():
    cfg, mesh = parts(2), mesh_of(4)
    state = begin(cfg, mesh)
    assert_lies_as_it_should(state, 4)
    state, _ = compiled(cfg, 4)(state, *place_batch(cfg, mesh, rows()[0]))
    assert_lies_as_it_should(state, 4)


def test_without_memory_the_program_takes_no_array_without_elements():
    """Where several GPUs split one, XLA's compiler crashes."""
    mesh = mesh_of(2)
    model = dataclasses.replace(PLAIN.model, mem_len=0, attn_type=2, dtype="float16")
    cfg = dataclasses.replace(parts(2), model=model)
    state = jax.eval_shape(functools.partial(init_state, cfg, mesh))
    batch = jax.ShapeDtypeStruct((2, B // 2, T), jnp.int32)
    step = make_train_step(cfg, mesh, SEGMENTS)
    main = step.lower(state, batch, batch).as_text().split("@main(")[1].split("{\n")[0]
    taken = main.split("->")[0]
    assert "x0x" not in taken
    assert f"tensor<{V}x{D}xf32>" in taken


def first_state(seed: int, devices: int) -> TrainState:
    cfg = dataclasses.replace(
        DROPPED, train=dataclasses.replace(DROPPED.train, accumulate=2, seed=seed)
    )
    build = functools.partial(init_state, cfg, mesh_of(devices))
    return jax.jit(build, compiler_options=QUICKLY)()


def test_the_first_state():
    one, four, other = first_state(0, 1), first_state(0, 4), first_state(1, 1)
    assert_lies_as_it_should(four, 4)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), begin(DROPPED, mesh_of(1)))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) == shapes
    assert int(one.step) == int(one.memory.filled) == 0
    assert int(one.opt_state.count) == 0
    jax.tree.map(np.testing.assert_array_equal, look(four), look(one))
    keys = [np.asarray(jax.random.key_data(state.key)) for state in (one, four, other)]
    np.testing.assert_array_equal(keys[0], keys[1])
    assert (keys[0] != keys[2]).any()
    same = [
        (left == right).mean()
        for left, right in zip(
            *(jax.tree.leaves(look(s).params) for s in (one, other)), strict=True
        )
    ]
    # Biases start at 0 with any seed.
    assert sorted(same) == pytest.approx([0.0] * 11 + [1.0] * 5, abs=0.02)
    totals = look(one).totals
    assert int(totals.non_finite_step) == -1
    assert not any(totals._replace(non_finite_step=0))


@pytest.mark.parametrize("accumulate, devices", [(1, 1), (1, 4), (2, 2), (4, 2)])
def test_place_batch_puts_sequence_s_into_row_s_over_a_of_part_s_mod_a(accumulate, devices):
    cfg, mesh = parts(accumulate), mesh_of(devices)
    inputs = np.arange(B * T, dtype=np.int32).reshape(B, T)
    placed = place_batch(cfg, mesh, (inputs, -inputs))
    b = B // accumulate
    for sign, array in zip((1, -1), placed, strict=True):
        assert array.shape == (accumulate, b, T) and array.dtype == jnp.int32
        for s in range(B):
            np.testing.assert_array_equal(
                np.asarray(array)[s % accumulate, s // accumulate], sign * inputs[s]
            )
        shards = array.addressable_shards
        assert len(shards) == devices
        assert {shard.data.shape for shard in shards} == {(accumulate, b // devices, T)}
