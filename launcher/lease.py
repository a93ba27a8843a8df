"""Of all watchers of a run one acts: the one that holds the lease in the run's book.

A holder lets the book's beat grow every few seconds. Who sees it unchanged for long enough takes
the lease; no clocks are compared. Every write names the version that it replaces, so that a holder
who was away cannot write any more: it learns that it has lost the lease.
"""

import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from launcher import objects, watch_book
from launcher.aws import Account
from launcher.watch_book import Book
from txl_jax.errors import UserError

LEASE_SECONDS = 45.0
"""For which a book that does not change shows that its holder is gone."""
BEAT_SECONDS = 10.0


class Lost(UserError):
    """Another watcher acts."""


class Lease:
    """The lease of one run; a context manager that waits for it, renews it and gives it back.

    Methods raise Lost when another watcher has taken it, and UserError when S3 is away.
    """

    def __init__(
        self, account: Account, bucket: str, name: str, say: Callable[[str], None]
    ) -> None:
        self._account, self._bucket, self._name, self._say = account, bucket, name, say
        self._me = secrets.token_hex(8)
        self._book, self._version = Book(), ""
        self._written = -LEASE_SECONDS
        self._lost = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def book(self) -> Book:
        """As it was written last."""
        return self._book

    def check(self) -> None:
        """Raises Lost unless the lease is still held."""
        if self._lost or time.monotonic() - self._written > LEASE_SECONDS:
            raise Lost(f"another watcher looks after {self._name} now")

    def update(self, change: Callable[[Book], Book]) -> Book:
        """Writes what `change` makes of the book, and returns it."""
        with self._lock:
            self.check()
            self._write(change(self._book))
            return self._book

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        if not self._lost:
            with contextlib.suppress(UserError):
                self.update(lambda book: dataclasses.replace(book, holder=""))
        self._lost = True  # for what goes on in other threads

    def _take(self) -> None:
        """Waits until no other holds the lease, and takes it."""
        said, seen, since = False, "", time.monotonic()
        while True:
            book, version = watch_book.read(self._account, self._bucket, self._name)
            if version != seen:
                seen, since = version, time.monotonic()
            if not book.holder or time.monotonic() - since > LEASE_SECONDS:
                self._version = version
                try:
                    with self._lock:
                        self._write(dataclasses.replace(book, holder=self._me, beat=book.beat + 1))
                    return
                except Lost:
                    self._lost = False
                    continue
            if not said:
                said = True
                self._say(f"another watcher looks after {self._name}: waiting until it is gone")
            time.sleep(BEAT_SECONDS / 2)

    def _write(self, book: Book) -> None:
        began = time.monotonic()
        try:
            version = watch_book.write(self._account, self._bucket, self._name, book, self._version)
        except objects.Changed:
            # An earlier write may have come through whose answer was lost.
            there, version = watch_book.read(self._account, self._bucket, self._name)
            if there.holder != self._me:
                self._lost = True
                raise Lost(f"another watcher looks after {self._name} now") from None
            version = watch_book.write(self._account, self._bucket, self._name, book, version)
        self._book, self._version, self._written = book, version, began

    def _renew(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            with contextlib.suppress(UserError):  # `check` tells, if it goes on
                self.update(lambda book: dataclasses.replace(book, beat=book.beat + 1))
