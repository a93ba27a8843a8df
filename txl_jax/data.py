"""Prepares a corpus: `python -m txl_jax.data prepare --dataset NAME`.

The text becomes token files below --data-dir, which every run on it then uses, and what was found
is printed. A run that finds none prepares them itself, and prints the same.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from txl_jax import corpora, findings, token_files
from txl_jax.config import DataConfig, nearest, parse_words
from txl_jax.errors import UserError, run_command
from txl_jax.folders import Folder
from txl_jax.layouts import LAYOUTS

_PROG = "python -m txl_jax.data"
_COMMANDS = ["prepare"]


@dataclass(frozen=True)
class Prepare:
    """What to prepare."""

    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object and nothing else."""
    tfds: bool = False
    """Write the documents of text, code, wiki or stdlib as a data set of tensorflow-datasets as
    well, below --data-dir, for other programs."""


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
    corpus = _folder(args.data) if args.tfds else None
    files = token_files.prepare(args.data)
    written = {"tfds": str(_written(args.data, corpus))} if corpus else {}
    if args.json:
        print(json.dumps(findings.numbers(files) | written))
    else:
        lines = (f"{what}: {folder}" for what, folder in written.items())
        print(findings.table(files), *lines, sep="\n")


def _folder(cfg: DataConfig) -> Folder:
    if cfg.dataset in LAYOUTS:
        raise UserError(
            f"--tfds is for text, code, wiki and stdlib: {cfg.dataset} becomes such a data set "
            "when it is downloaded"
        )
    corpus = corpora.open_corpus(cfg)
    assert isinstance(corpus, Folder)
    return corpus


def _written(cfg: DataConfig, corpus: Folder) -> Path:
    """Where the documents of a corpus are as a data set; they are written if that was not done."""
    # These take half a second to import, and only this needs them.
    from txl_jax import builders, locks

    data_dir = Path(cfg.data_dir)
    with locks.alone(data_dir / f".{cfg.dataset}.tfds.lock", f"fills {data_dir}"):
        return builders.prepare_documents(cfg.dataset, corpus, data_dir)


if __name__ == "__main__":
    run_command(main)
