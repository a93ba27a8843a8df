"""Long texts cut into pieces, so that neither their length nor how they come decides what it takes.

A cut is where no word and no token of byte-pair encoding can reach across: before a space or a
newline that follows a character which is neither. So the tokens of the pieces, put together, are
the tokens of the whole.
"""

import re
from collections.abc import Iterable, Iterator

SIZE = 1 << 20
"""Bytes of a piece, or a few more."""
_GAP = re.compile(rb"[ \n]")
_CHARACTER = 4
"""The most bytes that a character has in UTF-8."""


def cut(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The text of `blocks` in pieces of `size` bytes, or more up to the next gap between words.

    Where they are cut depends on the text only, not on its blocks. What has no gap is in memory
    whole.
    """
    held = bytearray()
    for block in blocks:
        start, searched = 0, len(held)
        held += block
        while end := _gap(held, max(start + size, searched)):
            yield bytes(held[start:end])
            start = end
        del held[:start]
    if held:
        yield bytes(held)


def _gap(text: bytearray, start: int) -> int:
    """The first place from `start` on where the text may be cut; 0: there is none."""
    for found in _GAP.finditer(text, start):
        place = found.start()
        before = text[max(0, place - _CHARACTER) : place].decode(errors="ignore")
        if before and not before[-1].isspace():
            return place
    return 0
