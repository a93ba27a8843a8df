"""What can be known to be wrong with a run before it begins."""

import dataclasses

from jax.sharding import Mesh

from txl_jax import precision
from txl_jax.checks import check_experiment, check_model
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.vocab import Vocab


def check(cfg: Config, mesh: Mesh) -> None:
    """Raises UserError, in one line, for the first field that cannot work."""
    check_experiment(cfg, mesh.devices.size)
    precision.check_device(cfg.model.dtype, mesh.devices.flat[0])


def with_vocabulary(cfg: Config, vocab: Vocab) -> Config:
    """`cfg` with n_token filled in from the corpus.

    Raises UserError if another one is given, or the cutoffs do not fit it.
    """
    size = len(vocab)
    if cfg.model.n_token not in (0, size):
        raise UserError(f"n_token is {cfg.model.n_token} and the corpus has {size}; leave it at 0")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_token=size))
    check_model(cfg.model)
    return cfg
