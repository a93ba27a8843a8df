"""Files of text, read in blocks, so that a file need not fit into memory."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from txl_jax.documents import unreadable

_BLOCK = 1 << 20


class NotUtf8(Exception):
    """What was taken for text is not UTF-8."""

    def __init__(self, offset: int):
        super().__init__(f"not UTF-8 at byte offset {offset}")
        self.offset = offset
        """Where the first bytes stand that are no character."""


def blocks(path: Path) -> Iterable[bytes]:
    """The content of a file in blocks of a megabyte, as often as it is asked for.

    A file that is shorter is read once. Raises UserError where it cannot be read: here or later.
    """
    first = next(_read(path), b"")
    return [first] if len(first) < _BLOCK else _Large(path)


def characters(content: Iterable[bytes]) -> Iterator[str]:
    """The content of a file as characters, block by block; raises NotUtf8 where it is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes = 0
    for block, last in chain(((block, False) for block in content), [(b"", True)]):
        begun = len(decoder.getstate()[0])  # of a character that lies across two blocks
        try:
            yield decoder.decode(block, last)
        except UnicodeDecodeError as error:
            raise NotUtf8(n_bytes - begun + error.start) from None
        n_bytes += len(block)


def is_text(content: Iterable[bytes]) -> bool:
    """Whether a file holds text: it is not empty, and has no NUL bytes as binary files do.

    Raises NotUtf8 where it has no NUL bytes and is no text either.
    """
    empty = True
    try:
        for some in characters(content):
            if "\0" in some:
                return False
            empty = empty and not some
    except NotUtf8:
        if any(0 in block for block in content):
            return False
        raise
    return not empty


def whole_lines(content: Iterable[bytes]) -> Iterator[bytes]:
    """The content of a file, with a newline added if it does not end in one."""
    block = b""
    for block in content:
        yield block
    if not block.endswith(b"\n"):
        yield b"\n"


@dataclass(frozen=True)
class _Large:
    path: Path

    def __iter__(self) -> Iterator[bytes]:
        return _read(self.path)


def _read(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise unreadable(error, path) from None
