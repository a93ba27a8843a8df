"""Models of other programs: their tensors under the original's names, their settings, their words.

    a file      of the original or the fork (a state dict, or the module itself), or a checkpoint of
                NVIDIA's version
    a folder    of Hugging Face's `transfo-xl`: config.json, the weights, the vocabulary

What a file does not say is read off the shapes of its tensors; what they do not show either stays
open, and is for the user to say.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from txl_jax import torch_files
from txl_jax.errors import UserError
from txl_jax.layer_norm import LAYER_NORM_EPS
from txl_jax.safe_pickle import Record

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Foreign:
    """A model of another program."""

    kind: str
    """In words, which program's."""
    tensors: Tensors
    """Under the original's names, in its layout."""
    settings: dict[str, Any]
    """Fields of a ModelConfig, as far as they are stated or follow from the tensors."""
    symbols: list[str] | None
    """The vocabulary by id, if it is there."""
    step: int = 0
    """Optimizer steps that made it, if that is known."""
    notes: tuple[str, ...] = ()
    """What it computes in another way than it will here."""


def read(path: Path) -> Foreign:
    """The model in a file or folder.

    Raises:
      UserError: there is none, it wants to run code, it is damaged, or has parts that no
        Transformer-XL of this program has.
    """
    if path.is_dir():
        return _of_hugging_face(path)
    found = torch_files.read(path)
    if isinstance(found, Mapping) and "model_state" in found:
        return _of_nvidia(path, found)
    tensors = torch_files.state_dict(found)
    if tensors is None:
        raise UserError(f"{path} holds no model: neither a state dict nor a module")
    if any(name.startswith("transformer.") for name in tensors):
        raise UserError(
            f"{path} has Hugging Face's names: give the folder that holds it and its config.json"
        )
    tensors = _original_names(tensors)
    settings = of_tensors(path, tensors)
    if not isinstance(found, Record):
        return Foreign("state dict of the original", tensors, settings, None)
    settings |= _of_module(torch_files.modules(found))
    return Foreign("module of the original", tensors, settings, None)


def of_tensors(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Fields of a ModelConfig that follow from names and shapes of tensors, the original's.

    Raises UserError where they are not those of a Transformer-XL.
    """
    layers = {int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))}
    tables = _numbered(tensors, "word_emb.emb_layers.{}.weight")
    first = "layers.0.dec_attn"
    own_biases = f"{first}.r_w_bias" in tensors
    # One of these has the heads in its shape, [..., N, H]; absolute sinusoids have none of them.
    per_head = tensors.get(f"{first}.r_w_bias" if own_biases else "r_w_bias", tensors.get("r_emb"))
    out, inner = (
        tensors.get(name) for name in (f"{first}.o_net.weight", "layers.0.pos_ff.CoreNet.0.weight")
    )
    if (
        out is None
        or inner is None
        or not tables
        or any(w.ndim != 2 for w in (out, inner, *tables))
    ):
        raise UserError(
            f"{path} holds tensors, but not those of a Transformer-XL: {first}.o_net.weight, "
            "layers.0.pos_ff.CoreNet.0.weight and word_emb.emb_layers.0.weight should be among them"
        )
    heights, widths = zip(*(table.shape for table in tables), strict=True)
    d_model, d_embed = out.shape[0], widths[0]
    settings: dict[str, Any] = {
        "n_token": sum(heights),
        "n_layer": 1 + max(layers),
        "d_model": d_model,
        "d_inner": inner.shape[0],
        "d_embed": None if d_embed == d_model else d_embed,
        "untie_r": own_biases,
    }
    if per_head is not None and per_head.ndim >= 2:
        settings |= {"n_head": per_head.shape[-2], "d_head": per_head.shape[-1]}
    if "r_emb" in tensors:
        settings["attn_type"] = 1 if "r_bias" in tensors else 3
    elif f"{first}.q_net.weight" in tensors:
        settings["attn_type"] = 2
    if len(tables) > 1:
        settings["cutoffs"] = tuple(int(edge) for edge in np.cumsum(heights)[:-1])
        settings["div_val"] = next(
            (
                div
                for div in range(2, d_embed + 1)
                if all(width == d_embed // div**i for i, width in enumerate(widths))
            ),
            1,
        )
    elif "crit.cluster_weight" in tensors:
        settings["div_val"] = 1  # one tensor for all clusters: where it is cut does not show
    else:
        # Without clusters all that div_val does is to add a projection.
        projected = "word_emb.emb_projs.0" in tensors and d_embed == d_model
        settings |= {"cutoffs": (), "div_val": 2 if projected else 1}
    settings["tie_weight"] = all(
        _same(tensors.get(f"crit.out_layers.{i}.weight"), table) for i, table in enumerate(tables)
    )
    projections = _numbered(tensors, "word_emb.emb_projs.{}")
    if projections:
        n_tails = len(tensors.get("crit.cluster_bias", ()))
        settings["tie_projs"] = tuple(
            _same(tensors.get(f"crit.out_projs.{i}"), projections[min(i, len(projections) - 1)])
            for i in range(1 + n_tails)
        )
    return settings


def _same(one: np.ndarray | None, other: np.ndarray) -> bool:
    """Whether a tensor is tied to another: it is saved under one name only, or under both."""
    return one is None or np.array_equal(one, other)


def _numbered(tensors: Tensors, name: str) -> list[np.ndarray]:
    """The tensors with the numbers 0, 1, … in their name, up to the first that is missing."""
    found = []
    while (tensor := tensors.get(name.format(len(found)))) is not None:
        found.append(tensor)
    return found


_STATED = (
    *("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "d_embed", "cutoffs"),
    *("div_val", "attn_type", "untie_r", "pre_lnorm", "tgt_len", "mem_len", "same_length"),
    *("clamp_len", "dropout", "dropatt", "init_std", "proj_init_std"),
)
"""Settings that mean there what the field of a ModelConfig of the same name means."""


def _stated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings of another program that are there and are ours."""
    found = {name: settings[name] for name in _STATED if settings.get(name) is not None}
    if found.get("d_embed") == found.get("d_model"):
        found["d_embed"] = None
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def _of_module(modules: Mapping[str, Record]) -> dict[str, Any]:
    """Fields of a ModelConfig that the original's module holds as its attributes."""

    def attribute(module: str, name: str) -> Any:
        return modules[module].attributes.get(name) if module in modules else None

    cutoffs = attribute("word_emb", "cutoffs")
    inner = {
        "cutoffs": cutoffs[:-1] if isinstance(cutoffs, list) else None,  # n_token is its last
        "div_val": attribute("word_emb", "div_val"),
        "pre_lnorm": attribute("layers.0.dec_attn", "pre_lnorm"),
        "dropout": attribute("drop", "p"),
        "dropatt": attribute("layers.0.dec_attn.dropatt", "p"),
    }
    return _stated({**modules[""].attributes, **inner})


_NVIDIAS = {
    r"crit\.out_layers_biases\.(\d+)": r"crit.out_layers.\1.bias",
    r"crit\.out_layers_weights\.(\d+)": r"crit.out_layers.\1.weight",
}


def _original_names(tensors: Tensors) -> Tensors:
    """NVIDIA's names turned into the original's, others left alone."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _NVIDIAS.items():
            name = re.sub(f"^{pattern}$", replacement, name)
        # The input's projections, a second time, for those of the output that are tied to them.
        if not name.startswith("crit.shared_out_projs."):
            renamed[name] = tensor
    return renamed


def _of_nvidia(path: Path, found: Mapping[str, Any]) -> Foreign:
    """A checkpoint of NVIDIA's version (DeepLearningExamples, PyTorch)."""
    tensors = torch_files.state_dict(found["model_state"])
    if tensors is None:
        raise UserError(f"{path} holds no model: its model_state is no state dict")
    tensors = _original_names(tensors)
    settings = of_tensors(path, tensors)
    stated = found.get("model_config")
    if isinstance(stated, Mapping):
        settings |= _stated(stated)
    step = found.get("train_step")
    notes = ("a query sees mem_len keys, one fewer than in NVIDIA's same_length",)
    return Foreign(
        "checkpoint of NVIDIA's version",
        tensors,
        settings,
        symbols_of(found.get("vocab")),
        step if isinstance(step, int) else 0,
        notes if settings.get("same_length") else (),
    )


def _of_hugging_face(folder: Path) -> Foreign:
    """A folder of Hugging Face's transfo-xl."""
    try:
        stated = json.loads((folder / "config.json").read_bytes())
        if not isinstance(stated, dict) or stated.get("model_type") != "transfo-xl":
            raise UserError(f"{folder / 'config.json'} is not that of a transfo-xl model")
    except OSError:
        raise UserError(
            f"{folder} has no config.json: a folder has to be Hugging Face's; of the original give "
            "the file, model.pt"
        ) from None
    except ValueError:
        raise UserError(f"{folder / 'config.json'} is damaged: it is not JSON") from None
    eps = stated.get("layer_norm_epsilon", LAYER_NORM_EPS)
    if eps != LAYER_NORM_EPS:
        raise UserError(f"layer_norm_epsilon is {eps} there; here it is always {LAYER_NORM_EPS}")
    if (folder / "model.safetensors").exists():
        tensors = read_safetensors(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").exists():
        tensors = torch_files.state_dict(torch_files.read(folder / "pytorch_model.bin")) or {}
    else:
        raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    tensors = _from_hugging_face({n.removeprefix("transformer."): w for n, w in tensors.items()})
    settings = of_tensors(folder, tensors) | {"zero_memory": True}
    settings |= _stated({"n_token": stated.get("vocab_size"), **stated})
    symbols = None
    for name in ("vocab.pkl", "vocab.bin", "vocab.txt"):
        if symbols is None and (folder / name).exists():
            symbols = read_symbols(folder / name)
    return Foreign("folder of Hugging Face", tensors, settings, symbols)


def _from_hugging_face(tensors: Tensors) -> Tensors:
    """The original's layout and names, where Hugging Face's differ."""
    tensors = dict(tensors)
    for name in ("crit.cluster_weight", "crit.cluster_bias"):
        # Its first tail has the first row; the original's has the last.
        if name in tensors:
            tensors[name] = tensors[name][::-1]
    for bias in ("r_w_bias", "r_r_bias"):
        if bias in tensors:  # shared by the layers, and so a second time in each of them
            others = [n for n in tensors if n.endswith(f".dec_attn.{bias}")]
            for name in others:
                if _same(tensors[name], tensors[bias]):
                    del tensors[name]
    return tensors


_SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file; bfloat16, which the library's NumPy side lacks, too.

    Raises UserError for a file that is damaged or holds other types.
    """
    try:
        content = memoryview(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:start]))
        header.pop("__metadata__", None)
        tensors = {}
        for name, about in header.items():
            begin, end = about["data_offsets"]
            values = np.frombuffer(
                content[start + begin : start + end], _SAFETENSORS[about["dtype"]]
            )
            tensors[name] = values.reshape(about["shape"])
        return tensors
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged, or has tensors that are no floats") from None


def read_symbols(path: Path) -> list[str]:
    """The vocabulary in a file of another program, by id.

    That is a text with a symbol at the beginning of each line (.txt), Hugging Face's vocab.pkl or
    vocab.bin, or the original's cache.pt.

    Raises UserError where there is none.
    """
    if path.suffix == ".txt":
        try:
            lines = path.read_text("utf-8").split("\n")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    symbols = symbols_of(torch_files.read(path))
    if symbols is None:
        raise UserError(f"{path} holds no vocabulary: no idx2sym in it")
    return symbols


def symbols_of(found: Any) -> list[str] | None:
    """The vocabulary by id in a vocabulary of the original, or what has one as its `vocab`."""
    entries = _entries(found)
    for part in (entries, _entries(entries.get("vocab"))):
        symbols = part.get("idx2sym")
        if isinstance(symbols, list) and all(isinstance(symbol, str) for symbol in symbols):
            return symbols
    return None


def _entries(found: Any) -> Mapping[str, Any]:
    entries = found.attributes if isinstance(found, Record) else found
    return entries if isinstance(entries, Mapping) else {}
