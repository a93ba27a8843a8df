"""The command lines of `python -m txl_jax.scaling`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from txl_jax.config import Command
from txl_jax.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Files with lines of --throughput, - for standard input, folders of runs; also in S3."""
    out: str = "scaling.png"
    """File of the picture."""
    json: bool = False
    """Print a line of JSON and nothing else."""

    def check(self) -> None:
        """Raises UserError, in one line, for the first argument that cannot work."""
        if not self.runs:
            raise UserError("name a RUN: a file with lines of --throughput, or the folder of a run")
        out = Path(self.out).absolute()
        if not self.out or out.is_dir() or not out.parent.is_dir():
            raise UserError(f"--out {self.out} is not a file in a folder that exists")


@dataclass(frozen=True)
class CheckArguments:
    """The model beside published figures; it takes no network and no GPU."""

    json: bool = False
    """Print a line of JSON for each figure and nothing else."""


@dataclass(frozen=True)
class PredictArguments(Command):
    """An experiment, and what its speed is reckoned from; --instance-type says on which hosts."""

    measured: float | None = None
    """Tokens/s that one device was measured to make of it."""
    mfu: float | None = None
    """Without --measured: the part of a GPU's peak that computing makes use of, as
    `--throughput` prints it."""
    overlap: float = 0.0
    """Part of the communication that computing hides, from 0 to 1."""
    price: float | None = None
    """US dollars an hour of one host; None: AWS' list price on demand."""
    json: bool = False
    """Print a line of JSON and nothing else."""

    def check(self) -> None:
        """Raises UserError, in one line, for the first of them that cannot work."""
        if self.measured is not None and self.mfu is not None:
            raise UserError("--measured says what --mfu would only assume; leave one of them out")
        for name, low, high in (
            ("measured", 0.0, math.inf),
            ("mfu", 0.0, 1.0),
            ("price", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not (low < value <= high and value < math.inf):
                most = "" if high == math.inf else f" and at most {high:g}"
                raise UserError(f"{name} is {value:g}; it has to be above {low:g}{most}")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"overlap is {self.overlap:g}; it has to be from 0 to 1")
