"""Weights under the original's names, from the original itself and made up."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from txl_jax.config import ModelConfig
from txl_jax.errors import UserError
from txl_jax.interop import load_torch_state_dict
from txl_jax.model import TransformerXL, abstract

REFERENCE = Path(__file__).parent / "reference"
PLAIN = ModelConfig(n_token=7, n_layer=2, n_head=2, d_model=6, d_head=5, d_inner=9)
PROJECTED = dataclasses.replace(PLAIN, d_embed=4, tie_projs=(True,))
EVERYTHING = dataclasses.replace(
    PLAIN, d_embed=4, tie_projs=(False,), tie_weight=False, untie_r=True
)
CONFIGS = pytest.mark.parametrize(
    "cfg", [PLAIN, PROJECTED, EVERYTHING], ids=["plain", "projected", "everything"]
)


def make_model(cfg: ModelConfig) -> TransformerXL:
    """A model whose parameters are all 0.5."""
    graphdef, shapes = abstract(cfg)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.full(x.shape, 0.5), shapes))


def parameters(xl: TransformerXL) -> Any:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(xl)))


def as_the_original(xl: TransformerXL) -> dict[str, np.ndarray]:
    """The original's tensors of a model, written from its definition: Linear weights [out, in]."""
    cfg, p = xl.cfg, parameters(xl)
    d = cfg.d_model
    tensors = {
        "word_emb.emb_layers.0.weight": p["embedding"]["tables"][0],
        "crit.out_layers.0.weight": p["embedding" if cfg.tie_weight else "output"]["tables"][0],
        "crit.out_layers.0.bias": p["output"]["biases"][0],
    }
    if cfg.d_embed not in (None, d):
        shared = tensors["word_emb.emb_projs.0"] = p["embedding"]["projections"][0]
        own = p["output"].get("projections", {})
        tensors["crit.out_projs.0"] = shared if cfg.tie_projs[0] else own["0"]
    if not cfg.untie_r:
        tensors |= {name: p[name] for name in ("r_w_bias", "r_r_bias")}
    for i in range(cfg.n_layer):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        # Rows of qkv_net: all queries, all keys, all values; in each, head after head.
        k, v = layer["w_kv"][:, 0], layer["w_kv"][:, 1]
        own = {
            "dec_attn.qkv_net.weight": np.concatenate(
                [w.reshape(d, -1).T for w in (layer["w_q"], k, v)]
            ),
            "dec_attn.r_net.weight": layer["w_r"].reshape(d, -1).T,
            "dec_attn.o_net.weight": layer["w_o"].reshape(-1, d).T,
            "dec_attn.layer_norm.weight": layer["norm_attention"]["scale"],
            "dec_attn.layer_norm.bias": layer["norm_attention"]["bias"],
            "pos_ff.CoreNet.0.weight": layer["w_in"].T,
            "pos_ff.CoreNet.0.bias": layer["b_in"],
            "pos_ff.CoreNet.3.weight": layer["w_out"].T,
            "pos_ff.CoreNet.3.bias": layer["b_out"],
            "pos_ff.layer_norm.weight": layer["norm_feed_forward"]["scale"],
            "pos_ff.layer_norm.bias": layer["norm_feed_forward"]["bias"],
        }
        if cfg.untie_r:
            own |= {f"dec_attn.{name}": p[name][i] for name in ("r_w_bias", "r_r_bias")}
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in own.items()}
    return tensors


def made_up(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Random tensors of these names and shapes, tied ones equal."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in as_the_original(make_model(cfg)).items()
    }
    if cfg.tie_weight:
        tensors["crit.out_layers.0.weight"] = tensors["word_emb.emb_layers.0.weight"]
    if "crit.out_projs.0" in tensors and cfg.tie_projs[0]:
        tensors["crit.out_projs.0"] = tensors["word_emb.emb_projs.0"]
    return tensors


def complaint(tensors: dict[str, Any], xl: TransformerXL) -> str:
    """What loading says; nothing may have changed by then."""
    with pytest.raises(UserError) as raised:
        load_torch_state_dict(xl, tensors)
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(parameters(xl)))
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("variant", ["a_plain_mem12", "g_untied"])
def test_the_originals_weights_come_back_as_they_were(variant):
    with np.load(REFERENCE / f"{variant}.npz") as file:
        about = json.loads(str(file["config"]))
        tensors = {
            name.removeprefix("param/"): file[name] for name in file if name.startswith("param/")
        }
    original = about["model"]
    sizes = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "tie_weight")
    xl = make_model(ModelConfig(**{name: original[name] for name in sizes}))
    load_torch_state_dict(xl, tensors)
    got = as_the_original(xl)
    tensors |= {alias: tensors[name] for alias, name in about["aliases"].items()}
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


@CONFIGS
def test_made_up_weights_come_back_as_they_were(cfg):
    tensors = made_up(cfg)
    xl = make_model(cfg)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters(xl))
    load_torch_state_dict(xl, tensors)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters(xl)) == before
    got = as_the_original(xl)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_names_of_biases_and_projections():
    names = made_up(EVERYTHING).keys()
    assert {"layers.1.dec_attn.r_w_bias", "layers.0.dec_attn.r_r_bias"} <= names
    assert not {"r_w_bias", "r_r_bias"} & names
    assert {"r_w_bias", "r_r_bias"} <= made_up(PLAIN).keys()
    assert {"word_emb.emb_projs.0", "crit.out_projs.0"} <= names
    assert not {"word_emb.emb_projs.0", "crit.out_projs.0"} & made_up(PLAIN).keys()


def test_second_names_of_tied_tensors_may_be_absent():
    tensors = made_up(PROJECTED)
    expected, got = make_model(PROJECTED), make_model(PROJECTED)
    load_torch_state_dict(expected, tensors)
    for name in ("crit.out_layers.0.weight", "crit.out_projs.0"):
        del tensors[name]
    load_torch_state_dict(got, tensors)
    jax.tree.map(np.testing.assert_array_equal, parameters(got), parameters(expected))


@CONFIGS
def test_the_buffer_of_frequencies_is_ignored(cfg):
    load_torch_state_dict(make_model(cfg), made_up(cfg) | {"pos_emb.inv_freq": np.ones(3)})


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_become_float32(dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in made_up(PLAIN).items()}
    xl = make_model(PLAIN)
    load_torch_state_dict(xl, tensors)
    for name, tensor in as_the_original(xl).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


def second_names(cfg: ModelConfig) -> set[str]:
    """Of tied tensors, which need not be there."""
    return {
        *(["crit.out_layers.0.weight"] if cfg.tie_weight else []),
        *(["crit.out_projs.0"] if cfg.tie_projs[:1] == (True,) else []),
    }


@CONFIGS
def test_each_missing_tensor_is_named(cfg):
    tensors, xl = made_up(cfg), make_model(cfg)
    for name in tensors.keys() - second_names(cfg):
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        assert f"{name} is missing" in complaint(rest, xl)


@CONFIGS
def test_each_misshapen_tensor_is_named_with_both_shapes(cfg):
    tensors, xl = made_up(cfg), make_model(cfg)
    for name in tensors.keys() - second_names(cfg):
        old = tensors[name]
        new = np.concatenate([old, old])
        message = complaint(tensors | {name: new}, xl)
        assert f"{name} has shape {new.shape}, expected {old.shape}" in message


def test_a_transposed_tensor_is_misshapen():
    tensors = made_up(PLAIN)
    name = "layers.1.pos_ff.CoreNet.0.weight"
    tensors[name] = tensors[name].T
    assert f"{name} has shape (6, 9), expected (9, 6)" in complaint(tensors, make_model(PLAIN))


@pytest.mark.parametrize(
    "cfg, extra",
    [
        (PLAIN, "crit.cluster_weight"),
        (PLAIN, "layers.2.dec_attn.o_net.weight"),
        (PLAIN, "layers.0.dec_attn.r_w_bias"),
        (PLAIN, "word_emb.emb_projs.0"),
        (PLAIN, "crit.out_projs.0"),
        (EVERYTHING, "r_w_bias"),
    ],
)
def test_an_extra_tensor_is_named(cfg, extra):
    message = complaint(made_up(cfg) | {extra: np.zeros(3)}, make_model(cfg))
    assert f"{extra} is not part of this config" in message


@pytest.mark.parametrize(
    "alias, name",
    [
        ("crit.out_layers.0.weight", "word_emb.emb_layers.0.weight"),
        ("crit.out_projs.0", "word_emb.emb_projs.0"),
    ],
)
def test_tied_tensors_that_differ_are_named(alias, name):
    tensors = made_up(PROJECTED)
    tensors[alias] = tensors[alias] + 1
    message = complaint(tensors, make_model(PROJECTED))
    assert f"{alias} differs from {name}" in message


def test_everything_that_is_wrong_is_said_at_once():
    tensors = made_up(PLAIN)
    del tensors["r_w_bias"]
    tensors["layers.0.pos_ff.CoreNet.0.bias"] = np.zeros(3)
    tensors["something"] = np.zeros(3)
    message = complaint(tensors, make_model(PLAIN))
    for name in ("r_w_bias", "layers.0.pos_ff.CoreNet.0.bias", "something"):
        assert name in message
