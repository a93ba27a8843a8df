"""Prepares a corpus: `python -m txl_jax.data prepare --dataset NAME`.

The text becomes token files below --data-dir, which every run on it then uses, and what was found
is printed. A run that finds none prepares them itself.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from txl_jax import token_files
from txl_jax.config import DataConfig, nearest, parse_words
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError, run_command
from txl_jax.token_files import TokenFiles

_PROG = "python -m txl_jax.data"
_COMMANDS = ["prepare"]


@dataclass(frozen=True)
class Prepare:
    """What to prepare."""

    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object and nothing else."""


def numbers(files: TokenFiles) -> dict[str, Any]:
    """What was found as it stands in JSON."""
    return {
        "folder": str(files.folder),
        "fingerprint": files.fingerprint,
        "vocab": files.vocab.kind,
        "vocab_size": len(files.vocab),
        "splits": {
            split: asdict(counts) | {"out_of_vocabulary": counts.unknown / counts.tokens}
            for split, counts in files.counts.items()
        },
        "commonest": [{"token": token, "count": count} for token, count in files.commonest],
    }


def table(files: TokenFiles) -> str:
    """What was found as people read it."""
    rows = [("", "documents", "tokens", "out of vocabulary")]
    for split in SPLITS:
        counts = files.counts[split]
        share = f"{counts.unknown / counts.tokens:.2%}"
        rows.append((split, f"{counts.documents:,}", f"{counts.tokens:,}", share))
    lines = [f"{a:<5}  {b:>9}  {c:>13}  {d:>17}" for a, b, c, d in rows]
    n_train = files.counts["train"].tokens
    common = ", ".join(f"{token} {count / n_train:.1%}" for token, count in files.commonest)
    lines.append(f"vocabulary ({files.vocab.kind}): {len(files.vocab):,}")
    lines.append(f"commonest in train: {common}")
    lines.append(f"token files: {files.folder}")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in ("-h", "--help"):
        command, rest = "prepare", words
    if command not in _COMMANDS:
        hint = nearest(command, _COMMANDS) if command else ""
        raise UserError(
            f"there is no command {command!r}{hint}: it is {_PROG} prepare --dataset NAME"
        )
    args = parse_words(Prepare, None, f"{_PROG} prepare", __doc__ or "", rest)
    files = token_files.prepare(args.data)
    print(json.dumps(numbers(files)) if args.json else table(files))


if __name__ == "__main__":
    run_command(main)
