"""Where a run's files are kept for good: a folder that all processes see, or a bucket.

A logdir is a folder, or `s3://BUCKET/FOLDER`. The files of the latter are written to a folder of
this machine first, its spool.
"""

import os
import random
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from txl_jax import storage
from txl_jax.errors import UserError

PATIENCE = 600.0
"""Seconds that the start of a run waits for a store that is away."""
_LONGEST_PAUSE = 30.0
_SPOOLS = Path("runs")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

_T = TypeVar("_T")


class Store(Protocol):
    """Files by name, as `checkpoints/120/0/manifest.json`; each appears whole or not at all.

    Every method raises FileNotFoundError for a name that is absent, and StoreAway or StoreRefused,
    whose text is one line, if the store cannot be reached or refuses; then the caller may try
    again. What is wrong with a local file is another OSError.
    """

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files whose name begins with `prefix`, sorted."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a file."""
        ...

    def upload(self, name: str, path: Path) -> None:
        """Makes or replaces a file with the content of a local one."""
        ...

    def download(self, name: str, path: Path) -> None:
        """Copies a file to a local path, whose folder is made if need be; whole or not at all."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Removes files; those that are absent already are none to it."""
        ...

    def stop(self) -> None:
        """Has what other threads are about in this store fail within seconds, with StoreAway.

        A store that was stopped does nothing more.
        """
        ...


class StoreAway(OSError):
    """The store was not reached, or cannot do its work for now; the text says why."""


class StoreRefused(OSError):
    """The store was reached and says no until somebody changes something; the text says what."""


class Folder:
    """A store that is a folder of this machine, or one that all machines share."""

    def __init__(self, folder: Path):
        self._folder = folder

    def names(self, prefix: str = "") -> list[str]:
        """As `Store.names`."""
        within = self._folder / prefix.rpartition("/")[0]
        files = (Path(root, name) for root, _, names in os.walk(within) for name in names)
        found = (path.relative_to(self._folder).as_posix() for path in files)
        return sorted(
            name for name in found if name.startswith(prefix) and not name.endswith(storage.DRAFT)
        )

    def read(self, name: str) -> bytes:
        """As `Store.read`."""
        return (self._folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """As `Store.write`."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(path, content)

    def upload(self, name: str, path: Path) -> None:
        """As `Store.upload`; a file that is its own copy already is left as it is."""
        _copy(path, self._folder / name)

    def download(self, name: str, path: Path) -> None:
        """As `Store.download`; a file that is its own copy already is left as it is."""
        _copy(self._folder / name, path)

    def delete(self, names: Iterable[str]) -> None:
        """As `Store.delete`; folders that become empty go too."""
        for name in names:
            path = self._folder / name
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self._folder).parents[:-1]:
                try:
                    (self._folder / folder).rmdir()
                except OSError:
                    break  # it is not empty, or is gone

    def stop(self) -> None:
        """As `Store.stop`; a folder's files take no time that would be worth it."""


class Patient:
    """A store to read from at a start: one that is away is asked again, for `PATIENCE` seconds.

    Methods raise UserError if it stays away, or refuses, and FileNotFoundError as the store does.
    """

    def __init__(self, store: Store):
        self._store = store
        self.write, self.upload = store.write, store.upload
        self.delete, self.stop = store.delete, store.stop

    def names(self, prefix: str = "") -> list[str]:
        """As `Store.names`."""
        return patiently(lambda: self._store.names(prefix))

    def read(self, name: str) -> bytes:
        """As `Store.read`."""
        return patiently(lambda: self._store.read(name))

    def download(self, name: str, path: Path) -> None:
        """As `Store.download`."""
        return patiently(lambda: self._store.download(name, path))


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as content:
        if target.exists() and target.samefile(source):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(target) as copy:
            shutil.copyfileobj(content, copy, 1 << 20)


def is_remote(logdir: str) -> bool:
    """Whether `logdir` is a URL, as s3://BUCKET/FOLDER, and no folder of this machine."""
    return "://" in logdir


def local_folder(logdir: str) -> Path:
    """The folder of this machine where a run's files are written: `logdir` itself, or its spool.

    That of s3://BUCKET/FOLDER is runs/BUCKET/FOLDER. Raises UserError for a malformed URL.
    """
    return _SPOOLS.joinpath(*_bucket_and_folder(logdir)) if is_remote(logdir) else Path(logdir)


def open_store(logdir: str) -> Store:
    """The store of the run in `logdir`; nothing is asked of it yet.

    Raises UserError for a malformed URL, or settings of AWS that cannot be read.
    """
    if not is_remote(logdir):
        return Folder(Path(logdir))
    bucket, folder = _bucket_and_folder(logdir)
    from txl_jax.bucket import Bucket  # boto3 takes a moment, and a local run needs none of it

    return Bucket(bucket, folder)


def _bucket_and_folder(url: str) -> tuple[str, str]:
    scheme, _, rest = url.partition("://")
    bucket, _, folder = rest.partition("/")
    folder = folder.rstrip("/")
    if scheme != "s3":
        raise UserError(f"--logdir {url}: a run is kept in a folder or in s3://BUCKET/FOLDER")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(
            f"--logdir {url}: {bucket!r} is no name of a bucket (3 to 63 lower-case letters, "
            "digits, dots and hyphens); write s3://BUCKET/FOLDER"
        )
    if not folder:
        raise UserError(
            f"--logdir {url} names a bucket and no folder in it, where TensorBoard would find the "
            f"run; write s3://{bucket}/FOLDER"
        )
    if not {"", ".", ".."}.isdisjoint(folder.split("/")):
        raise UserError(f"--logdir {url}: no part of a folder's name may be empty, '.' or '..'")
    return bucket, folder


def check_store(store: Store, patience: float = PATIENCE) -> None:
    """Writes, lists, reads and deletes a file of one byte: a run needs all of these.

    Raises UserError if the store refuses one of them, or is away for `patience` seconds.
    """
    name = f".trial-{uuid.uuid4().hex}"

    def attempt() -> None:
        store.write(name, b".")
        store.names(name)
        store.read(name)
        store.delete([name])

    patiently(attempt, patience)


def patiently(attempt: Callable[[], _T], patience: float = PATIENCE) -> _T:
    """What `attempt` returns once the store can be reached; for the start of a run.

    An OSError of the store is said once on standard error and tried again, for `patience` seconds.

    Raises UserError if the store refuses, or is away still; FileNotFoundError as it comes.
    """
    deadline = time.monotonic() + patience
    pause, said = 1.0, False
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except StoreRefused as error:
            raise UserError(str(error)) from error
        except OSError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"S3 is away ({error}); check the network, and AWS_ENDPOINT_URL if it is set, "
                    "and give the same command again"
                ) from error
            if not said:
                print(
                    f"S3 is away ({error}): trying again for {left:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
                said = True
        time.sleep(min(random.uniform(0, pause), left))
        pause = min(2 * pause, _LONGEST_PAUSE)
