"""Weights of the original PyTorch implementation, by its own names, and of what descends from it.

python -m txl_jax.interop import MODEL --logdir DIR     into the folder of a run
python -m txl_jax.interop export --logdir DIR --out FILE     back to a state dict
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from txl_jax import adaptive, foreign, model, run_folder, sharding, storage, torch_files, vocab
from txl_jax.checkpoint import Checkpoints
from txl_jax.checks import check_model
from txl_jax.config import Config, DataConfig, ModelConfig, TrainConfig, nearest, parse_words
from txl_jax.errors import UserError, run_command
from txl_jax.foreign import Foreign
from txl_jax.model import TransformerXL
from txl_jax.original_tensors import BUFFERS, aliases, sources
from txl_jax.trained import CHECKPOINTS, VOCAB, load_trained


def load_torch_state_dict(xl: TransformerXL, state_dict: Mapping[str, Any]) -> None:
    """Puts the original's weights into `xl`, in place; nothing is changed if anything is wrong.

    Args:
      xl: a model whose config has the shape of the weights.
      state_dict: the original's names → arrays or CPU tensors, as `state_dict()` gives them.

    Raises:
      UserError: names the tensors that are missing, unknown or of another shape, or that the
        config ties but that differ.
    """
    tensors = {n: np.asarray(w, np.float32) for n, w in state_dict.items() if n not in BUFFERS}
    table = list(sources(xl.cfg))
    shapes = {name: source.shape for _, source in table for name in source.names}
    tied = aliases(xl.cfg)
    wrong = [f"{n} is missing" for n in shapes if n not in tensors]
    wrong += [f"{n} is not part of this config" for n in tensors if n not in shapes | tied]
    wrong += [
        f"{n} has shape {tensors[n].shape}, expected {shape}"
        for n, shape in shapes.items()
        if n in tensors and tensors[n].shape != shape
    ]
    wrong += [
        f"{n} differs from {name}, to which this config ties it"
        for n, name in tied.items()
        if n in tensors and name in tensors and not np.array_equal(tensors[n], tensors[name])
    ]
    if wrong:
        raise UserError("these weights do not fit the model: " + "; ".join(wrong))

    new: dict[str | int, Any] = {}
    for path, source in table:
        parts = [source.convert(tensors[name]) for name in source.names]
        node: dict[str | int, Any] = new
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jnp.asarray(np.stack(parts) if source.stacked else parts[0])
    nnx.update(xl, nnx.State(new))


def torch_state_dict(cfg: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """The original's names → float32 arrays, all that its `load_state_dict` wants.

    Tied tensors are one array under both names.

    Args:
      params: parameters of a model of this config, as `model.abstract` has them.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, source in sources(cfg):
        values = params
        for part in path:
            values = values[part]
        values = np.asarray(values, np.float32)
        # Converting the places of the entries instead of the entries tells where each belongs.
        places = source.convert(np.arange(math.prod(source.shape)).reshape(source.shape))
        for name, own in zip(source.names, values if source.stacked else [values], strict=True):
            tensor = tensors.setdefault(name, np.zeros(source.shape, np.float32))
            tensor.reshape(-1)[places] = own
    tensors |= {name: tensors[source] for name, source in aliases(cfg).items()}
    if cfg.attn_type in (1, 3):  # positions are learned
        return tensors
    halves = np.arange(0, cfg.d_model, 2, dtype=np.float32) / np.float32(cfg.d_model)
    return tensors | {BUFFERS[0]: 1 / np.float32(10000) ** halves}


@dataclass(frozen=True)
class ImportArguments:
    """What to import, and what its file does not say."""

    weights: tyro.conf.Positional[str]
    """PyTorch file of the original or the fork, checkpoint of NVIDIA's version, or folder of
    Hugging Face's transfo-xl."""
    logdir: str
    """Folder to make; evaluate, generate and train's --init-from take it."""
    vocabulary: str = ""
    """File of the vocabulary, if it is not in the weights': vocab.json of a run, the original's
    cache.pt, Hugging Face's vocab.pkl, or a .txt with a word a line."""
    n_head: int | None = None
    """Attention heads."""
    cutoffs: tuple[int, ...] | None = None
    """Where the vocabulary is cut into clusters."""
    tgt_len: int | None = None
    """Tokens that are predicted in one segment."""
    mem_len: int | None = None
    """Hidden states that are remembered for each layer."""
    clamp_len: int | None = None
    """Distances beyond this count as this; -1: no limit."""
    same_length: bool | None = None
    """Let every query see exactly mem_len keys."""
    pre_lnorm: bool | None = None
    """Normalise the input of a sub-layer instead of its output."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class ExportArguments:
    """What to export, and where to."""

    logdir: str
    """Folder of the run."""
    out: str
    """File to write: a state dict that torch.load reads."""
    checkpoint: Literal["best", "latest"] = "best"
    """The step with the lowest validation loss, or the newest."""


_OPTIONS = ("n_head", "cutoffs", "tgt_len", "mem_len", "clamp_len", "same_length", "pre_lnorm")
_MUST_KNOW = ("tgt_len", "mem_len", "clamp_len", "same_length", "pre_lnorm")
"""Settings that no tensor shows."""


def model_config(found: Foreign, given: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The config of a foreign model, and the fields that nobody stated: they have their defaults.

    Args:
      given: fields that the user states; they go before those of the file.

    Raises:
      UserError: a field has to be given, or cannot be what it is.
    """
    settings = {**found.settings, **given}
    hints = get_type_hints(ModelConfig)
    if settings.get("clamp_len") == 0:
        settings["clamp_len"] = -1  # so does the original read it
    n_tails = len(found.tensors.get("crit.cluster_bias", ()))
    if "cutoffs" not in settings:
        raise UserError(
            f"the vocabulary of {settings['n_token']} is cut into {n_tails + 1} clusters, and the "
            f"file does not say where: give --cutoffs, {n_tails} of them"
        )
    if "d_head" not in settings:
        width = found.tensors["layers.0.dec_attn.o_net.weight"].shape[1]
        n_head = settings.get("n_head")
        if not n_head or width % n_head:
            raise UserError(
                f"the file does not say how many heads the {width} columns of o_net.weight are: "
                "give --n-head, a divisor of that"
            )
        settings["d_head"] = width // n_head
    for name, value in settings.items():
        if not run_folder.fits(value, hints[name]):
            raise UserError(f"the file says that {name} is {value!r}, which it cannot be")
    cfg = ModelConfig(**settings)
    check_model(cfg)
    if not adaptive.is_projected(cfg):
        cfg = dataclasses.replace(cfg, tie_projs=())
    return cfg, [name for name in _MUST_KNOW if name not in settings]


def vocabulary_json(symbols: list[str]) -> dict[str, Any]:
    """What `Vocab.save` would write for a vocabulary of another program, given by id.

    The original's enwik8 has byte values in decimal, its text8 letters and `_` for the space; both
    are bytes here. Any other vocabulary is one of words.

    Raises UserError where it is neither.
    """
    if len(set(symbols)) != len(symbols):
        raise UserError("the vocabulary has a symbol twice; each has to have one id")
    if all(symbol.isascii() and symbol.isdigit() and int(symbol) < 256 for symbol in symbols):
        return {"kind": "bytes", "values": [int(symbol) for symbol in symbols]}
    if all(symbol.isascii() and len(symbol) == 1 for symbol in symbols) and " " not in symbols:
        return {"kind": "bytes", "values": [ord(" " if s == "_" else s) for s in symbols]}
    eos = next((eos for eos in ("<eos>", "<S>") if eos in symbols), None)
    if eos is None:
        raise UserError("the vocabulary has no end of a line: neither <eos> nor <S> is in it")
    odd = next((symbol for symbol in symbols if symbol.split() != [symbol]), None)
    if odd is not None:
        raise UserError(f"the vocabulary has the symbol {odd!r}, which is not a word")
    return {"kind": "words", "eos": eos, "words": symbols}


def import_weights(args: ImportArguments, command: list[str]) -> str:
    """Makes the folder of a run from weights of another program; what was found, in a few lines.

    Raises:
      UserError: nothing is written then.
    """
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    found = foreign.read(Path(args.weights))
    cfg, unknown = model_config(found, given)
    content = _vocabulary(args, found)
    n_symbols = len(content["values" if content["kind"] == "bytes" else "words"])
    if n_symbols != cfg.n_token:
        raise UserError(f"the model has {cfg.n_token} tokens and the vocabulary {n_symbols}")
    graphdef, shapes = model.abstract(cfg)
    xl = nnx.merge(graphdef, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    load_torch_state_dict(xl, found.tensors)
    params = nnx.to_pure_dict(nnx.state(xl))
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    logdir = Path(args.logdir)
    data = dataclasses.replace(args.data, vocab=content["kind"])
    whole = Config(model=cfg, data=data, train=TrainConfig(logdir=args.logdir))
    if (logdir / run_folder.CONFIG).exists():
        raise UserError(f"{logdir} is the folder of a run already; take another --logdir")
    run_folder.open_run(logdir, whole, command=command, devices="imported")
    about = {"weights": args.weights, "kind": found.kind, "not_known": unknown}
    with run_folder.writable(logdir):
        storage.write_text(logdir / run_folder.IMPORTED, json.dumps(about, indent=2) + "\n")
        storage.write_text(logdir / VOCAB, json.dumps(content, ensure_ascii=False) + "\n")
    info = {"step": found.step, "best": math.inf, "fingerprint": None}
    with Checkpoints(logdir / CHECKPOINTS) as checkpoints:
        checkpoints.save(found.step, {"params": params}, info)
        checkpoints.save_best(found.step, {"params": params}, info)

    lines = [
        f"{args.weights}: {found.kind}; all its {len(found.tensors)} tensors, "
        f"{n_parameters:,} parameters, are in {logdir}",
        "model: " + _in_words(cfg, [f.name for f in dataclasses.fields(cfg)]),
        *found.notes,
    ]
    if unknown:
        lines.append(
            f"the file does not say, and these were taken: {_in_words(cfg, unknown)}; if one is "
            "wrong, import again with the option of its name"
        )
    return "\n".join(lines)


def _vocabulary(args: ImportArguments, found: Foreign) -> dict[str, Any]:
    path = Path(args.vocabulary)
    if path.suffix == ".json":
        vocab.load(path)
        return json.loads(path.read_text("utf-8"))
    symbols = foreign.read_symbols(path) if args.vocabulary else found.symbols
    if symbols is None:
        raise UserError(
            f"{args.weights} has no vocabulary in it: give its file with --vocabulary (the "
            "original's is cache.pt beside its data)"
        )
    return vocabulary_json(symbols)


def _in_words(cfg: ModelConfig, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(cfg, name)}" for name in names)


def export_weights(args: ExportArguments) -> str:
    """Writes the weights of a run as a state dict of the original; what was written, in words.

    Raises:
      UserError: there are none, or the file cannot be written.
    """
    trained = load_trained(args.logdir, args.checkpoint, sharding.make_mesh())
    cfg, out = trained.cfg.model, Path(args.out)
    tensors = torch_state_dict(cfg, trained.params)
    try:
        torch_files.write(out, tensors)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    shape = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "d_embed")
    shape += ("tie_weight", "div_val", "cutoffs", "pre_lnorm", "same_length", "clamp_len")
    shape += ("attn_type",)
    lines = [
        f"{out}: {len(tensors)} tensors of step {trained.step}; they fit the original's "
        f"MemTransformerLM with {_in_words(cfg, [*shape, 'tgt_len', 'mem_len'])}, "
        f"tie_projs {adaptive.tied_projections(cfg)}"
    ]
    if cfg.untie_r:
        lines.append("the original's class has no r_w_bias and r_r_bias for each layer (untie_r)")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    prog, name = "python -m txl_jax.interop", words[0] if words else "--help"
    about = __doc__ or ""
    if name == "import":
        args = parse_words(ImportArguments, None, f"{prog} import", about, words[1:])
        print(import_weights(args, [sys.executable, "-m", "txl_jax.interop", *words]))
    elif name == "export":
        print(
            export_weights(parse_words(ExportArguments, None, f"{prog} export", about, words[1:]))
        )
    elif name in ("-h", "--help"):
        print(about)
    else:
        raise UserError(f"{name!r} is neither import nor export{nearest(name, _COMMANDS)}")


_COMMANDS = ["import", "export"]

if __name__ == "__main__":
    run_command(main)
