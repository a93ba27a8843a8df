"""What a corpus is: documents in three splits."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from txl_jax.errors import UserError

SPLITS = ("train", "valid", "test")
END = b"\f"
"""Ends a document that is a file: a form feed, the old sign for a new page."""


class Corpus(Protocol):
    """Text in three splits, below one folder."""

    @property
    def root(self) -> Path:
        """Folder that the files lie below."""
        ...

    @property
    def n_bytes(self) -> int:
        """Size of all files together in bytes."""
        ...

    @property
    def counted(self) -> tuple[str, ...]:
        """The splits that the vocabulary is made from."""
        ...

    @property
    def word_list(self) -> Path | None:
        """The file with the words of its vocabulary; None: the vocabulary is what occurs in it."""
        ...

    @property
    def lower_case(self) -> bool:
        """Whether capitals of its words count as small letters."""
        ...

    @property
    def line_start(self) -> bool:
        """Whether a split of words begins with the sign that ends its lines, so that every line
        stands between two.
        """
        ...

    @property
    def inputs(self) -> dict[str, Path]:
        """Every file that it is made from, by its path below the folder that holds the corpus:
        `text_dir` of the config for a folder of text, `data_dir` for a named data set.
        """
        ...

    def documents(self, split: str) -> Iterator[Iterable[bytes]]:
        """The documents of a split, in order, each in blocks, so that none need fit into memory.

        Where a block ends means nothing. A document can be read once, before the next is asked for.

        Raises UserError, as do the documents, for files that cannot be used.
        """
        ...


def check_utf8(text: bytes, path: Path, start: int = 0) -> None:
    """Raises UserError unless `text`, which begins at byte `start` of the file, is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, start + error.start) from None


def not_utf8(path: Path, offset: int) -> UserError:
    """A file that is no text from a byte on, in one line."""
    return UserError(
        f"{path} is not UTF-8 at byte offset {offset}: convert it (iconv -f LATIN1 -t UTF-8, say) "
        "or move it out of the folder"
    )


def unreadable(error: OSError, place: object) -> UserError:
    """What cannot be read, in one line: the file that the error names, `place` if it names none."""
    return UserError(f"cannot read {error.filename or place}: {error.strerror or error}")
