"""The other attention types against the original's numbers, literal loops, and what must hold."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from tests.test_model import (
    QUICKLY,
    B,
    T,
    V,
    assert_same_trees,
    backward,
    build,
    compare_gradients,
    forward,
    garbage,
    masks,
    random_params,
    read_original,
    to_jax,
    tokens,
)
from txl_jax import interop
from txl_jax.attention import absolute_attention, learned_attention, nearest, visible
from txl_jax.checks import check_model
from txl_jax.config import ModelConfig
from txl_jax.errors import UserError
from txl_jax.evaluator import Evaluator
from txl_jax.model import Memory, TransformerXL, abstract

M = 6
TYPES = {
    attn_type: ModelConfig(
        n_token=V,
        n_layer=3,
        n_head=2,
        d_model=8,
        d_head=4,
        d_inner=12,
        tgt_len=T,
        mem_len=M,
        attn_type=attn_type,
    )
    for attn_type in (1, 2, 3)
}
EACH = pytest.mark.parametrize("cfg", TYPES.values(), ids=map("attn_type={}".format, TYPES))


# The original's numbers.


@pytest.mark.parametrize(
    "variant",
    [
        *("i_attn1", "i_attn1_prelnorm_clamp", "i_attn1_eval"),
        *("j_attn2", "j_attn2_no_memory", "j_attn2_prelnorm_same_clamp", "j_attn2_eval"),
        *("k_attn3", "k_attn3_prelnorm_same", "k_attn3_eval"),
    ],
)
def test_losses_memory_and_gradients_are_the_originals(variant):
    cfg, about, arrays = original = read_original(variant)
    lengths = {name: about["model"][name] for name in ("tgt_len", "mem_len")}
    trained = dataclasses.replace(cfg, **lengths)
    xl = build(trained, random_params(trained))
    interop.load_torch_state_dict(xl, original.below("param/"))
    params = nnx.to_pure_dict(nnx.state(xl))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == about["n_params"]

    memory = Memory.empty(cfg, about["batch"])
    for segment in range(about["n_seg"]):
        inputs, targets, expected = (
            arrays[f"seg{segment}/{name}"].T for name in ("input", "target", "loss")
        )
        weight = np.full(inputs.shape, 1 / inputs.size)
        loss, memory, gradients = backward(cfg, params, inputs, targets, memory, weight)
        if segment == 1:
            compare_gradients(trained, gradients, original.below("grad/"))
        np.testing.assert_allclose(loss, expected, rtol=0, atol=2e-5)
        remembered = arrays[f"seg{segment}/mems"][:-1].swapaxes(1, 2)
        filled = remembered.shape[2]
        assert int(memory.filled) == filled == about["mem_lens"][segment]
        np.testing.assert_allclose(
            memory.hidden[:, :, cfg.mem_len - filled :], remembered, rtol=0, atol=2e-5
        )


def test_a_table_of_another_length_is_named_when_it_is_loaded():
    original = read_original("k_attn3")
    short = dataclasses.replace(original.cfg, mem_len=8)
    xl = build(short, random_params(short))
    with pytest.raises(UserError) as raised:
        interop.load_torch_state_dict(xl, original.below("param/"))
    found, expected = (2, 20, 2, 12), (2, 16, 2, 12)
    assert str(raised.value).endswith(f": r_emb has shape {found}, expected {expected}")


# The scores.


@pytest.mark.parametrize(
    "n_rows, n_keys, clamp_len",
    [(6, 6, -1), (6, 4, -1), (6, 9, -1), (6, 4, 3), (6, 9, 3), (6, 2, 3), (6, 9, 20), (1, 3, 1)],
)
def test_nearest_are_the_rows_of_the_distances(n_rows, n_keys, clamp_len):
    table = np.arange(n_rows * 2).reshape(n_rows, 2)
    got = np.asarray(nearest(jnp.asarray(table, jnp.int32), n_keys, clamp_len))
    told_apart = n_rows if clamp_len == -1 else min(n_rows, clamp_len)
    of_distance = table[::-1]
    expected = [of_distance[min(d, told_apart - 1)] for d in reversed(range(n_keys))]
    np.testing.assert_array_equal(got, expected)


def literal_attention(q, k, v, filled: int, bias) -> np.ndarray:
    """What a query gets from the keys that it sees, one query, one head, one key at a time.

    bias(b, i, n, j, distance) is what is added to the product of query and key.
    """
    mem_len = k.shape[1] - q.shape[1]
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        keys = range(mem_len - filled, mem_len + i + 1)
        scores = np.array(
            [q[b, i, n] @ k[b, j, n] + bias(b, i, n, j, mem_len + i - j) for j in keys]
        ) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights / weights.sum() @ v[b, keys.start : keys.stop, n]
    return out


@pytest.mark.parametrize("tgt_len, mem_len, filled", [(1, 0, 0), (1, 4, 2), (4, 3, 3), (3, 5, 1)])
def test_attention_is_the_literal_one(tgt_len, mem_len, filled):
    n_keys, n_head, d_head = mem_len + tgt_len, 2, 3
    draw = np.random.default_rng(5).standard_normal
    q = draw((2, tgt_len, n_head, d_head))
    k, v = draw((2, 2, n_keys, n_head, d_head))
    r_emb, r_w_bias = draw((n_keys, n_head, d_head)), draw((n_head, d_head))
    r_bias = draw((n_keys, n_head))
    seen = visible(tgt_len, mem_len, jnp.int32(filled), same_length=False)

    def single(*arrays):
        return [array.astype(np.float32) for array in arrays]

    def by_distance(b, i, n, j, distance):
        row = n_keys - 1 - distance
        return r_w_bias[n] @ k[b, j, n] + q[b, i, n] @ r_emb[row, n] + r_bias[row, n]

    got = jax.jit(learned_attention)(*single(q, k, v, r_emb, r_w_bias, r_bias), seen)
    np.testing.assert_allclose(got, literal_attention(q, k, v, filled, by_distance), atol=1e-5)
    got = jax.jit(absolute_attention)(*single(q, k, v), seen)
    expected = literal_attention(q, k, v, filled, lambda *_: 0.0)
    np.testing.assert_allclose(got, expected, atol=1e-5)


# Memory.


@EACH
@pytest.mark.parametrize("pre_lnorm", [False, True])
def test_reading_memory_does_not_change_it(cfg, pre_lnorm):
    cfg = dataclasses.replace(cfg, pre_lnorm=pre_lnorm)
    params, old = random_params(cfg), garbage(cfg, M)
    before = np.asarray(old.hidden)
    loss, new, _ = backward(cfg, params, *tokens(T), old)
    np.testing.assert_array_equal(old.hidden, before)
    np.testing.assert_array_equal(new.hidden[:, :, : M - T], before[:, :, T:])
    # It was read, though.
    turned = old._replace(hidden=old.hidden[:, :, ::-1])
    other = backward(cfg, params, *tokens(T), turned).loss
    assert (abs(other - loss) > 1e-5).mean() > 0.9


@EACH
def test_what_memory_holds_of_a_segment(cfg):
    """With weights that let inputs pass unchanged: embeddings, and positions where they are."""
    cfg = dataclasses.replace(cfg, pre_lnorm=True)
    params = random_params(cfg)
    layers = jax.tree.map(jnp.zeros_like, params["layers"])
    if cfg.attn_type == 3:
        layers["r_emb"] = params["layers"]["r_emb"]
    params |= {"layers": layers}
    inputs, targets = tokens(T)
    memory = backward(cfg, params, inputs, targets, Memory.empty(cfg, B)).memory
    x = np.asarray(params["embedding"]["tables"][0], np.float64)[inputs] * math.sqrt(cfg.d_model)
    for layer in range(cfg.n_layer):
        if cfg.attn_type == 2 and layer == 0:
            angles = np.arange(T)[::-1, None] / 10000 ** (np.arange(0, 8, 2) / 8)
            x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        if cfg.attn_type == 3:
            x = x + np.asarray(layers["r_emb"])[layer, -T:].reshape(T, 8)
        np.testing.assert_allclose(memory.hidden[layer, :, -T:], x, atol=1e-5)


def test_segments_with_enough_memory_are_one_long_pass_if_positions_are_relative():
    cfg = dataclasses.replace(TYPES[1], mem_len=12, remat=True)
    params = random_params(cfg)
    inputs, targets = tokens(12)
    whole, _ = forward(cfg, params, inputs, targets, Memory.empty(cfg, B))
    memory, losses = Memory.empty(cfg, B), []
    for begin in range(0, 12, T):
        piece = np.s_[:, begin : begin + T]
        loss, memory = forward(cfg, params, inputs[piece], targets[piece], memory)
        losses.append(loss)
    np.testing.assert_allclose(np.concatenate(losses, axis=1), whole, atol=2e-5)


@EACH
def test_unfilled_memory_is_not_seen_and_no_token_before_it_comes(cfg):
    params, filled = random_params(cfg), 2
    inputs, targets = tokens(T)
    memory = garbage(cfg, filled)
    expected = backward(cfg, params, inputs, targets, memory)
    rubbish = memory.hidden.at[:, :, :-filled].set(1e15)
    got = backward(cfg, params, inputs, targets, memory._replace(hidden=rubbish))
    np.testing.assert_array_equal(got.loss, expected.loss)
    assert_same_trees(got.gradients, expected.gradients, rtol=1e-6, atol=1e-6)
    for place in range(T):
        changed = inputs.copy()
        changed[1, place] = (changed[1, place] + 1) % V
        before, after = expected.loss, backward(cfg, params, changed, targets, memory).loss
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
        assert (after[1, place:] != before[1, place:]).all()


@EACH
def test_without_memory_segments_know_nothing_of_each_other(cfg):
    cfg = dataclasses.replace(cfg, mem_len=0)
    params = random_params(cfg)
    loss, memory = forward(cfg, params, *tokens(T), Memory.empty(cfg, B))
    assert memory.hidden.shape == (3, B, 0, 8)
    again, _ = forward(cfg, params, *tokens(T), memory)
    np.testing.assert_array_equal(again, loss)
    # The order of what came before counts: positions are known.
    inputs, targets = tokens(T)
    swapped = inputs[:, [1, 0, 2, 3]]
    moved, _ = forward(cfg, params, swapped, targets, memory)
    assert (abs(moved - loss)[:, 2:][inputs[:, 0] != inputs[:, 1]] > 1e-5).all()


@pytest.mark.parametrize("attn_type", [1, 3])
def test_tables_serve_lengths_beyond_their_own(attn_type):
    """Evaluation of the tables as they are, against a model whose tables go on with their ends."""
    cfg = TYPES[attn_type]
    other = dataclasses.replace(cfg, tgt_len=12, mem_len=20)
    params = random_params(cfg)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    text = np.random.default_rng(0).integers(0, V, 1 + 2 * 3 * 12).astype(np.uint8)
    evaluator = Evaluator(other, mesh, batch=2)
    score = evaluator(params, text)
    assert score.tokens == 72

    layers = dict(params["layers"])
    for name in {"r_emb", "r_bias"} & layers.keys():
        table = layers[name]
        assert table.shape[1] == cfg.max_klen == 10
        layers[name] = jnp.concatenate([jnp.repeat(table[:, :1], 22, axis=1), table], axis=1)
    longer = params | {"layers": layers}
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract(other)[1])
    assert jax.tree.map(lambda leaf: leaf.shape, longer) == shapes
    assert evaluator(longer, text).loss == pytest.approx(score.loss, rel=1e-6)
    layers["r_emb"] = layers["r_emb"].at[:, :22].add(1.0)
    assert evaluator(longer, text).loss != pytest.approx(score.loss, rel=1e-4)


# Dropout and types.


@EACH
def test_dropout_hits_what_it_hits_in_the_original(cfg):
    cfg = dataclasses.replace(cfg, dropout=0.2, dropatt=0.2)
    xl = build(cfg, random_params(cfg))
    inputs, targets = map(to_jax, tokens(T))
    program = jax.make_jaxpr(xl.__call__)(inputs, targets, Memory.empty(cfg, B), jax.random.key(0))
    # Embeddings and output; of each layer, attention and feed-forward. No mask of positions.
    expected = {(B, T, 8): 4, (B, T, 12): 1, (B, 2, T, M + T): 1}
    assert masks(program.jaxpr) == Counter(expected)


@pytest.mark.parametrize("attn_type, dropped", [(2, True), (3, False)])
def test_sinusoids_are_dropped_with_the_embeddings_and_tables_are_not(attn_type, dropped):
    cfg = dataclasses.replace(TYPES[attn_type], dropout=0.5)
    params = jax.tree.map(jnp.zeros_like, random_params(cfg))
    if attn_type == 3:
        params["layers"]["r_emb"] = jnp.ones_like(params["layers"]["r_emb"])
    _, memory = forward(cfg, params, *tokens(T), Memory.empty(cfg, B), jax.random.key(0))
    first = np.asarray(memory.hidden)[0, :, -T:]
    zeros = (first == 0).mean(0).sum()
    sines_of_0 = 4 if attn_type == 2 else 0
    assert bool(zeros > sines_of_0 + 5) is dropped


@EACH
def test_bfloat16_is_close_to_float32(cfg):
    params, memory = random_params(cfg), garbage(cfg, 3)
    inputs, targets = tokens(T)
    exact = backward(cfg, params, inputs, targets, memory)
    for leaf in jax.tree.leaves(exact.gradients):
        assert abs(leaf).max() > 1e-3  # every parameter matters
    half = dataclasses.replace(cfg, dtype="bfloat16")
    rounded = memory._replace(hidden=memory.hidden.astype(jnp.bfloat16))
    got = backward(half, params, inputs, targets, rounded)
    assert got.memory.hidden.dtype == jnp.bfloat16
    assert 0 < abs(got.loss - exact.loss).mean() < 0.02 * exact.loss.mean()
    for left, right in zip(*map(jax.tree.leaves, (got.gradients, exact.gradients)), strict=True):
        assert abs(left - right).mean() < 0.1 * abs(right).max()


# Parameters.


@EACH
def test_tables_have_a_row_for_each_key(cfg):
    params = abstract(cfg)[1]
    plain = abstract(dataclasses.replace(cfg, attn_type=0))[1]
    shapes = {name: getattr(leaf, "shape", None) for name, leaf in params["layers"].items()}
    own = {name: shapes[name] for name in shapes.keys() - plain["layers"].keys()}
    assert own == {
        1: {"r_emb": (3, 10, 2, 4), "r_w_bias": (3, 2, 4), "r_bias": (3, 10, 2)},
        2: {},
        3: {"r_emb": (3, 10, 2, 4)},
    }.get(cfg.attn_type)
    assert plain["layers"].keys() - shapes.keys() == {"w_r"}
    assert plain.keys() - params.keys() == {"r_w_bias", "r_r_bias"}


def test_tables_begin_as_the_originals():
    cfg = dataclasses.replace(TYPES[1], tgt_len=100, mem_len=60)

    def draw():
        return nnx.to_pure_dict(nnx.state(TransformerXL(cfg, rngs=nnx.Rngs(0))))

    layers: dict[str, Any] = jax.jit(draw, compiler_options=QUICKLY)()["layers"]
    for z in np.asarray(layers["r_emb"], np.float64) / cfg.init_std:
        assert abs(z.mean()) < 5 / z.size**0.5
        assert abs(z.std() - 1) < 5 / (2 * z.size) ** 0.5
    for name in ("r_emb", "r_w_bias"):  # no two layers begin alike
        entries = np.asarray(layers[name]).reshape(cfg.n_layer, -1)
        assert (abs(entries[1:] - entries[:-1]) > 0).all()
        assert entries.std() == pytest.approx(cfg.init_std, rel=0.4)
    assert not np.asarray(layers["r_bias"]).any()


@pytest.mark.parametrize(
    "attn_type, changed, words",
    [
        (1, {"attn_type": 4}, ["attn_type is 4", "0, 1, 2 or 3"]),
        (1, {"attn_type": -1}, ["attn_type is -1"]),
        *(
            (attn_type, {"untie_r": True}, ["untie_r", f"attn_type is {attn_type}", "False"])
            for attn_type in TYPES
        ),
        (1, {"clamp_len": 0}, ["clamp_len is 0", "at least 1, or -1"]),
        (3, {"clamp_len": 5}, ["clamp_len is 5", "has to be -1"]),
        (3, {"clamp_len": 0}, ["clamp_len is 0", "has to be -1"]),
        (3, {"d_head": 5}, ["n_head 2 x d_head 5 is 10 and d_model is 8", "equal"]),
        (2, {"d_model": 7}, ["d_model is 7", "even"]),
    ],
)
def test_a_config_that_cannot_work_is_one_line(attn_type, changed, words):
    cfg = dataclasses.replace(TYPES[attn_type], **changed)
    with pytest.raises(UserError) as raised:
        check_model(cfg)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "attn_type, changed",
    [
        (1, {"d_model": 7, "d_head": 5}),
        (1, {"clamp_len": 1}),
        (2, {"d_head": 5, "clamp_len": 0}),
        (3, {"d_model": 9, "n_head": 3, "d_head": 3}),
    ],
)
def test_configs_at_the_edge_work(attn_type, changed):
    cfg = dataclasses.replace(TYPES[attn_type], **changed)
    params = abstract(cfg)[1]
    memory = jax.eval_shape(lambda: Memory.empty(cfg, B))
    inputs = jax.ShapeDtypeStruct((B, T), jnp.int32)
    loss, _ = jax.eval_shape(
        lambda *args: build(cfg, args[0])(*args[1:]), params, inputs, inputs, memory
    )
    assert loss.shape == (B, T)
