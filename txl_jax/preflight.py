"""What can be known to be wrong with a run before it begins."""

import dataclasses

from jax.sharding import Mesh

from txl_jax import freeze, model, optim, precision, sharding, warm_start
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.vocab import Vocab


def check(cfg: Config, mesh: Mesh) -> None:
    """Raises UserError, in one line, for the first field that cannot work."""
    for name in ("accumulate", "max_tokens", "log_every", "eval_every"):
        if getattr(cfg.train, name) < 1:
            raise UserError(f"{name} is {getattr(cfg.train, name)}; it has to be at least 1")
    for name in ("eval_max_tokens", "sample_tokens", "checkpoint_minutes"):
        if getattr(cfg.train, name) < 0:
            raise UserError(f"{name} is {getattr(cfg.train, name)}; it has to be 0 or more")
    if cfg.train.eval_max_tokens == 1:
        raise UserError("eval_max_tokens is 1; it has to be 0 (all) or 2, one to predict, or more")
    sharding.check_batch(mesh, "batch", cfg.train.batch, cfg.train.accumulate)
    if not cfg.train.throughput:
        sharding.check_batch(mesh, "eval_batch", cfg.train.eval_batch)
    optim.check(cfg.optim)
    precision.check_device(cfg.model.dtype, mesh.devices.flat[0])
    n_token = cfg.model.n_token or max(cfg.model.cutoffs, default=0) + 1
    model.check(dataclasses.replace(cfg.model, n_token=n_token))
    freeze.check(cfg)
    warm_start.check(cfg)


def with_vocabulary(cfg: Config, vocab: Vocab) -> Config:
    """`cfg` with n_token filled in from the corpus.

    Raises UserError if another one is given, or the cutoffs do not fit it.
    """
    size = len(vocab)
    if cfg.model.n_token not in (0, size):
        raise UserError(f"n_token is {cfg.model.n_token} and the corpus has {size}; leave it at 0")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_token=size))
    model.check(cfg.model)
    return cfg
