"""Copies checkpoints, samples or logs of a run from S3 to this machine.

With its checkpoints (the newest and the best) the copy is a folder for --logdir of
txl_jax.generate and txl_jax.evaluate.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import tyro

from launcher import lookup, objects
from launcher.aws import Account
from launcher.options import OfBucket, RunName
from txl_jax.errors import UserError

What = Literal["checkpoint", "samples", "logs", "all"]
_FILES: dict[What, str] = {
    "checkpoint": r"(config|run|vocab|imported|results)\.json",
    "samples": r"samples\.txt",
    "logs": r"metrics\.jsonl|events\.out\.tfevents\..*|config\.json|run\.json|results\.json",
    "all": r".*",
}
"""Which files of a run's folder, beside checkpoints."""
_MARKER = re.compile(r"checkpoints/(best/)?(\d+)\.(\d+)/commit\.json")
"""Without it a checkpoint does not exist."""


@dataclass(frozen=True, kw_only=True)
class Options(OfBucket):
    """Options of the command."""

    name: RunName
    """Run whose files these are."""
    what: Annotated[What, tyro.conf.Positional] = "checkpoint"
    """What to copy."""
    to: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = ""
    """Where to; empty: runs/NAME."""


def main(options: Options) -> int:
    """Exit status 0. Raises UserError if the run has left nothing of that kind yet."""
    account = Account.open(options.region)
    bucket = lookup.bucket(account, options.name, options.bucket)
    root = f"runs/{options.name}/"
    names = [key.removeprefix(root) for key in objects.written(account, bucket, root)]
    chosen = wanted(names, options.what)
    if not chosen:
        raise UserError(
            f"s3://{bucket}/{root} has no {options.what}{' files' * (options.what == 'all')} yet"
        )
    folder = Path(options.to or f"runs/{options.name}")
    objects.download(account, bucket, root, chosen, folder)
    print(f"{len(chosen)} files of {options.name} are in {folder}")
    return 0


def wanted(names: Iterable[str], what: What) -> list[str]:
    """Which of the files of a run's folder are meant; none that would come to lie outside of it.

    For a checkpoint: nothing unless a whole one is there.
    """
    names = sorted(name for name in names if _is_within(name))
    kept: list[str] = []
    if what in ("checkpoint", "all"):
        newest = list(_newest(names))
        kept = [name for name in names if name.startswith(tuple(newest))] if newest else []
        if what == "checkpoint" and not kept:
            return []
    files = re.compile(_FILES[what])
    beside = [
        name for name in names if not name.startswith("checkpoints/") and files.fullmatch(name)
    ]
    return [*beside, *kept]


def _newest(names: Iterable[str]) -> Iterable[str]:
    """Folders of the newest whole checkpoint, and of the best one."""
    newest: dict[str, tuple[int, int]] = {}
    for match in filter(None, map(_MARKER.fullmatch, names)):
        series, saved = match[1] or "", (int(match[2]), int(match[3]))
        newest[series] = max(newest.get(series, saved), saved)
    return [f"checkpoints/{series}{step}.{attempt}/" for series, (step, attempt) in newest.items()]


def _is_within(name: str) -> bool:
    """Whether a key of S3, which can be anything, names a file within a folder."""
    parts = name.split("/")
    return {"", ".", ".."}.isdisjoint(parts) and not PurePosixPath(name).is_absolute()
