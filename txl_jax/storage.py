"""Files of a run on the local disk, written so that a reader never sees half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

DRAFT = ".tmp"
"""Ends the name of a file that is being written."""


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, for text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file in one step: a reader sees the old content or the new, never a part.

    Raises OSError where the folder cannot be written or the disk is full; the old content stays.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` in one step when the block ends.

    If the block or the disk fails, the error is raised, the new file goes and the old one stays.
    """
    draft = path.with_name(path.name + DRAFT)
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Raises OSError where nothing can be written in a folder, which need not exist yet.

    It writes and leaves nothing itself: the file that it tries has no name.
    """
    there = (path for path in (folder, *folder.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=next(there)) as trial:
        trial.write(b".")  # a full disk still takes an empty file
