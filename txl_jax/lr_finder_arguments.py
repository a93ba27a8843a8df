"""The command line of `python -m txl_jax.lr_finder`."""

import math
from dataclasses import dataclass
from pathlib import Path

from txl_jax import run_folder
from txl_jax.config import Command
from txl_jax.errors import UserError

SMOOTHING = 0.9
"""Decay of the mean of losses: it trails what it follows by some ten steps."""
WARM = round(1 / (1 - SMOOTHING))
"""Steps before that mean is one of enough losses to read a slope from."""


@dataclass(frozen=True)
class Arguments(Command):
    """An experiment, and the learning rates to try on it."""

    lr_from: float = 1e-6
    """Learning rate of the first step."""
    lr_to: float = 1.0
    """Learning rate of the last step."""
    steps: int = 200
    """Steps from one to the other."""
    out: str = ""
    """Folder for the results; empty: runs/NAME-lr-finder for the config NAME."""

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.config}-lr-finder")

    def check(self) -> None:
        """Raises UserError, in one line, for the first of them that cannot work."""
        if not 0 < self.lr_from < self.lr_to < math.inf:
            raise UserError(
                f"lr_from is {self.lr_from} and lr_to {self.lr_to}; they have to be above 0, and "
                "lr_from below lr_to"
            )
        if self.steps < 2 * WARM:
            raise UserError(f"steps is {self.steps}; it has to be at least {2 * WARM}")
        if (self.folder / run_folder.CONFIG).exists():
            raise UserError(f"{self.folder} is the folder of a run; take another --out")
