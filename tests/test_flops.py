import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from txl_jax.config import ModelConfig
from txl_jax.flops import peak_flops, train_flops_per_token, utilization
from txl_jax.model import Memory, abstract

T, M, D, N, H, F, V, E = 24, 40, 160, 2, 64, 384, 320, 192
PLAIN = ModelConfig(
    n_token=V, n_layer=1, n_head=N, d_model=D, d_head=H, d_inner=F, tgt_len=T, mem_len=M
)
PROJECTED = dataclasses.replace(PLAIN, d_embed=E)
ABSOLUTE = dataclasses.replace(PLAIN, attn_type=2)
CONFIGS = pytest.mark.parametrize(
    "cfg", [PLAIN, PROJECTED, ABSOLUTE], ids=["plain", "projected", "absolute"]
)


def products(cfg: ModelConfig) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of every matrix product in the forward pass of one sequence."""
    tgt_len, keys, d_embed = cfg.tgt_len, cfg.mem_len + cfg.tgt_len, cfg.d_embed or cfg.d_model
    d, n, h, f = cfg.d_model, cfg.n_head, cfg.d_head, cfg.d_inner
    layer = [
        (tgt_len, d, n * h),  # queries
        (keys, d, n * h),  # keys
        (keys, d, n * h),  # values
        *[(tgt_len, h, keys)] * n,  # content scores
        *[(tgt_len, h, keys)] * (n if cfg.attn_type < 2 else 0),  # position scores
        *[(tgt_len, keys, h)] * n,  # weighted values
        (tgt_len, n * h, d),
        (tgt_len, d, f),
        (tgt_len, f, d),
    ]
    ends = [(tgt_len, d_embed, cfg.n_token)]
    if d_embed != d:
        ends += [(tgt_len, d_embed, d), (tgt_len, d, d_embed)]
    return cfg.n_layer * layer + ends


@CONFIGS
@pytest.mark.parametrize("n_layer, mem_len", [(1, M), (3, M), (2, 0)])
def test_flops_are_those_of_the_products(cfg, n_layer, mem_len):
    cfg = dataclasses.replace(cfg, n_layer=n_layer, mem_len=mem_len)
    forward = sum(2 * rows * inner * columns for rows, inner, columns in products(cfg))
    into_memory = n_layer * 2 * mem_len * D * 2 * N * H
    assert train_flops_per_token(cfg) == pytest.approx((3 * forward - into_memory) / cfg.tgt_len)


def test_of_an_adaptive_softmax_the_head_counts():
    """Its own words, and a row for each of the other clusters."""
    adaptive = dataclasses.replace(PLAIN, cutoffs=(100, 200))
    head = dataclasses.replace(PLAIN, n_token=102)
    assert train_flops_per_token(adaptive) == train_flops_per_token(head)
    projected = train_flops_per_token(dataclasses.replace(adaptive, div_val=2))
    assert projected == train_flops_per_token(adaptive) + 3 * 2 * 2 * D * D


def test_remat_and_dropout_do_not_count():
    same = dataclasses.replace(PLAIN, remat=True, dropout=0.1, untie_r=True, tie_weight=False)
    assert train_flops_per_token(same) == train_flops_per_token(PLAIN)


@CONFIGS
def test_flops_are_about_those_that_xla_counts(cfg):
    """One layer, since XLA counts the body of a loop once; the rest is what is no product.

    In 16 bits, as in float32 scores are computed twice, which is no work of the model's.
    """
    cfg, batch = dataclasses.replace(cfg, dtype="bfloat16"), 16
    graphdef, params = abstract(cfg)

    def loss(params, inputs, targets, memory):
        return nnx.merge(graphdef, params)(inputs, targets, memory)[0].sum()

    tokens = jax.ShapeDtypeStruct((batch, cfg.tgt_len), jnp.int32)
    memory = jax.eval_shape(lambda: Memory.empty(cfg, batch))
    expected = train_flops_per_token(cfg) * batch * cfg.tgt_len
    into_memory = batch * 2 * M * D * 2 * N * H
    for function, flops in ((loss, (expected + into_memory) / 3), (jax.grad(loss), expected)):
        cost: Any = jax.jit(function).lower(params, tokens, tokens, memory).cost_analysis()
        assert cost["flops"] == pytest.approx(flops, rel=0.03)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_known_for_16_bits_on_known_devices(kind, peak):
    assert peak_flops(kind, "bfloat16") == peak
    assert peak_flops(kind, "float32") is None


def test_utilization_is_the_share_of_all_devices_peaks():
    def used(kind: str, dtype: str) -> float | None:
        mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * 8))
        return utilization(dataclasses.replace(PLAIN, dtype=dtype), 1000.0, mesh)

    flops = 1000 * train_flops_per_token(PLAIN)
    assert used("NVIDIA H200", "bfloat16") == pytest.approx(flops / (8 * 989e12))
    assert used("NVIDIA H200", "float32") is None
    assert used("cpu", "bfloat16") is None
