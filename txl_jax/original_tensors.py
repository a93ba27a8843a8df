"""Which tensors of the original PyTorch model the parameters of this one are.

A parameter here is sometimes several of the original's tensors (the layers are stacked) and
sometimes a part of one (queries, keys and values are one matrix there; with div_val 1 all clusters
of the vocabulary are one table).

Letters: D d_model, E d_embed, N heads, H d_head, F d_inner, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from txl_jax import adaptive
from txl_jax.config import ModelConfig

BUFFERS = ("pos_emb.inv_freq",)
"""What the original saves beside its parameters."""


class Source(NamedTuple):
    """Where one parameter of a TransformerXL comes from."""

    names: tuple[str, ...]
    """The original's tensors, one for each layer if the parameter is stacked over layers."""
    shape: tuple[int, ...]
    """Shape of each of these tensors."""
    stacked: bool
    """Whether the parameter has a leading axis over layers."""
    convert: Callable[[np.ndarray], np.ndarray]
    """From the original's layout to ours; it selects and moves entries, no more."""


def sources(cfg: ModelConfig) -> Iterator[tuple[tuple[str | int, ...], Source]]:
    """(path of the parameter, its source) for every parameter of a model of this config."""
    width = cfg.n_head * cfg.d_head
    heads = (cfg.n_head, cfg.d_head)

    def single(path, name, *shape):
        return path, Source((name,), shape, False, lambda w: w)

    def stacked(path, name, shape, convert=lambda w: w):
        names = tuple(f"layers.{i}.{name}" for i in range(cfg.n_layer))
        return path, Source(names, shape, True, convert)

    def heads_last(w):
        return w.T.reshape(-1, *heads)

    parts = adaptive.clusters(cfg)
    for i, part in enumerate(parts):
        # With div_val 1 the original keeps all clusters in one tensor.
        tensor, first = (0, part.start) if cfg.div_val == 1 else (i, 0)
        rows = slice(first, first + part.stop - part.start)
        height = cfg.n_token if cfg.div_val == 1 else rows.stop

        def of_cluster(path, name, *shape, i=i, rows=rows):
            return (*path, i), Source((name,), shape, False, lambda w: w[rows])

        embedding = f"word_emb.emb_layers.{tensor}.weight"
        yield of_cluster(("embedding", "tables"), embedding, height, part.width)
        yield of_cluster(("output", "biases"), f"crit.out_layers.{tensor}.bias", height)
        if not cfg.tie_weight:
            output = f"crit.out_layers.{tensor}.weight"
            yield of_cluster(("output", "tables"), output, height, part.width)
    if len(parts) > 1:
        n_tails = len(parts) - 1
        weight, bias = "crit.cluster_weight", "crit.cluster_bias"
        yield single(("output", "cluster_weight"), weight, n_tails, parts[0].width)
        yield single(("output", "cluster_bias"), bias, n_tails)
    if adaptive.is_projected(cfg):
        tied = adaptive.tied_projections(cfg)
        for i, part in enumerate(parts):
            shape = (cfg.d_model, part.width)
            if i == 0 or cfg.div_val > 1:
                path = ("embedding", "projections", i)
                yield single(path, f"word_emb.emb_projs.{i}", *shape)
            if not tied[i]:
                path = ("output", "projections", str(i))
                yield single(path, f"crit.out_projs.{i}", *shape)
    if cfg.attn_type == 0:
        for bias in ("r_w_bias", "r_r_bias"):
            if cfg.untie_r:
                yield stacked((bias,), f"dec_attn.{bias}", heads)
            else:
                yield single((bias,), bias, *heads)
        yield stacked(("layers", "w_r"), "dec_attn.r_net.weight", (width, cfg.d_model), heads_last)
    # Here the original keeps all layers in one tensor, as this model does.
    if cfg.attn_type in (1, 3):
        yield single(("layers", "r_emb"), "r_emb", cfg.n_layer, cfg.max_klen, *heads)
    if cfg.attn_type == 1:
        yield single(("layers", "r_w_bias"), "r_w_bias", cfg.n_layer, *heads)
        yield single(("layers", "r_bias"), "r_bias", cfg.n_layer, cfg.max_klen, cfg.n_head)
    if cfg.attn_type in (0, 1):
        q = kv = ("dec_attn.qkv_net.weight", (3 * width, cfg.d_model))
        q_rows, kv_rows = slice(width), slice(width, None)
    else:
        q = ("dec_attn.q_net.weight", (width, cfg.d_model))
        kv = ("dec_attn.kv_net.weight", (2 * width, cfg.d_model))
        q_rows = kv_rows = slice(None)
    yield stacked(("layers", "w_q"), *q, lambda w: heads_last(w[q_rows]))
    yield stacked(("layers", "w_kv"), *kv, lambda w: w[kv_rows].T.reshape(cfg.d_model, 2, *heads))
    yield stacked(
        ("layers", "w_o"),
        "dec_attn.o_net.weight",
        (cfg.d_model, width),
        lambda w: w.T.reshape(*heads, cfg.d_model),
    )
    transpose = np.transpose
    d, f = cfg.d_model, cfg.d_inner
    yield stacked(("layers", "w_in"), "pos_ff.CoreNet.0.weight", (f, d), transpose)
    yield stacked(("layers", "b_in"), "pos_ff.CoreNet.0.bias", (f,))
    yield stacked(("layers", "w_out"), "pos_ff.CoreNet.3.weight", (d, f), transpose)
    yield stacked(("layers", "b_out"), "pos_ff.CoreNet.3.bias", (d,))
    for norm, name in (("norm_attention", "dec_attn"), ("norm_feed_forward", "pos_ff")):
        yield stacked(("layers", norm, "scale"), f"{name}.layer_norm.weight", (d,))
        yield stacked(("layers", norm, "bias"), f"{name}.layer_norm.bias", (d,))


def aliases(cfg: ModelConfig) -> dict[str, str]:
    """The original's second names for tied tensors → the name they are read under."""
    tied = {}
    parts = adaptive.clusters(cfg)
    if cfg.tie_weight:
        for i in range(1 if cfg.div_val == 1 else len(parts)):
            tied[f"crit.out_layers.{i}.weight"] = f"word_emb.emb_layers.{i}.weight"
    if adaptive.is_projected(cfg):
        for i, is_tied in enumerate(adaptive.tied_projections(cfg)):
            if is_tied:
                source = 0 if cfg.div_val == 1 else i
                tied[f"crit.out_projs.{i}"] = f"word_emb.emb_projs.{source}"
    return tied
