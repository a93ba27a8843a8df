"""Batches that are made before they are needed."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, Self, TypeVar

AHEAD = 32
"""Batches made ahead, at most: some take longer than a step, as when a disk is slow to answer."""
_Item = TypeVar("_Item")


class Prefetch(Generic[_Item]):
    """Items in their order, made one after another in a thread; a context manager that ends it.

    Args:
      make: the item of a number; only the thread calls it.
      numbers: of the items, in the order in which they are taken.
      ahead: how many are made before they are taken, at most; at least 2.
    """

    def __init__(self, make: Callable[[int], _Item], numbers: Iterable[int], ahead: int = AHEAD):
        self._make, self._numbers, self._ahead = make, iter(numbers), ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._made: deque[Future[_Item]] = deque()

    def take(self) -> _Item:
        """The next item; waits until it is made. Raises what `make` raises."""
        item = self._made.popleft()
        # Many at a time: to wake the thread takes as long as to order ten.
        if 2 * len(self._made) < self._ahead:
            self._order()
        return item.result()

    def _order(self) -> None:
        for number in islice(self._numbers, self._ahead - len(self._made)):
            self._made.append(self._thread.submit(self._make, number))

    def __enter__(self) -> Self:
        self._order()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
