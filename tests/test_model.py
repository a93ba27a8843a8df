"""The model against the original's numbers, and against what must hold for any Transformer-XL."""

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr

from txl_jax import interop, original_tensors
from txl_jax.checks import check_model
from txl_jax.config import ModelConfig
from txl_jax.errors import UserError
from txl_jax.model import Memory, TransformerXL, abstract

REFERENCE = Path(__file__).parent / "reference"
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiler options: these tests compile for much longer than they compute."""

V, B, T, M = 11, 3, 4, 6
POST = ModelConfig(
    n_token=V, n_layer=3, n_head=2, d_model=8, d_head=5, d_inner=12, tgt_len=T, mem_len=M
)
PRE = dataclasses.replace(POST, pre_lnorm=True, clamp_len=3, untie_r=True, d_embed=6)
UNTIED = dataclasses.replace(PRE, tie_weight=False, tie_projs=(False,))


def random_params(cfg: ModelConfig, seed: int = 0) -> Any:
    """Weights large enough that every part of the model matters."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray((mean + 0.4 * rng.standard_normal(leaf.shape)).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, abstract(cfg)[1])


def build(cfg: ModelConfig, params: Any) -> TransformerXL:
    return nnx.merge(abstract(cfg)[0], params)


class Step(NamedTuple):
    loss: np.ndarray
    memory: Memory
    gradients: Any
    """Of the weighted sum of the losses, for the parameters."""


@functools.cache
def compiled(cfg: ModelConfig):
    def run(params, inputs, targets, memory, key):
        return build(cfg, params)(inputs, targets, memory, key)

    return jax.jit(run, compiler_options=QUICKLY)


def forward(cfg, params, inputs, targets, memory, key=None) -> tuple[np.ndarray, Memory]:
    loss, memory = compiled(cfg)(params, to_jax(inputs), to_jax(targets), memory, key)
    return np.asarray(loss), memory


@functools.cache
def compiled_gradient(cfg: ModelConfig):
    def weighted(params, inputs, targets, memory, weight):
        loss, memory = build(cfg, params)(inputs, targets, memory)
        return (loss * weight).sum(), (loss, memory)

    return jax.jit(jax.value_and_grad(weighted, has_aux=True), compiler_options=QUICKLY)


def backward(cfg, params, inputs, targets, memory, weight=None) -> Step:
    weight = np.ones(inputs.shape) if weight is None else weight
    arrays = to_jax(inputs), to_jax(targets), memory, jnp.asarray(np.float32(weight))
    (_, (loss, memory)), gradients = compiled_gradient(cfg)(params, *arrays)
    return Step(np.asarray(loss), memory, gradients)


def to_jax(tokens: np.ndarray) -> jax.Array:
    return jnp.asarray(tokens.astype(np.int32))


def tokens(length: int, batch: int = B, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, unrelated."""
    both = np.random.default_rng(seed).integers(0, V, (2, batch, length))
    return both[0], both[1]


def garbage(cfg: ModelConfig, filled: int, seed: int = 0, scale: float = 1.0) -> Memory:
    shape = (cfg.n_layer, B, cfg.mem_len, cfg.d_model)
    hidden = scale * np.random.default_rng(seed).standard_normal(shape)
    return Memory(jnp.asarray(hidden.astype(cfg.dtype)), jnp.int32(filled))


def assert_same_trees(left: Any, right: Any, rtol: float, atol: float = 0.0) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, expected in jax.tree_util.tree_leaves_with_path(right):
        got = functools.reduce(lambda node, part: node[part.key], path, left)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, expected, rtol, atol, err_msg=name)


# The original's numbers.


class Original(NamedTuple):
    cfg: ModelConfig
    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def below(self, folder: str) -> dict[str, np.ndarray]:
        names = [name for name in self.arrays if name.startswith(folder)]
        return {name.removeprefix(folder): self.arrays[name] for name in names}


def read_original(variant: str) -> Original:
    with np.load(REFERENCE / f"{variant}.npz") as file:
        arrays = dict(file)
    about = json.loads(str(arrays.pop("config")))
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    given = {name: value for name, value in about["model"].items() if name in known}
    given |= {name: tuple(given[name]) for name in ("cutoffs", "tie_projs")}
    if len(given["tie_projs"]) <= len(given["cutoffs"]):
        given["tie_projs"] += (False,) * (1 + len(given["cutoffs"]) - len(given["tie_projs"]))
    if about["reset_length"]:
        given["tgt_len"], _, given["mem_len"] = about["reset_length"]
    return Original(ModelConfig(**given | about["set_after"]), about, arrays)


VARIANTS = [
    *("a_plain", "a_plain_mem12", "b_adaptive_div1", "c_adaptive_div4", "d_prelnorm"),
    *("e_same_length_clamp", "f_embed_adaptive", "g_untied", "h_eval_longmem_same_clamp"),
    "x_short_last",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_memory_and_gradients_are_the_originals(variant):
    cfg, about, arrays = original = read_original(variant)
    xl = build(cfg, random_params(cfg))
    interop.load_torch_state_dict(xl, original.below("param/"))
    params = nnx.to_pure_dict(nnx.state(xl))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == about["n_params"]

    memory = xl.init_memory(about["batch"])
    assert int(memory.filled) == 0
    for segment in range(about["n_seg"]):
        inputs, targets, expected = (
            arrays[f"seg{segment}/{name}"].T for name in ("input", "target", "loss")
        )
        if segment == 1:
            weight = np.full(inputs.shape, 1 / inputs.size)
            loss, memory, gradients = backward(cfg, params, inputs, targets, memory, weight)
            compare_gradients(cfg, gradients, original.below("grad/"))
        else:
            loss, memory = forward(cfg, params, inputs, targets, memory)
        np.testing.assert_allclose(loss, expected, rtol=0, atol=2e-5)
        # The original also keeps the output of the last layer, which nothing reads.
        remembered = arrays[f"seg{segment}/mems"][:-1].swapaxes(1, 2)
        filled = remembered.shape[2]
        assert int(memory.filled) == filled
        np.testing.assert_allclose(
            memory.hidden[:, :, cfg.mem_len - filled :], remembered, rtol=0, atol=2e-5
        )


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=() if variant[0] in "ch" else pytest.mark.slow)
        for variant in VARIANTS
    ],
)
@pytest.mark.parametrize(
    ("dtype", "worst", "mean"), [("bfloat16", 0.2, 0.04), ("float16", 0.03, 0.005)]
)
def test_in_16_bits_losses_are_near_the_originals(variant, dtype, worst, mean):
    """Of single tokens, and on average; the weights are large, so that roundings show."""
    cfg, about, arrays = original = read_original(variant)
    xl = build(cfg, random_params(cfg))
    interop.load_torch_state_dict(xl, original.below("param/"))
    params = nnx.to_pure_dict(nnx.state(xl))
    cfg = dataclasses.replace(cfg, dtype=dtype)
    memory = build(cfg, params).init_memory(about["batch"])
    for segment in range(about["n_seg"]):
        inputs, targets, expected = (
            arrays[f"seg{segment}/{name}"].T for name in ("input", "target", "loss")
        )
        loss, memory = forward(cfg, params, inputs, targets, memory)
        assert np.abs(loss - expected).max() < worst
        assert abs((loss - expected).mean()) < mean


def compare_gradients(cfg: ModelConfig, gradients: Any, expected: dict[str, np.ndarray]) -> None:
    compared = set()
    for path, source in original_tensors.sources(cfg):
        entries = functools.reduce(lambda node, part: node[part], path, gradients)
        for name, got in zip(source.names, entries if source.stacked else [entries], strict=True):
            atol = 1e-5 * abs(expected[name]).max()
            np.testing.assert_allclose(
                got, source.convert(expected[name]), rtol=0, atol=atol, err_msg=name
            )
            compared.add(name)
    assert compared == expected.keys()


# Memory.


@pytest.mark.parametrize(
    "cfg",
    [
        POST,
        dataclasses.replace(PRE, clamp_len=-1),
        dataclasses.replace(POST, clamp_len=5, untie_r=True),
    ],
    ids=["post-norm", "pre-norm", "clamped"],
)
@settings(max_examples=8)
@given(data=st.data())
def test_segments_with_enough_memory_are_one_long_pass(cfg, data):
    total = 12
    cfg = dataclasses.replace(cfg, mem_len=total)
    params = random_params(cfg)
    inputs, targets = tokens(total)
    whole, end = forward(cfg, params, inputs, targets, Memory.empty(cfg, B))

    memory, pieces, begin = Memory.empty(cfg, B), [], 0
    while begin < total:
        lengths = [length for length in (1, 3, 5) if begin + length <= total]
        length = data.draw(st.sampled_from(lengths))
        piece = np.s_[:, begin : begin + length]
        loss, memory = forward(cfg, params, inputs[piece], targets[piece], memory)
        pieces.append(loss)
        begin += length
        assert int(memory.filled) == begin
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)
    np.testing.assert_allclose(memory.hidden, end.hidden, atol=2e-5)


def test_a_short_memory_keeps_the_newest():
    long, short = (dataclasses.replace(POST, mem_len=length) for length in (12, 3))
    inputs, targets = tokens(5)
    params = random_params(POST)
    _, all_of_it = forward(long, params, inputs, targets, Memory.empty(long, B))
    _, newest = forward(short, params, inputs, targets, Memory.empty(short, B))
    assert int(newest.filled) == 3
    np.testing.assert_allclose(newest.hidden, all_of_it.hidden[:, :, -3:], atol=1e-5)


@pytest.mark.parametrize("cfg", [POST, PRE], ids=["post-norm", "pre-norm"])
def test_unfilled_memory_is_not_seen(cfg):
    params = random_params(cfg)
    inputs, targets = tokens(T)
    filled = 2
    clean = garbage(cfg, filled)
    clean = clean._replace(hidden=clean.hidden.at[:, :, :-filled].set(0.0))
    expected = backward(cfg, params, inputs, targets, clean)
    for scale in (1.0, 1e15):
        rubbish = garbage(cfg, filled, seed=1, scale=scale).hidden[:, :, :-filled]
        dirty = clean._replace(hidden=clean.hidden.at[:, :, :-filled].set(rubbish))
        got = backward(cfg, params, inputs, targets, dirty)
        np.testing.assert_array_equal(got.loss, expected.loss)
        assert_same_trees(got.gradients, expected.gradients, rtol=1e-6, atol=1e-6)
        more, _ = forward(cfg, params, inputs, targets, dirty._replace(filled=jnp.int32(3)))
        assert (abs(more - expected.loss) > 1e-4).mean() > 0.9


def test_memory_that_is_full_stays_full():
    memory = garbage(POST, M)
    _, memory = forward(POST, random_params(POST), *tokens(T), memory)
    assert int(memory.filled) == M


def test_memory_carries_no_gradient():
    inputs, targets = map(to_jax, tokens(T))

    def remembered(params):
        xl = build(POST, params)
        _, memory = xl(inputs, targets, xl.init_memory(B))
        return memory.hidden.sum()

    gradients = jax.jit(jax.grad(remembered))(random_params(POST))
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize(
    "cfg",
    [POST, PRE, dataclasses.replace(POST, attn_type=1), dataclasses.replace(POST, attn_type=2)],
    ids=["attn_type=0", "pre_lnorm, untied biases", "attn_type=1", "attn_type=2"],
)
def test_what_is_recalled_gives_what_memory_gives(cfg):
    xl, segments = build(cfg, random_params(cfg)), to_jax(tokens(3 * T)[0]).reshape(B, 3, T)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def outputs(memory: Memory) -> list[list[jax.Array]]:
        recalled, found = xl.recall(memory, T), []
        for i in range(3):
            of_memory, memory = xl.hidden(segments[:, i], memory)
            of_recalled, recalled = xl.hidden(segments[:, i], recalled)
            found.append([of_memory, of_recalled])
        return found

    for expected, hidden in outputs(garbage(cfg, filled=M - 1)):
        np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)


def test_without_memory_segments_know_nothing_of_each_other():
    cfg = dataclasses.replace(POST, mem_len=0)
    params = random_params(cfg)
    empty = build(cfg, params).init_memory(B)
    assert empty.hidden.shape == (cfg.n_layer, B, 0, cfg.d_model)
    loss, memory = forward(cfg, params, *tokens(T), empty)
    assert int(memory.filled) == 0
    again, _ = forward(cfg, params, *tokens(T), memory)
    np.testing.assert_array_equal(again, loss)
    assert np.isfinite(loss).all()


# Who sees what.


@pytest.mark.parametrize("cfg", [POST, PRE], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("place", range(T))
def test_no_position_and_no_other_row_sees_a_token_before_it_comes(cfg, place):
    params, memory = random_params(cfg), garbage(cfg, 3)
    inputs, targets = tokens(T)
    before, old = forward(cfg, params, inputs, targets, memory)
    changed = inputs.copy()
    changed[1, place] = (changed[1, place] + 1) % V
    after, new = forward(cfg, params, changed, targets, memory)
    np.testing.assert_array_equal(after[:, :place], before[:, :place])
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (after[1, place:] != before[1, place:]).all()
    np.testing.assert_array_equal(new.hidden[:, [0, 2]], old.hidden[:, [0, 2]])
    moved = np.asarray(new.hidden[:, 1] != old.hidden[:, 1]).any(-1)
    # A layer's input moves at this place and, above the embeddings, after it.
    expected = np.zeros((cfg.n_layer, M), bool)
    expected[0, M - T + place] = expected[1:, M - T + place :] = True
    np.testing.assert_array_equal(moved, expected)


def test_a_target_decides_its_own_loss_alone():
    params, memory = random_params(POST), garbage(POST, 3)
    inputs, targets = tokens(T)
    before, _ = forward(POST, params, inputs, targets, memory)
    every = np.stack(
        [forward(POST, params, inputs, np.full_like(targets, t), memory)[0] for t in range(V)]
    )
    np.testing.assert_allclose(np.exp(-every.astype(np.float64)).sum(0), 1.0, atol=1e-5)
    picked = np.take_along_axis(every, targets[None], axis=0)[0]
    np.testing.assert_array_equal(before, picked)


def test_negative_targets_are_ignored():
    params, memory = random_params(POST), garbage(POST, 3)
    inputs, targets = tokens(T)
    ignored = np.random.default_rng(3).random(targets.shape) < 0.4
    # By weight 0, which is how the expected gradient is made.
    expected = backward(POST, params, inputs, targets, memory, weight=~ignored)
    assert ignored.any(1).all()
    for value in (-1, -100):
        marked = np.where(ignored, value, targets)
        got = backward(POST, params, inputs, marked, memory)
        np.testing.assert_array_equal(got.loss, np.where(ignored, 0.0, expected.loss))
        assert_same_trees(got.gradients, expected.gradients, rtol=1e-5, atol=1e-6)
    nothing = backward(POST, params, inputs, np.full_like(targets, -1), memory)
    for leaf in jax.tree.leaves(nothing.gradients):
        np.testing.assert_array_equal(leaf, 0.0)


# Variants of the model against each other and against NumPy.


@pytest.mark.parametrize("tie_weight", [True, False])
@pytest.mark.parametrize("tie_projs", [True, False])
@pytest.mark.parametrize("d_embed", [5, 14])
def test_projections_of_embeddings(tie_weight, tie_projs, d_embed):
    cfg = dataclasses.replace(
        POST, n_layer=1, d_embed=d_embed, tie_weight=tie_weight, tie_projs=(tie_projs,)
    )
    params = random_params(cfg)
    assert ("tables" in params["output"]) is not tie_weight
    assert ("projections" in params["output"]) is not tie_projs
    inputs, _ = tokens(T)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    table, projection = exact["embedding"]["tables"][0], exact["embedding"]["projections"][0]
    np.testing.assert_allclose(
        build(cfg, params).embedding(to_jax(inputs)),
        table[inputs] @ projection.T * cfg.d_model**0.5,
        rtol=1e-5,
        atol=1e-5,
    )
    hidden = np.random.default_rng(2).standard_normal((B, T, cfg.d_model))
    if not tie_projs:
        projection = exact["output"]["projections"]["0"]
    if not tie_weight:
        table = exact["output"]["tables"][0]
    logits = hidden @ projection @ table.T + exact["output"]["biases"][0]
    got = build(cfg, params).log_probs(jnp.asarray(hidden, jnp.float32))
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_as_wide_as_the_model_is_not_projected():
    for d_embed in (None, POST.d_model):
        cfg = dataclasses.replace(POST, d_embed=d_embed)
        params = abstract(cfg)[1]
        assert "projections" not in params["embedding"].keys() | params["output"].keys()


def test_loss_is_that_of_the_log_probabilities_of_the_hidden_states():
    params, memory = random_params(UNTIED), garbage(UNTIED, M)
    inputs, targets = tokens(T)
    loss, expected_memory = forward(UNTIED, params, inputs, targets, memory)

    def parts(params, memory):
        xl = build(UNTIED, params)
        hidden, memory = xl.hidden(to_jax(inputs), memory)
        return xl.log_probs(hidden), memory

    log_probs, got_memory = jax.jit(parts, compiler_options=QUICKLY)(params, memory)
    expected = -np.take_along_axis(np.asarray(log_probs), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    np.testing.assert_allclose(got_memory.hidden, expected_memory.hidden, atol=1e-5)


def test_untied_biases_that_are_equal_are_shared_ones():
    untied = dataclasses.replace(POST, untie_r=True)
    params = random_params(POST)
    copies = dict(params)
    for name in ("r_w_bias", "r_r_bias"):
        copies[name] = jnp.tile(params[name], (POST.n_layer, 1, 1))
    memory = garbage(POST, M)
    expected, _ = forward(POST, params, *tokens(T), memory)
    got, old = forward(untied, copies, *tokens(T), memory)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for name in ("r_w_bias", "r_r_bias"):
        # Each layer has its own: a change in layer 1 is seen by layer 2 and not by layer 1.
        changed = copies | {name: copies[name].at[1].add(0.5)}
        loss, new = forward(untied, changed, *tokens(T), memory)
        np.testing.assert_array_equal(new.hidden[:2], old.hidden[:2])
        assert (new.hidden[2, :, -T:] != old.hidden[2, :, -T:]).any(-1).all()
        assert (loss != got).any()


def test_bfloat16_is_close_to_float32():
    half = dataclasses.replace(PRE, dtype="bfloat16")
    params = random_params(PRE)
    inputs, targets = tokens(T)
    memory = garbage(PRE, 3)
    exact = backward(PRE, params, inputs, targets, memory)
    rounded = memory._replace(hidden=memory.hidden.astype(jnp.bfloat16))
    got = backward(half, params, inputs, targets, rounded)
    gradients = [
        [np.asarray(leaf) for leaf in jax.tree.leaves(run.gradients)] for run in (got, exact)
    ]
    assert got.loss.dtype == np.float32
    assert got.memory.hidden.dtype == Memory.empty(half, B).hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in gradients[0]} == {np.dtype("float32")}
    assert 0 < abs(got.loss - exact.loss).mean() < 0.02 * exact.loss.mean()
    for left, right in zip(*gradients, strict=True):
        assert abs(left - right).mean() < 0.1 * abs(right).max()


def test_bfloat16_logits_are_summed_in_float32():
    half = dataclasses.replace(POST, dtype="bfloat16")
    params = random_params(half)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((50, 8)), jnp.bfloat16)
    log_probs = build(half, params).log_probs(hidden)
    rounded = np.asarray(params["embedding"]["tables"][0].astype(jnp.bfloat16), np.float64)
    logits = np.asarray(hidden, np.float64) @ rounded.T + np.asarray(params["output"]["biases"][0])
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    """A mean of 100 would eat the difference between entries of a bfloat16 sum."""
    half = dataclasses.replace(POST, dtype="bfloat16")
    norm = build(half, random_params(half)).layers.norm_attention
    norm.scale[...], norm.bias[...] = jnp.ones((3, 8)), jnp.zeros((3, 8))
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal((50, 3, 8)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    expected = centred / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(jnp.float32), expected, rtol=0.01)


def test_remat_changes_memory_only():
    lean = dataclasses.replace(POST, remat=True)
    params, memory = random_params(POST), garbage(POST, 3)
    inputs, targets = tokens(T)
    expected = backward(POST, params, inputs, targets, memory)
    got = backward(lean, params, inputs, targets, memory)
    np.testing.assert_allclose(got.loss, expected.loss, atol=1e-6)
    assert_same_trees(got.gradients, expected.gradients, rtol=1e-4, atol=1e-5)

    def kept_for_backward(cfg: ModelConfig) -> int:
        def loss(params):
            return build(cfg, params)(to_jax(inputs), to_jax(targets), memory)[0].sum()

        kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    assert kept_for_backward(lean) < 0.7 * kept_for_backward(POST)


def test_layers_one_by_one_give_what_the_loop_gives(monkeypatch):
    """As GPUs have them."""
    params, memory = random_params(POST), garbage(POST, 3)
    inputs, targets = tokens(T)
    expected = backward(POST, params, inputs, targets, memory)
    monkeypatch.setattr(TransformerXL, "_unroll", lambda self: True)
    unrolled = compiled_gradient.__wrapped__(POST)
    arrays = to_jax(inputs), to_jax(targets), memory, jnp.ones(inputs.shape)
    assert "stablehlo.while" not in unrolled.lower(params, *arrays).as_text()
    (_, (loss, new)), gradients = unrolled(params, *arrays)
    got = Step(np.asarray(loss), new, gradients)
    np.testing.assert_allclose(got.loss, expected.loss, atol=1e-6)
    np.testing.assert_allclose(got.memory.hidden, expected.memory.hidden, atol=1e-6)
    assert_same_trees(got.gradients, expected.gradients, rtol=1e-4, atol=1e-5)


def test_evaluation_may_use_other_lengths_with_the_same_weights():
    params = random_params(POST)
    inputs, targets = tokens(12)
    other = dataclasses.replace(POST, tgt_len=12, mem_len=12)
    expected, _ = forward(other, params, inputs, targets, Memory.empty(other, B))
    memory = Memory.empty(POST, B)
    # Three segments of tgt_len 4: memory of 6 holds everything for the first two alone.
    losses = []
    for begin in (0, 4, 8):
        piece = np.s_[:, begin : begin + 4]
        loss, memory = forward(POST, params, inputs[piece], targets[piece], memory)
        losses.append(loss)
    np.testing.assert_allclose(np.concatenate(losses[:2], 1), expected[:, :8], atol=2e-5)
    assert (abs(losses[2] - expected[:, 8:]) > 1e-5).any()

    for unlimited in ({"clamp_len": 11}, {"same_length": True}):
        cfg = dataclasses.replace(other, **unlimited)
        loss, _ = forward(cfg, params, inputs, targets, Memory.empty(cfg, B))
        np.testing.assert_allclose(loss, expected, atol=2e-5)
    for limited, free in (
        ({"clamp_len": 3}, 4),
        ({"mem_len": 5, "same_length": True}, 5),
    ):
        cfg = dataclasses.replace(other, **limited)
        loss, _ = forward(cfg, params, inputs, targets, Memory.empty(cfg, B))
        np.testing.assert_allclose(loss[:, :free], expected[:, :free], atol=2e-5)
        assert (abs(loss[:, free:] - expected[:, free:]) > 1e-5).all()


# Dropout.


def test_dropout_is_decided_by_the_key():
    cfg = dataclasses.replace(POST, dropout=0.2, dropatt=0.2)
    params, memory = random_params(cfg), garbage(cfg, 3)
    inputs, targets = tokens(T)
    one, same, other, none = (
        forward(cfg, params, inputs, targets, memory, key)[0]
        for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).all() and (one != none).all()
    np.testing.assert_array_equal(none, forward(POST, params, inputs, targets, memory)[0])


def masks(jaxpr: Jaxpr) -> Counter[tuple[int, ...]]:
    """Shapes of what a program drops entries of, those of a loop's body once."""
    found: Counter[tuple[int, ...]] = Counter()
    for equation in jaxpr.eqns:
        called = equation.params.get("call_jaxpr")
        if called is not None and called.jaxpr.debug_info.func_name == "_dropout":
            found[equation.outvars[0].aval.shape] += 1  # pyright: ignore[reportAttributeAccessIssue]
        for part in jax.tree.leaves(list(equation.params.values())):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                found += masks(part.jaxpr if isinstance(part, ClosedJaxpr) else part)
    return found


def test_dropout_hits_what_it_hits_in_the_original():
    inputs, targets = map(to_jax, tokens(T))
    shared = {
        (B, T, 8): 4,  # embeddings and output; of each layer, attention and feed-forward
        (M + T, 8): 1,  # positions
        (B, T, 12): 1,  # of each layer, between the two feed-forward products
    }
    weights = {(B, 2, T, M + T): 1}
    for rates, expected in (
        ({"dropout": 0.2, "dropatt": 0.2}, shared | weights),
        ({"dropout": 0.2}, shared),
        ({"dropatt": 0.2}, weights),
        ({}, {}),
    ):
        xl = build(cfg := dataclasses.replace(POST, **rates), random_params(POST))
        program = jax.make_jaxpr(xl.__call__)(
            inputs, targets, Memory.empty(cfg, B), jax.random.key(0)
        )
        assert masks(program.jaxpr) == expected


def test_dropout_of_a_sequence_depends_on_its_number_alone():
    cfg = dataclasses.replace(POST, dropout=0.2, dropatt=0.2)
    params, memory, key = random_params(cfg), garbage(cfg, 3), jax.random.key(0)
    inputs, targets = map(to_jax, tokens(T))

    def run(*args):
        return build(cfg, params)(*args)

    xl = jax.jit(run, compiler_options=QUICKLY)
    whole, _ = xl(inputs, targets, memory, key)
    order = jnp.arange(B)[::-1]
    turned = Memory(memory.hidden[:, order], memory.filled)
    other, _ = xl(inputs[order], targets[order], turned, key, order)
    np.testing.assert_allclose(other[order], whole, rtol=1e-5)
    last = Memory(memory.hidden[:, -1:], memory.filled)
    alone, _ = xl(inputs[-1:], targets[-1:], last, key, jnp.asarray([B - 1]))
    np.testing.assert_allclose(alone[0], whole[-1], rtol=1e-5)
    assert (xl(inputs, targets, memory, key, jnp.arange(B) + 1)[0] != whole).all()


def test_each_dropout_has_its_own_mask_and_scale():
    """Seen through weights that show one mask each; 4 = 2 x 2 has passed two at rate 0.5."""
    cfg = dataclasses.replace(
        POST, pre_lnorm=True, dropout=0.5, mem_len=16, d_model=16, d_inner=16, n_layer=4
    )
    inputs, _ = tokens(16)
    params = jax.tree.map(jnp.zeros_like, random_params(cfg))
    layers = params["layers"]

    def run(params, key):
        xl = build(cfg, params)
        return xl.hidden(to_jax(inputs), xl.init_memory(B), key)

    hidden, key = jax.jit(run, compiler_options=QUICKLY), jax.random.key(0)

    def shares(values) -> dict[float, float]:
        found, counts = np.unique(np.asarray(values), return_counts=True)
        return dict(zip(found.tolist(), (counts / counts.sum()).tolist(), strict=True))

    def passed(**changed) -> np.ndarray:
        """What each layer but the last adds to its input."""
        told = params | {"layers": layers | changed}
        return np.diff(np.asarray(hidden(told, key)[1].hidden), axis=0)

    # Embeddings of 1 / sqrt(D), so 1: dropped before they enter memory, and again at the end.
    ones = params | {"embedding": {"tables": {0: jnp.full((V, 16), 0.25)}}}
    end, memory = hidden(ones, key)
    assert shares(np.asarray(memory.hidden)[0]) == pytest.approx({0.0: 0.5, 2.0: 0.5}, abs=0.1)
    assert shares(end) == pytest.approx({0.0: 0.75, 4.0: 0.25}, abs=0.1)

    # The feed-forward net: its output, then also what is between its products.
    out = passed(b_out=jnp.ones((4, 16)))
    assert shares(out) == pytest.approx({0.0: 0.5, 2.0: 0.5}, abs=0.1)
    assert 0.4 < (out[0] == out[1]).mean() < 0.6
    identity = jnp.tile(jnp.eye(16), (4, 1, 1))
    both = passed(b_in=jnp.ones((4, 16)), w_out=identity)
    assert shares(both) == pytest.approx({0.0: 0.75, 4.0: 0.25}, abs=0.1)

    # Attention: values of 1, averaged to 1.
    attention = passed(
        norm_attention={"scale": jnp.zeros((4, 16)), "bias": jnp.ones((4, 16))},
        w_kv=jnp.full((4, 16, 2, 2, 5), 1 / 16),
        w_o=jnp.full((4, 2, 5, 16), 1 / 10),
    )
    assert shares(attention.round(4)) == pytest.approx({0.0: 0.5, 2.0: 0.5}, abs=0.1)
    assert 0.4 < (attention[0].round(4) == attention[1].round(4)).mean() < 0.6
    assert 0.4 < (attention[0].round(4) == out[0]).mean() < 0.6


# Parameters.


@pytest.mark.parametrize("cfg", [POST, PRE, UNTIED], ids=["plain", "projected", "untied"])
def test_number_of_parameters(cfg):
    d, e, w, f = cfg.d_model, cfg.d_embed or cfg.d_model, cfg.n_head * cfg.d_head, cfg.d_inner
    layer = 5 * d * w + (2 * d * f + f + d) + 2 * 2 * d
    expected = cfg.n_layer * layer
    expected += V * e * (1 if cfg.tie_weight else 2) + V
    expected += 2 * w * (cfg.n_layer if cfg.untie_r else 1)
    if e != d:
        expected += d * e * 2
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(cfg)[1])) == expected


def test_initial_weights_are_distributed_as_the_originals():
    cfg = ModelConfig(
        n_token=300, n_layer=3, n_head=2, d_model=32, d_head=20, d_inner=50, d_embed=24,
        tie_weight=False, untie_r=True,
    )  # fmt: skip

    def draw(key):
        return nnx.to_pure_dict(nnx.state(TransformerXL(cfg, rngs=nnx.Rngs(key))))

    init = jax.jit(draw, compiler_options=QUICKLY)
    params, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_same_trees(params, same, rtol=0)
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = next(part.key for part in reversed(path) if part.key not in (0, "0"))
        entries = np.asarray(leaf, np.float64)
        assert leaf.dtype == jnp.float32
        if name in ("biases", "bias", "b_in", "b_out"):
            assert (entries == 0).all(), path
            continue
        mean = 1.0 if name == "scale" else 0.0
        std = 0.01 if name == "projections" else 0.02
        z = (entries - mean) / std
        assert abs(z.mean()) < 5 / z.size**0.5, path
        assert abs(z.std() - 1) < 5 / (2 * z.size) ** 0.5, path
        assert abs(z).max() < 6, path
        twin = functools.reduce(lambda node, part: node[part.key], path, other)
        assert (entries != np.asarray(twin)).mean() > 0.9, path
        parts += list(z) if path[0].key == "layers" or name.startswith("r_") else [z]
    # No two tensors, no two layers, start alike.
    firsts = [tuple(part.ravel()[:3].round(6)) for part in parts]
    assert len(set(firsts)) == len(firsts) == 4 + 2 * 3 + 8 * 3


def test_empty_memory_has_the_shape_of_the_config():
    xl = build(POST, random_params(POST))
    memory = xl.init_memory(5)
    assert memory.hidden.shape == (3, 5, M, 8)
    assert memory.hidden.dtype == jnp.float32
    assert memory.filled.dtype == jnp.int32 and memory.filled.shape == ()


# Bad configs.


@pytest.mark.parametrize(
    "changed, words",
    [
        *(
            ({name: value}, [name, str(value), "at least 1"])
            for name in ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "tgt_len")
            for value in (0, -1)
        ),
        ({"d_embed": 0}, ["d_embed", "at least 1"]),
        ({"d_model": 7}, ["d_model is 7", "even"]),
        ({"mem_len": -1}, ["mem_len is -1", "0 or more"]),
        ({"mem_len": 0, "same_length": True}, ["same_length", "mem_len is 0", "1 or more"]),
        ({"cutoffs": (5, 5)}, ["cutoffs are [5, 5]", "increase"]),
        ({"cutoffs": (5, 3)}, ["cutoffs are [5, 3]", "increase"]),
        ({"cutoffs": (0, 3)}, ["cutoffs are [0, 3]", "above 0"]),
        ({"cutoffs": (5, V)}, [f"cutoffs are [5, {V}]", f"{V} entries", "below"]),
        ({"div_val": 0}, ["div_val is 0", "at least 1"]),
        ({"cutoffs": (3, 5), "div_val": 4}, ["div_val 4", "cluster 2", "8 // 4**2"]),
        ({"cutoffs": (3, 5), "tie_projs": (True,)}, ["tie_projs", "1 entries", "it has 3"]),
        ({"tie_projs": (True, False)}, ["tie_projs", "2 entries"]),
        *(
            ({name: value}, [name, str(value), "[0, 1)"])
            for name in ("dropout", "dropatt")
            for value in (-0.1, 1.0, float("nan"))
        ),
    ],
)
def test_a_config_that_cannot_work_is_one_line(changed, words):
    cfg = dataclasses.replace(POST, **changed)
    with pytest.raises(UserError) as raised:
        check_model(cfg)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    with pytest.raises(UserError):
        TransformerXL(cfg, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "changed",
    [
        {"mem_len": 0},
        {"mem_len": 1, "same_length": True},
        {"d_embed": 3},
        {"dropout": 0.0, "dropatt": 0.9},
        {"clamp_len": 0},
    ],
)
def test_configs_at_the_edge_pass(changed):
    check_model(dataclasses.replace(POST, **changed))
