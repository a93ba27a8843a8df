"""Prepares a corpus: `python -m txl_jax.data prepare --dataset NAME`.

The text becomes token files below --data-dir, which every run on it then uses, and what was found
is printed. A run that finds none prepares them itself, and prints the same.
"""

import json
from dataclasses import dataclass, field

from txl_jax import findings, token_files
from txl_jax.config import DataConfig, nearest, parse_words
from txl_jax.errors import UserError, run_command

_PROG = "python -m txl_jax.data"
_COMMANDS = ["prepare"]


@dataclass(frozen=True)
class Prepare:
    """What to prepare."""

    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object and nothing else."""


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
    print(json.dumps(findings.numbers(files)) if args.json else findings.table(files))


if __name__ == "__main__":
    run_command(main)
