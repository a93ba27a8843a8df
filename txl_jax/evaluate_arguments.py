"""The command line of `python -m txl_jax.evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from txl_jax.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """What to evaluate, and how.

    Settings that are not given are those of the preset, or else those of the training.
    """

    logdir: str
    """Folder of the run."""
    split: Literal["train", "valid", "test"] | None = None
    """Part of the corpus; None: test, if there is no --text."""
    text: str = ""
    """File to evaluate instead of a part of the corpus."""
    checkpoint: Literal["best", "latest"] = "best"
    """The step with the lowest validation loss, or the newest."""
    batch: int | None = None
    """Streams into which the text is cut, over all devices."""
    preset: str = ""
    """The paper's evaluation settings, by config: wt103_base, wt103_large, enwik8_base …"""
    tgt_len: int | None = None
    """Tokens that are predicted in one segment."""
    mem_len: int | None = None
    """Hidden states that are remembered for each layer."""
    clamp_len: int | None = None
    """Distances beyond this count as this; -1: no limit."""
    same_length: bool | None = None
    """Let every query see exactly mem_len keys."""
    reset_every: int | None = None
    """Empty memory before every n-th segment; None: never."""
    sweep: tuple[int, ...] = ()
    """Lengths of memory: a table of scores, and a PNG of perplexity against mem_len."""
    out: str = ""
    """File of that PNG; empty: sweep-TEXT.png in the run's folder."""
    accuracy: bool = True
    """Also accuracy@1, accuracy@5 and MRR@5, which take the whole softmax for every token."""
    json: bool = False
    """Print a line of JSON (with --sweep one for each length) and nothing else."""

    def check(self) -> None:
        """Raises UserError, in one line, for the first argument that cannot work."""
        if self.split and self.text:
            raise UserError("--split and --text are two texts; leave one of them out")
        if self.sweep and self.mem_len is not None:
            raise UserError("--sweep says which mem_len there are; leave --mem-len out")
        if self.out and not self.sweep:
            raise UserError(
                "--out names the picture of a sweep; add --sweep, as in --sweep 0 64 128"
            )
        if self.out and (Path(self.out).is_dir() or not Path(self.out).absolute().parent.is_dir()):
            raise UserError(f"--out {self.out} is not a file in a folder that exists")
