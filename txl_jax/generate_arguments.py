"""The command line of `python -m txl_jax.generate`."""

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from txl_jax.decoding import Beam, Sampling
from txl_jax.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """What to write."""

    logdir: str
    """Folder of the run."""
    prompt: str = ""
    """Text to continue; empty: start a document."""
    prompt_file: str = ""
    """File whose whole text is continued, its last newline too; -: standard input."""
    tokens: int = 200
    """How many tokens to write."""
    samples: int = 1
    """How many texts to write, each drawn on its own."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text ends before this string; may be given several times."""
    json: bool = False
    """Print each text as one line of JSON, without the prompt."""
    checkpoint: Literal["best", "latest"] = "best"
    """The step with the lowest validation loss, or the newest."""
    mem_len: int | None = None
    """Hidden states that are remembered for each layer; None: as in training."""
    seed: int = 0
    """The same seed writes the same text."""
    sampling: Sampling = field(default_factory=Sampling)
    search: Beam = field(default_factory=Beam)

    def check(self) -> None:
        """Raises UserError, in one line, for the first field that cannot work."""
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt-file both give a prompt; leave one of them out")
        for name in ("tokens", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        self.sampling.check()
        self.search.check()
        if self.search.beam:
            drawing = [("samples", self.samples, 1)] + [
                (name, value, getattr(Sampling(), name))
                for name, value in dataclasses.asdict(self.sampling).items()
            ]
            for name, value, default in drawing:
                if value != default:
                    raise UserError(
                        f"{name} is {value}, which is for drawing samples, and beam search draws "
                        "none; leave it or --beam out"
                    )

    def read_prompt(self) -> bytes:
        """The text to continue; UserError where its file cannot be read."""
        if not self.prompt_file:
            return os.fsencode(self.prompt)
        if self.prompt_file == "-":
            return sys.stdin.buffer.read()
        try:
            return Path(self.prompt_file).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the prompt from {self.prompt_file}: {error.strerror}"
            ) from None
