"""Corpora of source code: source trees and git checkouts.

A document is one file, in the fork's layout, where signs that code hardly ever has stand between
the parts, each on a line of its own:

    ␢
    PATH
    ₣
    CONTENT

with the path below `text_dir`. A model can thus be asked for a file of a given name. The fork
besides drops blank lines, spaces at the ends of lines, and files outside a range of lengths; here
the content stays as it is, so that every language keeps its meaning. As in the fork a file with a
line of more than 740 characters is left out: it is minified, or a table.
"""

import fnmatch
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from txl_jax import text_files
from txl_jax.config import DataConfig, nearest
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError
from txl_jax.folders import Folder, chosen, deal, is_visible
from txl_jax.text_files import NotUtf8

_BEFORE_FILE = "␢"
_BEFORE_CONTENT = "₣"
_LONGEST_LINE = 740

_LANGUAGES = {
    "c": "*.c *.h",
    "cpp": "*.cc *.cpp *.cxx *.hh *.hpp *.hxx *.h",
    "csharp": "*.cs",
    "cuda": "*.cu *.cuh",
    "fortran": "*.f *.f90 *.f95 *.f03 *.f08",
    "go": "*.go",
    "haskell": "*.hs",
    "java": "*.java",
    "javascript": "*.js *.jsx *.mjs",
    "julia": "*.jl",
    "kotlin": "*.kt",
    "lua": "*.lua",
    "perl": "*.pl *.pm",
    "php": "*.php",
    "python": "*.py *.pyi",
    "r": "*.r *.R",
    "ruby": "*.rb",
    "rust": "*.rs",
    "scala": "*.scala",
    "shell": "*.sh *.bash",
    "sql": "*.sql",
    "swift": "*.swift",
    "typescript": "*.ts *.tsx",
}


class LeftOut:
    """Files that turned out to be no source code."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._said = 0

    def add(self, name: str, reason: str) -> None:
        """Notes a file; once, however often it is read."""
        self._reasons[name] = reason

    def say(self) -> None:
        """A line on standard error, if there are more than when it was last said."""
        if len(self._reasons) > self._said:
            counts = Counter(self._reasons.values()).most_common()
            kinds = " and ".join(f"{n} {reason}" for reason, n in counts)
            tqdm.write(f"files left out: {kinds}, such as {min(self._reasons)}", file=sys.stderr)
            self._said = len(self._reasons)


@dataclass(frozen=True)
class Code(Folder):
    """Files of source code that are dealt to the splits by a hash of their names."""

    left_out: LeftOut = field(default_factory=LeftOut, compare=False)

    def documents_by_file(self, split: str) -> Iterator[tuple[str, Iterable[bytes]]]:
        """The documents of a split, as those of `Folder`.

        Files that are not UTF-8 or have too long lines are left out as well; at the end of the last
        split a line on standard error says how many.
        """
        yield from super().documents_by_file(split)
        if split == SPLITS[-1]:
            self.left_out.say()

    def _documents_of(self, name: str) -> Iterator[Iterable[bytes]]:
        content = text_files.blocks(self.root / name)
        try:
            if not text_files.is_text(content):
                return
        except NotUtf8:
            self.left_out.add(name, "not UTF-8")
            return
        if _has_long_line(text_files.characters(content)):
            self.left_out.add(name, f"with lines above {_LONGEST_LINE} characters")
            return
        head = f"{_BEFORE_FILE}\n{name}\n{_BEFORE_CONTENT}\n".encode(errors="replace")
        yield itertools.chain([head], text_files.whole_lines(content))


def _has_long_line(content: Iterable[str]) -> bool:
    """Whether a line has more than `_LONGEST_LINE` characters, its end not counted."""
    line = ""
    for some in content:
        held, start = line + some, 0
        # From the start of a line to the last end within reach: all lines up to there are short.
        while len(held) - start > _LONGEST_LINE:
            end = held.rfind("\n", start, start + _LONGEST_LINE + 1)
            if end < 0:
                return True
            start = end + 1
        line = held[start:]
    return False


def code(cfg: DataConfig) -> Code:
    """The source files below `cfg.text_dir` that `cfg.code_files` names.

    In a folder with `.git` these are files that git tracks, elsewhere all; hidden files and
    symbolic links are left out in both, so that a copy of the files is the same corpus.

    Raises UserError as `folders.chosen`, for a language that is not known, where no file fits, and
    for a checkout that git cannot read.
    """
    root, paths = chosen(cfg)
    patterns = _patterns(cfg.code_files)
    files = (file for path in paths for file in _sources(path))
    corpus = deal(Code, root, (file for file in files if _fits(file.relative_to(root), patterns)))
    if not corpus.n_bytes:
        which = f"files that fit --code-files {cfg.code_files}" if patterns else "files"
        raise UserError(f"--text-dir {cfg.text_dir} has no {which}: name a folder with source code")
    return corpus


def _patterns(words: str) -> list[str]:
    patterns = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        if any(sign in word for sign in "*?[."):
            patterns.append(word)
        elif word.lower() in _LANGUAGES:
            patterns += _LANGUAGES[word.lower()].split()
        else:
            raise UserError(
                f"--code-files: unknown language {word}{nearest(word, list(_LANGUAGES))}; known "
                f"are {', '.join(_LANGUAGES)}, and patterns such as '*.vhdl'"
            )
    return patterns


def _fits(path: Path, patterns: list[str]) -> bool:
    """A pattern with a slash is one of paths below `text_dir`, another one of names."""
    return not patterns or any(
        fnmatch.fnmatchcase(path.as_posix() if "/" in pattern else path.name, pattern)
        for pattern in patterns
    )


def _sources(path: Path) -> Iterator[Path]:
    """Files at or below path: in a checkout those that git tracks."""
    if not path.is_dir():
        if path.is_file():
            yield path
    elif (path / ".git").exists():
        for name in _tracked(path):
            if is_visible(path / name, path):
                yield from _sources(path / name)  # a folder is a submodule
    else:
        for child in path.iterdir():
            if is_visible(child, path):
                yield from _sources(child)


def _tracked(checkout: Path) -> list[str]:
    # Neither a hook of git that calls us nor a setting in the checkout may have a say in this.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(checkout), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, env=environment, capture_output=True, check=True)
    except FileNotFoundError:
        raise UserError(
            f"{checkout} is a git checkout, and git is not installed: install it"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().split("\n")[0]
        raise UserError(f"git cannot list the files of {checkout}: {reason}") from None
    return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
