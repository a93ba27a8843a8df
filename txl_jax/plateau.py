"""The schedule dev_perf: the learning rate falls when the validation loss stops falling."""

import math
from typing import NamedTuple

import jax
import numpy as np

from txl_jax.config import Config

THRESHOLD = 1e-4
"""A loss counts as lower if it is so by this fraction (PyTorch's default)."""


class Plateau(NamedTuple):
    """What the schedule knows of the validations so far."""

    scale: jax.Array
    """float32: what the learning rate is multiplied by."""
    best: jax.Array
    """float32: lowest validation loss; infinite before the first."""
    bad: jax.Array
    """int32: validations since then that were not lower, or since the rate was lowered."""


def begin(cfg: Config) -> Plateau | None:
    """The state before any validation, as NumPy scalars; None with another schedule."""
    if cfg.optim.scheduler != "dev_perf":
        return None
    return Plateau(np.float32(1), np.float32(math.inf), np.int32(0))  # pyright: ignore[reportArgumentType]


def after_validation(cfg: Config, plateau: Plateau, loss: float) -> Plateau:
    """The state after a validation, as NumPy scalars.

    As PyTorch's ReduceLROnPlateau, which the original uses: after more than `patience` validations
    in a row without a lower loss the rate is multiplied by `decay_rate`, but not below `lr_min`.
    """
    scale, best, bad = float(plateau.scale), float(plateau.best), int(plateau.bad)
    if loss < best * (1 - THRESHOLD):
        best, bad = loss, 0
    else:
        bad += 1
    if bad > cfg.optim.patience:
        floor = cfg.optim.lr_min / cfg.optim.peak_lr(cfg.train.batch)
        scale, bad = min(scale, max(scale * cfg.optim.decay_rate, floor)), 0
    return Plateau(np.float32(scale), np.float32(best), np.int32(bad))  # pyright: ignore[reportArgumentType]
