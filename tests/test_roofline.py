"""The account of a step against the program that JAX makes of it, and against counts by hand."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval

from bench import roofline
from bench.roofline import CARDS, Arguments, Card, Kernel, kernels, seconds, table, token_shares
from configs import test_1
from tests.tiny import ROOT
from txl_jax import metrics, optim
from txl_jax.config import ClusterConfig, Config, ModelConfig, OptimConfig, TrainConfig, load
from txl_jax.errors import UserError
from txl_jax.flops import peak_flops, train_flops_per_token
from txl_jax.model import Memory, abstract

B, T, M, D, N, H, F, V, L = 3, 8, 12, 16, 2, 4, 24, 50, 5
S, W, TOKENS = M + T, N * H, B * T
PLAIN = ModelConfig(V, L, N, D, H, F, tgt_len=T, mem_len=M, dtype="bfloat16")
PROJECTED = dataclasses.replace(PLAIN, d_embed=20)
ADAPTIVE = dataclasses.replace(PLAIN, cutoffs=(10, 30))
DIVIDED = dataclasses.replace(ADAPTIVE, div_val=4)
POSITIONS = L * 2 * (2 * S * D * W)
"""FLOPs of the keys of distances, once for all sequences, forward and for their weights."""


def config(model: ModelConfig, parts: int = 1, **settings: Any) -> Config:
    return Config(
        model=model,
        optim=OptimConfig(optim="lamb", **settings),
        train=TrainConfig(batch=2 * parts * B, accumulate=parts),
        cluster=ClusterConfig(machines=1, gpus=2),
    )


def flops(found: list[Kernel], part: str = "") -> float:
    return sum(kernel.flops for kernel in found if kernel.part.startswith(part))


def moved(found: list[Kernel], part: str = "", name: str = "") -> float:
    return sum(k.bytes for k in found if k.part.startswith(part) and k.name.startswith(name))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("model", [PLAIN, PROJECTED], ids=["plain", "projected"])
def test_parts_add_up_to_the_flops_of_training(model, parts, fused):
    """But for the keys of distances, which that number leaves out."""
    found = flops(kernels(config(model, parts), fused))
    known = parts * TOKENS * train_flops_per_token(model)
    assert found == pytest.approx(known + parts * POSITIONS, rel=1e-12)


def test_an_adaptive_softmax_scores_less():
    """Of training's FLOPs, the tails are what that number leaves out."""
    head, *tails = zip((10, 20, 20), (16, 4, 1), token_shares(DIVIDED), strict=True)
    share = 1 - sum(share for *_, share in tails)
    assert share == pytest.approx(head[2])
    scored = head[1] * (head[0] + 2) + sum(share * size * width for size, width, share in tails)
    down = D * (head[1] + sum(share * width for _, width, share in tails))
    found = kernels(config(DIVIDED), True)
    assert flops(found, "softmax") == pytest.approx(6 * TOKENS * (scored + down))
    assert flops(found, "embedding") == pytest.approx(6 * TOKENS * D * (16 + 4 + 1))
    without = train_flops_per_token(dataclasses.replace(PLAIN, n_token=1)) - 6 * D
    layers = flops(found, "attention") + flops(found, "feed-forward") - POSITIONS
    assert layers == pytest.approx(TOKENS * without)


def products(program: Any, scope: str = "", times: int = 1) -> Counter[str]:
    """FLOPs of the matrix products in a jaxpr, by the model's named scope."""
    found: Counter[str] = Counter()
    for equation in program.eqns:
        here = f"{scope}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general":
            (inner, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in inner)
            (part,) = {p for p in ("embedding", "attention", "feed_forward", "loss") if p in here}
            found[part] += times * 2 * size
        for own in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            body = getattr(own, "jaxpr", own)
            if hasattr(body, "eqns"):
                found += products(body, here, times * equation.params.get("length", 1))
    return found


@pytest.mark.parametrize("model", [PLAIN, PROJECTED], ids=["plain", "projected"])
def test_flops_of_each_part_are_those_of_the_program(model):
    graphdef, params = abstract(model)

    def loss(params, inputs, targets, memory):
        return nnx.merge(graphdef, params)(inputs, targets, memory)[0].sum()

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    memory = jax.eval_shape(lambda: Memory.empty(model, B))
    whole = jax.make_jaxpr(jax.grad(loss))(params, tokens, tokens, memory).jaxpr
    # What nothing uses is not compiled: products for the gradient of memory and of positions.
    program, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))
    found = kernels(config(model), fused=False)
    assert dict(products(program)) == {
        name: expected
        for name, part in {
            "embedding": "embedding",
            "attention": "attention",
            "feed_forward": "feed-forward",
            "loss": "softmax",
        }.items()
        if (expected := flops(found, part))
    }


@pytest.mark.parametrize("name", ["adam", "lamb", "adagrad", "sgd"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bytes_of_the_optimizer(name, momentum):
    cfg = dataclasses.replace(config(PLAIN), optim=OptimConfig(optim=name, momentum=momentum))
    _, params = abstract(PLAIN)
    state = jax.eval_shape(optim.make_optimizer(cfg).init, params)
    size = 4 * metrics.count(params)
    state_size = sum(leaf.size * 4 for leaf in jax.tree.leaves(state) if leaf.shape)
    # The gradient twice, once for its norm; the parameter in and out; the state in and out.
    expected = 2 * size + 2 * size + 2 * state_size
    if name == "lamb":
        expected += 3 * size  # the update out and in, the parameter once more
    assert moved(kernels(cfg, True), "optimizer") == expected


def test_bytes_of_a_product():
    found = kernels(config(PLAIN), True)
    once = {
        "inner, weights in 16 bits": 6 * D * F,
        "inner": 2 * (TOKENS * D + D * F + TOKENS * F),
        "inner, gradients of input": 2 * (TOKENS * F + D * F + TOKENS * D),
        "inner, gradients of weights": 2 * (TOKENS * D + TOKENS * F) + 4 * D * F,
    }
    own = {k.name: k.bytes for k in found if k.name in once}
    assert own == {name: L * size for name, size in once.items()}
    wide = kernels(config(dataclasses.replace(PLAIN, dtype="float32")), True)
    assert moved(wide, "feed-forward", "inner, weights") == 0


def test_the_kernel_moves_nothing_as_large_as_the_scores():
    def without_scores(fused: bool) -> float:
        """The second difference in tgt_len of bytes: what grows with T x S."""
        lengths = [
            moved(kernels(config(dataclasses.replace(PLAIN, tgt_len=t)), fused), "attention")
            for t in (8, 9, 10)
        ]
        return lengths[0] - 2 * lengths[1] + lengths[2]

    assert without_scores(True) == 0
    # Forward: two products of float32 written and read, weights written and read. Backward: 11
    # times 16 bits.
    assert without_scores(False) == L * B * N * 2 * (2 * 8 + 2 * 2 + 11 * 2)


def test_parts_of_a_batch_read_the_weights_again():
    one, three = (kernels(config(PLAIN, parts), True) for parts in (1, 3))
    for part in ("embedding", "attention", "feed-forward", "softmax"):
        assert moved(three, part) == 3 * moved(one, part)
    size = 4 * metrics.count(abstract(PLAIN)[1])
    assert moved(three, "optimizer") == moved(one, "optimizer") + 3 * 3 * size


def test_time_is_that_of_the_slower_of_the_two():
    card = Card("V100", 1000.0, fused=False)
    assert seconds(Kernel("", "", 125e12, 500.0), card, "float16") == (1.0, 0.5)
    assert all(peak_flops(card.name, "float16") for card in CARDS)


def test_shares_are_about_those_of_the_text():
    shares = token_shares(test_1.config().model)
    assert np.round(100 * np.array(shares), 1) == pytest.approx([95.2, 1.7, 2.8, 0.4])


def test_the_page_has_the_tables_of_today():
    page = (ROOT / "bench" / "ROOFLINE.md").read_text("utf-8")
    for name in Arguments().config:
        assert table(name, load(name)) in page


def test_the_table_has_every_part(capsys):
    roofline.main(["--config", "test_1"])
    output = capsys.readouterr().out
    assert "**test_1**, float16: 16 sequences x 384 = 6,144 tokens a step" in output
    for part in (*roofline.PARTS, "all"):
        assert f"| {part} | " in output


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("quickstart", "has no vocabulary|not known before it is read"),
        ("one_machine", "dtype is float32; peaks are known for float16 and bfloat16"),
        ("tset_1", "did you mean test_1"),
    ],
)
def test_what_has_no_account_is_one_line(words, complaint):
    with pytest.raises(UserError, match=complaint):
        roofline.main(["--config", words])


def test_other_attention_and_uneven_batches_are_refused():
    with pytest.raises(UserError, match="attn_type is 2"):
        kernels(config(dataclasses.replace(PLAIN, attn_type=2)), True)
    uneven = dataclasses.replace(config(PLAIN), train=TrainConfig(batch=7))
    with pytest.raises(UserError, match="batch of 7"):
        kernels(uneven, True)
