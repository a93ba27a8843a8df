"""Files of a run on the local disk, written so that a reader never sees half of one."""

import contextlib
import fcntl
import glob
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

DRAFT = ".tmp"
"""Ends the name of a file that is being written."""
_LEFT_SECONDS = 3600.0
"""A draft that has not grown for so long is one of a killed process."""


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, for text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file in one step: a reader sees the old content or the new, never a part.

    Raises OSError where the folder cannot be written or the disk is full; the old content stays.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` in one step when the block ends.

    If the block or the disk fails, the error is raised, the new file goes and the old one stays.
    """
    with _open_draft(path) as file:
        draft = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def _open_draft(path: Path) -> BinaryIO:
    """An empty file beside `path` that no other process writes.

    It has a fixed name, so that the next writer takes what a killed one has left. While another
    process writes that one, or where it cannot be known as there are no locks, it has a name of
    its own.
    """
    fixed = path.with_name(path.name + DRAFT)
    file = open(fixed, "wb", opener=_open_as_it_is)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have got its place, or have gone, between opening and locking.
        if os.path.samestat(os.fstat(file.fileno()), fixed.stat()):
            file.truncate(0)
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # no locks, and so nobody writes it
        fixed.unlink(missing_ok=True)
    file.close()
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{DRAFT}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                left.unlink()
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{DRAFT}").open("xb")


def _open_as_it_is(name: str, flags: int) -> int:
    return os.open(name, flags & ~os.O_TRUNC, 0o666)


def check_writable(folder: Path) -> None:
    """Raises OSError where nothing can be written in a folder, which need not exist yet.

    It writes and leaves nothing itself: the file that it tries has no name.
    """
    there = (path for path in (folder, *folder.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=next(there)) as trial:
        trial.write(b".")  # a full disk still takes an empty file
