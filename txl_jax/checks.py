"""What can be known to be wrong with an experiment from its fields alone.

Imports nothing heavy: the launcher checks an experiment on machines without JAX, before it costs
anything. What takes a device or the text to know, `preflight.py` checks.
"""

import dataclasses

from txl_jax.config import Config, ModelConfig, OptimConfig
from txl_jax.errors import UserError

WARM_UP = 10
"""Steps that `--throughput` does not time. The first compiles and opens the connections between
devices; the next ones find memory being set aside, and a GPU that has yet to warm up."""

_LEAST_CAPABILITY = {"float16": 6.0, "bfloat16": 8.0}
"""Compute capability from which NVIDIA's GPUs compute in a type: Pascal, Ampere."""


def check_experiment(cfg: Config, devices: int) -> None:
    """Raises UserError, in one line, for the first field that cannot work on so many devices."""
    for name in ("accumulate", "max_tokens", "log_every", "eval_every"):
        if getattr(cfg.train, name) < 1:
            raise UserError(f"{name} is {getattr(cfg.train, name)}; it has to be at least 1")
    for name in ("eval_max_tokens", "sample_tokens", "checkpoint_minutes"):
        if getattr(cfg.train, name) < 0:
            raise UserError(f"{name} is {getattr(cfg.train, name)}; it has to be 0 or more")
    if cfg.train.eval_max_tokens == 1:
        raise UserError("eval_max_tokens is 1; it has to be 0 (all) or 2, one to predict, or more")
    if not cfg.data.skip_files >= 0:
        raise UserError(f"skip_files is {cfg.data.skip_files:g}; it has to be 0 or more")
    check_batch(devices, "batch", cfg.train.batch, cfg.train.accumulate)
    if not cfg.train.throughput:
        check_batch(devices, "eval_batch", cfg.train.eval_batch)
    check_optim(cfg.optim)
    n_token = cfg.model.n_token or max(cfg.model.cutoffs, default=0) + 1
    check_model(dataclasses.replace(cfg.model, n_token=n_token))
    check_freeze(cfg)
    if cfg.train.init_upper_from and not cfg.train.init_from:
        raise UserError(
            "init_upper_from is given and init_from is not: name the run of the lower layers too"
        )


def check_batch(devices: int, name: str, batch: int, accumulate: int = 1) -> None:
    """Raises UserError unless the devices divide a batch into `accumulate` parts evenly."""
    parts = devices * accumulate
    if batch < 1 or batch % parts:
        each = f"{devices} device{'s' if devices > 1 else ''}"
        what = f"{each} x accumulate {accumulate}" if accumulate > 1 else each
        raise UserError(f"{name} is {batch}, which {what} cannot divide; use a multiple of {parts}")


def check_model(cfg: ModelConfig) -> None:
    """Raises UserError, in one line, for the first field of `cfg` that cannot work."""
    for name in ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "tgt_len"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} is {getattr(cfg, name)}; it has to be at least 1")
    if cfg.d_embed is not None and cfg.d_embed < 1:
        raise UserError(f"d_embed is {cfg.d_embed}; it has to be at least 1, or None for d_model")
    if cfg.attn_type not in (0, 1, 2, 3):
        raise UserError(f"attn_type is {cfg.attn_type}; it has to be 0, 1, 2 or 3")
    if cfg.attn_type in (0, 2) and cfg.d_model % 2:
        raise UserError(
            f"d_model is {cfg.d_model}; it has to be even, because half of a position embedding "
            "is sines and half cosines"
        )
    if cfg.mem_len < 0:
        raise UserError(f"mem_len is {cfg.mem_len}; it has to be 0 or more")
    if cfg.same_length and cfg.mem_len == 0:
        raise UserError(
            "same_length lets a query see mem_len keys and mem_len is 0; set mem_len to 1 or more, "
            "or same_length to False"
        )
    _check_attention(cfg)
    _check_clusters(cfg)
    for name in ("dropout", "dropatt"):
        if not 0.0 <= getattr(cfg, name) < 1.0:
            raise UserError(f"{name} is {getattr(cfg, name)}; it has to be in [0, 1)")


def _check_attention(cfg: ModelConfig) -> None:
    """Raises UserError for a field that cannot work with this attn_type."""
    if cfg.attn_type != 0 and cfg.untie_r:
        raise UserError(
            f"untie_r is for attn_type 0, and attn_type is {cfg.attn_type}, which shares no biases "
            "between layers; set untie_r to False"
        )
    if cfg.attn_type == 1 and cfg.clamp_len == 0:
        raise UserError(
            "clamp_len is 0; with attn_type 1 it is how many distances are told apart: at least 1, "
            "or -1 for all that were learned"
        )
    if cfg.attn_type == 3 and cfg.clamp_len >= 0:
        raise UserError(
            f"clamp_len is {cfg.clamp_len}; attn_type 3 has no distances to limit, so it has to be "
            "-1"
        )
    width = cfg.n_head * cfg.d_head
    if cfg.attn_type == 3 and width != cfg.d_model:
        raise UserError(
            f"n_head {cfg.n_head} x d_head {cfg.d_head} is {width} and d_model is {cfg.d_model}; "
            "with attn_type 3 they have to be equal, because position embeddings are added to "
            "the inputs of a layer"
        )


def _check_clusters(cfg: ModelConfig) -> None:
    """Raises UserError for a field that does not fit how the vocabulary is cut."""
    cutoffs, n = list(cfg.cutoffs), len(cfg.cutoffs)
    if cutoffs != sorted(set(cutoffs)) or min(cutoffs, default=1) < 1:
        raise UserError(f"cutoffs are {cutoffs}; they have to be above 0 and increase")
    if cutoffs and cutoffs[-1] >= cfg.n_token:
        raise UserError(
            f"cutoffs are {cutoffs} and the vocabulary has {cfg.n_token} entries; every cutoff has "
            f"to be below that"
        )
    if cfg.div_val < 1:
        raise UserError(f"div_val is {cfg.div_val}; it has to be at least 1")
    d_embed = cfg.d_embed or cfg.d_model
    for i in range(n + 1):
        if d_embed // cfg.div_val**i < 1:
            raise UserError(
                f"div_val {cfg.div_val} leaves cluster {i} embeddings of width 0 (d_embed "
                f"{d_embed} // {cfg.div_val}**{i}); use a smaller div_val or fewer cutoffs"
            )
    if cfg.tie_projs and len(cfg.tie_projs) != n + 1:
        raise UserError(
            f"tie_projs has {len(cfg.tie_projs)} entries; with {n} cutoffs it has {n + 1}, the "
            "head's first, or none for False and then True"
        )


def check_optim(cfg: OptimConfig) -> None:
    """Raises UserError, in one line, for the first field of `cfg` that cannot work."""
    if cfg.lr <= 0:
        raise UserError(f"lr is {cfg.lr}; it has to be above 0")
    for name in ("lr_batch", "warmup_tokens", "clip", "weight_decay"):
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} is {getattr(cfg, name)}; it has to be 0 (off) or more")
    for name in ("patience", "lr_min"):
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} is {getattr(cfg, name)}; it has to be 0 or more")
    for name in ("beta1", "beta2", "momentum"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"{name} is {getattr(cfg, name)}; it has to be in [0, 1)")
    if cfg.eps is not None and cfg.eps <= 0:
        raise UserError(f"eps is {cfg.eps}; it has to be above 0, or None for the optimizer's own")
    if not 0 < cfg.decay_rate < 1:
        raise UserError(f"decay_rate is {cfg.decay_rate}; it has to be above 0 and below 1")
    if not 0 <= cfg.final_lr <= 1:
        raise UserError(f"final_lr is {cfg.final_lr}, a fraction of lr; it has to be in [0, 1]")


def check_freeze(cfg: Config) -> None:
    """Raises UserError, in one line, unless the model has the layers that are to be frozen."""
    if not 0 <= cfg.optim.freeze_below <= cfg.model.n_layer:
        raise UserError(
            f"freeze_below is {cfg.optim.freeze_below}; it has to be from 0 (train all layers) to "
            f"n_layer, {cfg.model.n_layer}"
        )


def check_throughput(cfg: Config) -> None:
    """Raises UserError if a run with --throughput has no step to time, or tokens of nothing."""
    step_tokens = cfg.train.batch * cfg.model.tgt_len
    steps = -(-cfg.train.max_tokens // step_tokens)
    if steps <= WARM_UP:
        raise UserError(
            f"max_tokens {cfg.train.max_tokens} are {steps} steps, and --throughput times those "
            f"after the first {WARM_UP}: use --max-tokens {2 * WARM_UP * step_tokens} or more"
        )
    if cfg.data.dataset == "synthetic" and not cfg.model.n_token:
        raise UserError(
            "--dataset synthetic has the vocabulary that --n-token says, and that is 0: give the "
            "size of the real one (--n-token 267735 is WikiText-103's)"
        )


def check_capability(dtype: str, capability: float, device: str) -> None:
    """Raises UserError if NVIDIA's GPUs of a compute capability do not compute in `dtype`.

    `device` is what they are called.
    """
    least = _LEAST_CAPABILITY.get(dtype, 0.0)
    if capability < least:
        other = "float16" if capability >= _LEAST_CAPABILITY["float16"] else "float32"
        raise UserError(
            f"dtype is {dtype} and the device ({device}) has compute capability {capability}, and "
            f"{dtype} needs {least} or more; use --dtype {other}"
        )
