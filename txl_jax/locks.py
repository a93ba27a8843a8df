"""One process of a machine at a time."""

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system answers that has no locks."""


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """While no other process of this machine holds the lock `path`; makes its folder.

    Waits for one that does, and says so, naming it as "another process that {what}". A lock goes
    with the process that holds it. Where the file system has no locks, this goes on without.

    Raises OSError where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"waiting for another process that {what}", file=sys.stderr)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()
