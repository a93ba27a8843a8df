"""Everything that defines an experiment: frozen dataclasses, and the command line over them.

An experiment is a file `configs/NAME.py` whose function `config()` returns a `Config` and whose
docstring tells what to expect of it. `load("NAME", words)` is that `Config` with the command line's
words applied. Field names are the original's flags (`--n-layer 6`, `--n_layer=6`).

This module imports nothing heavy: the launcher reads configs on machines without JAX.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_type_hints

import tyro

from txl_jax.errors import UserError

_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer-XL; every field means what it means in the original."""

    n_token: int = 0
    """Vocabulary size V; 0: as many as the corpus has (synthetic tokens need it)."""
    n_layer: int = 4
    """Layers L."""
    n_head: int = 4
    """Attention heads N."""
    d_model: int = 128
    """Width D of the residual stream."""
    d_head: int = 32
    """Width H of a head."""
    d_inner: int = 512
    """Width F of the feed-forward layer."""
    d_embed: int | None = None
    """Width E of the embeddings; None: d_model. Another width adds projections."""
    tgt_len: int = 64
    """Tokens T that are predicted in one segment."""
    mem_len: int = 64
    """Hidden states M that are remembered for each layer."""
    zero_memory: bool = False
    """Begin with a memory full of zeros that queries see, as TensorFlow's original and Hugging Face
    do; otherwise it is empty and fills up, as the PyTorch original's."""
    same_length: bool = False
    """Let every query see exactly mem_len keys, itself included, once memory is full."""
    clamp_len: int = -1
    """Distances beyond this count as this; -1: no limit."""
    attn_type: Literal[0, 1, 2, 3] = 0
    """How positions are known. 0: relative, by sinusoids (Transformer-XL). 1: relative, by a table
    that each layer learns (Shaw et al. 2018). 2: absolute, by sinusoids (the standard Transformer
    if mem_len is 0). 3: absolute, by a table that each layer learns (Al-Rfou et al. 2018)."""
    pre_lnorm: bool = False
    """Normalise the input of a sub-layer instead of its output."""
    tie_weight: bool = True
    """Use the embedding matrix as the output matrix."""
    cutoffs: tuple[int, ...] = ()
    """Where the vocabulary is cut into clusters for adaptive input and softmax; empty: one."""
    div_val: int = 1
    """Embeddings of cluster i are d_embed / div_val**i wide; above 1 all clusters are projected."""
    tie_projs: tuple[bool, ...] = ()
    """For each cluster: use the embedding's projection at the output. Empty: False, then True."""
    untie_r: bool = False
    """Give each layer its own r_w_bias and r_r_bias instead of sharing one pair (attn_type 0)."""
    dropout: float = 0.0
    """Dropout of embeddings, positions, sub-layer outputs and the final output."""
    dropatt: float = 0.0
    """Dropout of attention weights."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    proj_init_std: float = 0.01
    """Standard deviation of the initial projections between d_embed and d_model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of activations, memory and matrix products; parameters and statistics stay float32.
    float16 trains with dynamic loss scaling."""
    remat: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations."""

    @property
    def max_klen(self) -> int:
        """Rows of the tables that attn_type 1 and 3 learn: keys that the last query may see.

        Other tgt_len and mem_len take the same tables: positions beyond them count as the furthest.
        """
        return self.tgt_len + self.mem_len


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    dataset: Literal[
        "stdlib",
        "text",
        "code",
        "wiki",
        "wikitext-103",
        "wikitext-2",
        "enwik8",
        "text8",
        "ptb",
        "ptb-char",
        "lm1b",
        "tiny_shakespeare",
        "synthetic",
    ] = "stdlib"
    """stdlib: the source files of Python's standard library; text, code, wiki: the files below
    --text-dir as text, as source code, as what wikiextractor makes of a dump of Wikipedia;
    synthetic: drawn tokens, for --throughput; the others: their own files in a folder below
    --data-dir, as the original's getdata.sh leaves them, or else downloaded."""
    text_dir: str = ""
    """For text, code and wiki: a folder, or a quoted pattern such as 'books/*/*.txt'; every UTF-8
    text file of it belongs to the corpus."""
    code_files: str = ""
    """For code: languages and patterns, such as 'python,*.cu'. Empty: all files that git tracks, or
    all that are not hidden where there is no checkout."""
    skip_files: float = 0.0
    """Documents of the train split that are passed over (files; with wiki: articles), in the order
    of the corpus; with 2.5 training begins in the middle of the third."""
    vocab: Literal["bytes", "words", "bpe"] = "bytes"
    """bytes: one token for each byte value that occurs in the corpus, as the original's enwik8;
    words: one for each word between white space, as the original's WikiText-103; bpe: byte-pair
    encoding, as GPT-2's, with --vocab-size or --vocab-file.
    """
    vocab_size: int = 0
    """For --vocab bpe: tokens of the encoding that is made from the corpus; 0: it is in
    --vocab-file."""
    vocab_file: str = ""
    """vocab.json of a run, whose vocabulary is used instead of the corpus' own; for words also a
    list with a word a line, for bpe the folder of one like GPT-2's (vocab.json and merges.txt, or
    tokenizer.json). Empty: its own."""
    data_dir: str = "data"
    """Folder of the prepared token files, and of the named data sets."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule; the schedule counts tokens, not steps."""

    optim: Literal["adam", "adamw", "sgd", "adagrad", "lamb", "optax_lamb"] = "adam"
    """Optimizer. lamb is the fork's, optax_lamb the library's; the others are PyTorch's."""
    lr: float = 1e-3
    """Highest learning rate, before any scaling by --lr-batch."""
    lr_batch: int = 0
    """Batch that lr is meant for; it is scaled by batch / lr_batch (the fork: 32), also when a run
    goes on with another batch. 0: it is not."""
    scheduler: Literal["cosine", "constant", "inv_sqrt", "dev_perf"] = "cosine"
    """Shape of the learning rate after warm-up; dev_perf lowers it when the validation loss stops
    falling."""
    warmup_tokens: int = 0
    """Tokens over which the learning rate rises from 0 in a line."""
    final_lr: float = 0.0
    """Fraction of the highest learning rate at which cosine ends (the fork: 0.1)."""
    decay_rate: float = 0.5
    """dev_perf: factor by which the learning rate is lowered."""
    patience: int = 0
    """dev_perf: validations without a lower loss that it puts up with."""
    lr_min: float = 0.0
    """dev_perf: the learning rate is not lowered beyond this."""
    beta1: float = 0.9
    """Adam, LAMB: decay of the gradient's mean."""
    beta2: float = 0.999
    """Adam, LAMB: decay of the gradient's mean square."""
    eps: float | None = None
    """Added to the root of the mean square (Adagrad: of the sum of squares); None: the original's,
    1e-8, LAMB 1e-6, Adagrad 1e-10."""
    momentum: float = 0.0
    """SGD: momentum."""
    weight_decay: float = 0.0
    """Decay of all weights; adamw and LAMB add it to the update, the others to the gradient."""
    clip: float = 0.25
    """Largest global norm of the gradient; 0: no clipping."""
    clip_nonemb: bool = False
    """Clip only the gradient of what is not embedding or softmax, by its own norm."""
    freeze_below: int = 0
    """The layers 0 … freeze_below - 1 are not trained."""

    def peak_lr(self, batch: int) -> float:
        """The highest learning rate: `lr`, scaled to `batch` where `lr_batch` says so."""
        return self.lr * (batch / self.lr_batch if self.lr_batch else 1.0)


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, how often, where."""

    batch: int = 16
    """Sequences in one optimizer step B, over all devices. A run may go on with another; what
    changes then `run_folder.open_run` and `course` say."""
    accumulate: int = 1
    """Parts into which a step's batch is split, one after another, to save memory."""
    max_tokens: int = 1_000_000
    """Tokens to train on; the run ends with the step that reaches them."""
    throughput: bool = False
    """Measure the speed of training and nothing else: no checkpoints, no evaluation, no logs."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    log_every: int = 50
    """Steps from log line to log line."""
    eval_every: int = 500
    """Steps from validation to validation; the last step is always validated."""
    eval_batch: int = 16
    """Streams into which a split is cut for evaluation, over all devices."""
    eval_max_tokens: int = 0
    """Tokens of the valid split that a validation during training reads; 0: all."""
    sample_tokens: int = 200
    """Length of the sample written at each validation; 0: none."""
    checkpoint_minutes: float = 2.0
    """Minutes from checkpoint to checkpoint; one is always saved at the end."""
    logdir: str = ""
    """Folder of the run; empty: runs/NAME for the config NAME."""
    init_from: str = ""
    """Folder of another run: start from its best parameters. Empty: from random ones."""
    init_upper_from: str = ""
    """Folder of a third run: the layers above those of --init-from are its topmost ones."""


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that the experiment is made for, and how its state lies on their devices."""

    machines: int = 1
    """Machines that the launcher starts and that plans and reports reckon with; a run itself uses
    all devices that it finds."""
    gpus: int = 1
    """Devices of each machine, for plans and reports."""
    instance_type: str = "p3dn.24xlarge"
    """Type of the EC2 instances that the launcher starts; its GPUs count there instead of gpus."""
    zero: Literal[0, 1] = 0
    """1: parameters and optimizer state are split over the devices, and gathered once a step. 0:
    every device holds them whole."""
    fsdp: bool = False
    """Split parameters and optimizer state, and gather the layers one after another, for models
    that a device cannot hold whole."""


@dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(frozen=True)
class Command:
    """The words of the command line: an experiment, and where it runs."""

    experiment: Config
    config: str = "quickstart"
    """Name of the experiment: a file of the folder configs."""
    local: bool = False
    """Train on all devices of this machine, without joining others."""


@dataclass(frozen=True)
class TrainCommand(Command):
    """The words of the trainer's command line."""

    coordinator: str = ""
    """HOST:PORT, in the private network, where process 0 listens for the others. Empty:
    JAX_COORDINATOR_ADDRESS, or what Slurm, MPI or Kubernetes say."""
    num_processes: int | None = None
    """Processes of the run, one for each machine. None: JAX_NUM_PROCESSES, or as above."""
    process_id: int | None = None
    """Number of this process, from 0. None: JAX_PROCESS_ID, or as above."""
    process_per_gpu: bool = False
    """Several processes on a machine, each with its own GPU, instead of one with all of them."""
    supervise: bool = False
    """Start the trainer again, from its last checkpoint, when it or a peer is lost."""
    max_restarts: int = 50
    """With --supervise: how often."""


_C = TypeVar("_C", bound=Command)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def experiments() -> list[str]:
    """Names of the experiments in `configs/`."""
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def parse(prog: str, words: list[str], kind: type[_C] = Command) -> _C:
    """The command line of a trainer: `--config NAME`, `--local`, and any field of the experiment.

    `kind`: a dataclass with further options, each with a default.

    `--help` prints the fields with the defaults of the experiment that is named, and exits.

    Raises:
      UserError: an unknown experiment or option (with the nearest name), or a bad value.
    """
    name = _named_config(words)
    module = _experiment(name)
    return parse_words(kind, kind(module.config(), name), prog, module.__doc__ or "", words)


def load(name: str, words: list[str] | None = None) -> Config:
    """The experiment `configs/NAME.py` with the fields that `words` override.

    Raises:
      UserError: as `parse`.
    """
    return parse(f"config {name}", ["--config", name, *(words or [])]).experiment


def parse_words(kind: type[_T], default: _T | None, prog: str, about: str, words: list[str]) -> _T:
    """An instance of the dataclass `kind` from command-line words, by tyro, errors in one line.

    Options are named after the fields, without the names of nested dataclasses. `--X` and `--no-X`
    set a bool, also one that may be None.

    Raises:
      UserError: an unknown option (with the nearest one) or a value that does not fit.
    """
    complaint = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                kind,
                prog=prog,
                description=about,
                args=_spell_out_flags(kind, words),
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
                **options,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_first_sentence(complaint.getvalue())}; see {prog} --help") from None
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        option = word.split("=")[0]
        known = ["--" + name.replace("_", "-") for name, _ in _options(kind)]
        raise UserError(
            f"unknown option {option}{nearest(option.replace('_', '-'), known)}; see {prog} --help"
        )
    return parsed


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean X?)` for the known word most like `word`; empty if none is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _options(kind: Any) -> list[tuple[str, Any]]:
    """Name and type of every field of a dataclass and of those within it."""
    options = []
    for entry, hint in get_type_hints(kind).items():
        options += _options(hint) if dataclasses.is_dataclass(hint) else [(entry, hint)]
    return options


def _spell_out_flags(kind: Any, words: list[str]) -> list[str]:
    """`words` with `--X True` for `--X` and `--X False` for `--no-X`, where X may also be None.

    tyro takes only what is never None as a flag.
    """
    spelt = []
    names = [name.replace("_", "-") for name, hint in _options(kind) if hint == bool | None]
    flags = {f"--{name}": f"--{name} True" for name in names}
    flags |= {f"--no-{name}": f"--{name} False" for name in names}
    for word, following in itertools.zip_longest(words, words[1:]):
        flag = flags.get(word.replace("_", "-"))
        spelt += flag.split() if flag and following not in ("True", "False", "None") else [word]
    return spelt


def _named_config(words: list[str]) -> str:
    name = Command.config
    for place, word in enumerate(words):
        if word == "--config" and place + 1 < len(words):
            name = words[place + 1]
        if word.startswith("--config="):
            name = word.removeprefix("--config=")
    return name


def _experiment(name: str) -> ModuleType:
    known = experiments()
    if name not in known:
        raise UserError(
            f"there is no config {name!r}{nearest(name, known)}; there are: {', '.join(known)}"
        )
    return importlib.import_module(f"configs.{name}")


def _first_sentence(complaint: str) -> str:
    """What tyro says is wrong, without the box and the advice that it draws around it."""
    lines = [re.sub("[│╭╮╰╯]", "", line).strip() for line in complaint.splitlines()]
    text = itertools.takewhile(lambda line: not line.startswith("──"), lines[1:])
    return " ".join(text).strip().rstrip(".")
