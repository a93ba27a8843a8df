"""What a corpus is: documents in three splits."""

from collections.abc import Iterator
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
    def of_files(self) -> bool:
        """Whether `documents` gives files, each a document; otherwise it gives the blocks of one
        document, and where they end means nothing.
        """
        ...

    @property
    def inputs(self) -> dict[str, Path]:
        """Every file that it is made from, by its path below the folder that holds the corpus:
        `text_dir` of the config for a folder of text, `data_dir` for a named data set.
        """
        ...

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split, in order; one at a time is in memory.

        Raises UserError for files that cannot be used.
        """
        ...


def check_utf8(text: bytes, path: Path, start: int = 0) -> None:
    """Raises UserError unless `text`, which begins at byte `start` of the file, is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte offset {start + error.start}: convert it "
            "(iconv -f LATIN1 -t UTF-8, say) or move it out of the folder"
        ) from None


def unreadable(error: OSError) -> UserError:
    """A file that cannot be read, in one line."""
    return UserError(f"cannot read {error.filename}: {error.strerror}")
