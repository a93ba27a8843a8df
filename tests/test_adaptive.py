"""Adaptive input and softmax against a dense NumPy version of the definition."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import NDArray

from txl_jax import adaptive, sharding
from txl_jax.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, cross_entropy, tail_loss
from txl_jax.config import ModelConfig
from txl_jax.model import TransformerXL, abstract

B, T, D = 4, 40, 8
PLAIN = ModelConfig(n_token=23, d_model=D, cutoffs=(5, 11, 20))
CONFIGS = {
    "no cutoffs": dataclasses.replace(PLAIN, cutoffs=()),
    "div_val 1": PLAIN,
    "untied": dataclasses.replace(PLAIN, tie_weight=False),
    "one tail": dataclasses.replace(PLAIN, cutoffs=(3,)),
    "d_embed": dataclasses.replace(PLAIN, d_embed=6),
    "d_embed, tied": dataclasses.replace(PLAIN, d_embed=6, tie_projs=(True,) * 4),
    "d_embed, mixed": dataclasses.replace(PLAIN, d_embed=6, tie_projs=(True, False, True, False)),
    "div_val 2": dataclasses.replace(PLAIN, div_val=2),
    "div_val 2, mixed": dataclasses.replace(
        PLAIN, div_val=2, tie_projs=(True, False, True, False), tie_weight=False
    ),
    "div_val 2, no cutoffs": dataclasses.replace(PLAIN, div_val=2, cutoffs=()),
    "div_val 4": dataclasses.replace(PLAIN, div_val=4, d_embed=64),
}
EACH = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


class Both(nnx.Module):
    """Input and output, as the model holds them."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.embedding = AdaptiveEmbedding(cfg, rngs)
        self.output = AdaptiveSoftmax(cfg, rngs)


def make(cfg: ModelConfig) -> tuple[Any, Any]:
    """(graphdef, random parameters with every entry near 1, so that each of them counts)."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Both(cfg, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return graphdef, jax.tree.map(draw, nnx.to_pure_dict(shapes))


def dense_loss(cfg: ModelConfig, params: Any, hidden: NDArray, targets: NDArray) -> NDArray:
    """The definition in float64: -log p(cluster) - log p(word within it), column by column.

    As in the original: the head has the words below the first cutoff, then a column for each tail,
    the last column for the first tail.
    """
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    inputs, outputs = exact["embedding"], exact["output"]
    tables = inputs["tables"] if cfg.tie_weight else outputs["tables"]
    edges = [0, *cfg.cutoffs, cfg.n_token]
    tied = cfg.tie_projs or (False, *(True,) * len(cfg.cutoffs))

    def down(i):
        if cfg.div_val == 1 and cfg.d_embed in (None, cfg.d_model):
            return hidden
        if not tied[i]:
            return hidden @ outputs["projections"][str(i)]
        return hidden @ inputs["projections"][0 if cfg.div_val == 1 else i]

    def log_softmax(logits):
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    n_tails = len(edges) - 2
    logits = down(0) @ tables[0].T + outputs["biases"][0]
    if n_tails:
        columns = down(0) @ outputs["cluster_weight"].T + outputs["cluster_bias"]
        logits = np.concatenate([logits, columns], -1)
    head = log_softmax(logits)
    log_p = [head[..., : edges[1]]]
    for i in range(1, n_tails + 1):
        tail = log_softmax(down(i) @ tables[i].T + outputs["biases"][i])
        log_p.append(head[..., [-i]] + tail)
    return -np.take_along_axis(np.concatenate(log_p, -1), targets[..., None], -1)[..., 0]


def case(cfg: ModelConfig, targets: NDArray | None = None):
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((B, T, cfg.d_model))
    if targets is None:
        targets = rng.integers(cfg.n_token, size=(B, T))
    return hidden, np.asarray(targets, np.int32)


def loss_and_gradients(cfg: ModelConfig, hidden, targets):
    """Loss, and gradients of its sum weighted token by token, for parameters and hidden."""
    _, params = make(cfg)
    weight = np.random.default_rng(2).standard_normal(targets.shape).astype(np.float32)
    gradients, loss = compiled(cfg)(
        params, jnp.asarray(hidden, jnp.float32), jnp.asarray(targets), jnp.asarray(weight)
    )
    return params, weight, loss, gradients


@functools.cache
def compiled(cfg: ModelConfig, mesh: Mesh | None = None) -> Any:
    """(params, hidden, targets, weight) → gradients of the weighted sum of losses, and losses."""
    graphdef, _ = make(cfg)

    def total(params, hidden, targets, weight):
        both = nnx.merge(graphdef, params)
        loss = both.output(hidden, targets, both.embedding)
        return (loss * weight).sum(), loss

    gradients = jax.grad(total, argnums=(0, 1), has_aux=True)
    if mesh is None:
        return jax.jit(gradients)

    def of_device(*args):
        (of_params, of_hidden), loss = gradients(*args)
        return (jax.lax.psum(of_params, "data"), of_hidden), loss

    whole, rows = PartitionSpec(), PartitionSpec("data")
    return jax.jit(
        jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(whole, rows, rows, rows),
            out_specs=((whole, rows), rows),
            check_vma=False,
        )
    )


@EACH
def test_loss_is_that_of_the_definition(cfg):
    hidden, targets = case(cfg)
    params, _, loss, _ = loss_and_gradients(cfg, hidden, targets)
    np.testing.assert_allclose(loss, dense_loss(cfg, params, hidden, targets), atol=3e-5, rtol=1e-5)


@EACH
def test_gradients_are_those_of_finite_differences(cfg):
    """Along random directions of every parameter and of hidden, in float64."""
    hidden, targets = case(cfg)
    params, weight, _, (by_params, by_hidden) = loss_and_gradients(cfg, hidden, targets)
    leaves, tree = jax.tree.flatten((params, hidden))
    slopes = jax.tree.leaves((by_params, by_hidden))
    rng, step = np.random.default_rng(3), 1e-5

    def total(leaves):
        params, hidden = jax.tree.unflatten(tree, leaves)
        return (dense_loss(cfg, params, hidden, targets) * weight).sum()

    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    for i, slope in enumerate(slopes):
        direction = rng.standard_normal(leaves[i].shape)
        there, back = (
            [*leaves[:i], leaves[i] + sign * step * direction, *leaves[i + 1 :]] for sign in (1, -1)
        )
        expected = (total(there) - total(back)) / (2 * step)
        scale = 3 * float(np.linalg.norm(slope))
        # A tied table with which the forward pass does nothing has slope 0.
        assert (np.asarray(slope, np.float64) * direction).sum() == pytest.approx(
            expected, abs=1e-5 * scale + 1e-6
        ), jax.tree_util.tree_leaves_with_path((params, hidden))[i][0]


@settings(max_examples=12)
@given(data=st.data())
def test_exact_wherever_the_targets_lie(data):
    """No token in a tail, one, all of them in the rarest: always the definition."""
    kind = data.draw(st.sampled_from(["any", "no tail", "rarest only", "one in the rarest"]))
    low, high = {"any": (0, 22), "no tail": (0, 4), "rarest only": (20, 22)}.get(kind, (0, 4))
    drawn = data.draw(st.lists(st.integers(low, high), min_size=B * T, max_size=B * T))
    targets = np.reshape(drawn, (B, T))
    if kind == "one in the rarest":
        targets[2, 7] = 22
    hidden, targets = case(PLAIN, targets)
    params, _, loss, (by_params, _) = loss_and_gradients(PLAIN, hidden, targets)
    np.testing.assert_allclose(
        loss, dense_loss(PLAIN, params, hidden, targets), atol=3e-5, rtol=1e-5
    )
    for i, (start, stop) in enumerate([(0, 5), (5, 11), (11, 20), (20, 23)]):
        reached = i == 0 or bool(((targets >= start) & (targets < stop)).any())
        assert bool((by_params["embedding"]["tables"][i] != 0).any()) == reached


@pytest.mark.parametrize("n_inside", [0, 1, 63, 64, 65, 128, 2000])
def test_a_tail_goes_through_in_turns(n_inside):
    """2000 tokens, 64 at a time: whole turns, part of one, none."""
    n_tokens, width, size = 2000, 6, 9
    assert adaptive.tokens_at_a_time(n_tokens) == 64
    rng = np.random.default_rng(n_inside)
    hidden = jnp.asarray(rng.standard_normal((n_tokens, width)), jnp.float32)
    table = jnp.asarray(rng.standard_normal((size, width)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(size), jnp.float32)
    local = np.full(n_tokens, -1, np.int32)
    local[rng.permutation(n_tokens)[:n_inside]] = rng.integers(size, size=n_inside)
    inside = jnp.asarray(local >= 0)
    weight = jnp.asarray(rng.standard_normal(n_tokens), jnp.float32)

    def in_turns(hidden, table, bias):
        loss = tail_loss(hidden, jnp.asarray(local), None, table, bias)
        return (loss * weight).sum(), loss

    def at_once(hidden, table, bias):
        log_p = jax.nn.log_softmax(hidden @ table.T + bias)
        picked = jnp.take_along_axis(log_p, jnp.maximum(local, 0)[:, None], axis=1)[:, 0]
        loss = jnp.where(inside, -picked, 0.0)
        return (loss * weight).sum(), loss

    got, expected = (
        jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(hidden, table, bias)
        for run in (in_turns, at_once)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + abs(b).max())), got, expected
    )


def test_log_probs_sum_to_one_and_hold_the_losses():
    for cfg in CONFIGS.values():
        hidden, targets = case(cfg)
        graphdef, params = make(cfg)
        both = nnx.merge(graphdef, params)
        log_p = np.asarray(both.output.log_probs(jnp.asarray(hidden, jnp.float32), both.embedding))
        assert log_p.shape == (B, T, cfg.n_token) and log_p.dtype == np.float32
        np.testing.assert_allclose(np.exp(log_p).sum(-1), 1.0, atol=1e-4)
        picked = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        expected = dense_loss(cfg, params, hidden, targets)
        np.testing.assert_allclose(picked, expected, atol=5e-5, rtol=1e-5)


@EACH
def test_embeddings_are_rows_of_their_cluster_projected(cfg):
    graphdef, params = make(cfg)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["embedding"])
    ids = np.arange(cfg.n_token).reshape(1, -1)
    edges = [0, *cfg.cutoffs, cfg.n_token]
    rows = []
    for word in ids[0]:
        i = next(i for i in range(len(edges)) if word < edges[i + 1])
        row = exact["tables"][i][word - edges[i]]
        if "projections" in exact:
            row = exact["projections"][0 if cfg.div_val == 1 else i] @ row
        rows.append(row * D**0.5)
    got = nnx.merge(graphdef, params).embedding(jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(got[0], rows, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_keeps_float32_gradients(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((30, 16)), dtype)
    table = jnp.asarray(rng.standard_normal((40, 16)), jnp.float32)
    bias, slot = jnp.zeros(40), jnp.asarray(rng.integers(40, size=30), jnp.int32)

    def run(x):
        return jax.grad(lambda x, t, b: cross_entropy(x, t, b, slot).sum(), (0, 1, 2))(
            x, table, bias
        )

    got, exact = run(x), run(x.astype(jnp.float32))
    assert [leaf.dtype for leaf in got] == [x.dtype, jnp.float32, jnp.float32]
    for half, full in zip(got, exact, strict=True):
        full = np.asarray(full, np.float64)
        assert 0 < abs(np.asarray(half, np.float64) - full).max() < 0.02 * abs(full).max()


# What is computed where.


def shapes(jaxpr: Jaxpr) -> list[tuple[int, ...]]:
    """Shapes of everything that a program computes, loops and calls included."""
    found = [getattr(var.aval, "shape", ()) for eqn in jaxpr.eqns for var in eqn.outvars]
    for eqn in jaxpr.eqns:
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(part):
                found += shapes(part.jaxpr if isinstance(part, ClosedJaxpr) else part)
    return found


def is_jaxpr(part: Any) -> bool:
    return isinstance(part, Jaxpr | ClosedJaxpr)


def test_nothing_has_the_size_of_tokens_times_vocabulary():
    """The largest arrays are the head's logits and the tables themselves."""
    cfg = dataclasses.replace(PLAIN, n_token=3001, cutoffs=(301, 1001))
    _, targets = case(cfg)
    graphdef, params = make(cfg)

    def total(params, hidden):
        both = nnx.merge(graphdef, params)
        return both.output(hidden, jnp.asarray(targets), both.embedding).sum()

    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(params, jnp.zeros((B, T, D)))
    sizes = [int(np.prod(shape)) for shape in shapes(program.jaxpr)]
    head = B * T * (301 + 2)
    turn = adaptive.tokens_at_a_time(B * T) * 2000
    assert max(sizes) == max(head, turn) == turn < B * T * 700


def test_each_device_does_its_own_turns_without_the_others():
    """The same numbers as on one device, and no collective inside a loop."""
    mesh = sharding.make_mesh()
    if mesh.devices.size < 4:
        pytest.skip("needs 4 devices")
    cfg = CONFIGS["div_val 2, mixed"]
    hidden, targets = case(cfg)
    targets[0], targets[1] = 22, 0  # one device all tail, another none
    params, weight, loss, gradients = loss_and_gradients(cfg, hidden, targets)
    run = compiled(cfg, mesh)
    args = (params, jnp.asarray(hidden, jnp.float32), jnp.asarray(targets), jnp.asarray(weight))
    got_gradients, got_loss = run(*args)
    np.testing.assert_allclose(got_loss, loss, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + abs(b).max())),
        got_gradients,
        gradients,
    )
    program = run.lower(*args).compile().as_text()
    assert program is not None
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    assert len(bodies) >= 2 * len(cfg.cutoffs)
    for name, lines in re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S):
        if name in bodies:
            assert not re.search(r"all-(reduce|gather|to-all)|collective|reduce-scatter", lines)
    assert "all-reduce" in program


# The whole model.


@pytest.mark.parametrize(
    ("expected", "cfg"),
    [
        # The fork's SMALL and LARGE, then the original's scripts of the same names.
        (186_707_675, dict(n_token=267_736, n_layer=16, d_model=512, n_head=8, d_head=48,
                           d_inner=2048, cutoffs=(20000, 40000, 200000))),
        (285_170_523, dict(n_token=267_736, n_layer=18, d_model=1024, n_head=16, d_head=64,
                           d_inner=4096, cutoffs=(20000, 40000, 200000), div_val=4)),
        (151_107_538, dict(n_token=267_735, n_layer=16, d_model=410, n_head=10, d_head=41,
                           d_inner=2100, cutoffs=(20000, 40000, 200000))),
        (285_170_506, dict(n_token=267_735, n_layer=18, d_model=1024, n_head=16, d_head=64,
                           d_inner=4096, cutoffs=(20000, 40000, 200000), div_val=4)),
        (41_055_436, dict(n_token=204, n_layer=12, d_model=512, n_head=8, d_head=64,
                          d_inner=2048)),
        (277_050_395, dict(n_token=27, n_layer=24, d_model=1024, n_head=8, d_head=128,
                           d_inner=3072)),
    ],
    ids=["small", "large", "wt103_base", "wt103_large", "enwik8_base", "text8_large"],
)  # fmt: skip
def test_number_of_parameters_is_the_originals(expected, cfg):
    _, params = abstract(ModelConfig(**cfg))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_the_model_trains_through_its_rare_words():
    """Losses of a model with cutoffs are its log-probabilities; every table gets a gradient."""
    cfg = dataclasses.replace(PLAIN, n_layer=2, d_inner=12, tgt_len=10, mem_len=6, div_val=2)
    graphdef, wanted = abstract(cfg)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    inputs, targets = jnp.asarray(rng.integers(cfg.n_token, size=(2, 3, 10)), jnp.int32)

    def total(params):
        xl: TransformerXL = nnx.merge(graphdef, params)
        loss, _ = xl(inputs, targets, xl.init_memory(3))
        hidden, _ = xl.hidden(inputs, xl.init_memory(3))
        return loss.sum(), (loss, xl.log_probs(hidden))

    gradients, (loss, log_probs) = jax.jit(jax.grad(total, has_aux=True))(
        jax.tree.map(draw, wanted)
    )
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, -picked, atol=1e-4)
    assert all(bool((leaf != 0).any()) for leaf in jax.tree.leaves(gradients))
