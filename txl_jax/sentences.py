"""A split of sentences that follow each other in no order: every epoch has an order of its own.

As the original's `LMMultiFileIterator` on One Billion Words, which shuffles files, and sentences in
a file. Here the split is cut into chunks of about the same length; chunks change places, and
sentences within a chunk. The order follows from seed and epoch, so that every host knows it, and
from the length of chunks alone it is known which chunk any position lies in: nothing has to be
read before it, and little is in memory.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK_TOKENS = 1 << 22
"""Half of one of the original's files."""
_CACHED = 512
"""Chunks whose order is in memory, at most, 8 bytes a sentence each: more than the streams of a
process need in two epochs."""
_SEARCHED = 1 << 16


@dataclass(frozen=True)
class _Order:
    """The sentences of a chunk in the order of an epoch."""

    starts: NDArray[np.int32]
    """Where each begins, [sentences], counted from the chunk's first token."""
    ends: NDArray[np.int32]
    """How many tokens of the chunk have been read after each, [sentences]."""


class Sentences:
    """The tokens of a split as one array for each epoch; `Streams` reads slices of it.

    Every sentence ends with `eos`, and so does what stands before the first: if the split begins
    with `eos`, that token stays in its place.

    Args:
      tokens: [n], the split.
      eos: the token that ends a sentence.
      seed: of all orders.
    """

    def __init__(
        self, tokens: NDArray[np.integer], eos: int, seed: int, chunk_tokens: int = CHUNK_TOKENS
    ):
        self._tokens, self._eos, self._seed = np.asarray(tokens), eos, seed
        self._first = int(len(tokens) > 0 and tokens[0] == eos)
        bounds = [self._first]
        while bounds[-1] < len(tokens):
            bounds.append(self._after_sentence(bounds[-1] + chunk_tokens))
        self._bounds = np.array(bounds, np.int64)
        self._orders: OrderedDict[tuple[int, int], _Order] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def epoch(self, epoch: int) -> "Epoch":
        """The tokens in the order of an epoch, 0 …"""
        return Epoch(self, epoch)

    def _after_sentence(self, position: int) -> int:
        """Where the next sentence begins, at `position` or after it."""
        at = position - 1
        while at < len(self._tokens):
            found = np.flatnonzero(self._tokens[at : at + _SEARCHED] == self._eos)
            if len(found):
                return at + int(found[0]) + 1
            at += _SEARCHED
        return len(self._tokens)

    def order_of_chunks(self, epoch: int) -> NDArray[np.int64]:
        """Numbers of the chunks in the order of an epoch, [chunks]."""
        return self._random(epoch).permutation(len(self._bounds) - 1)

    def chunk_ends(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each chunk ends, [chunks], when they follow each other so."""
        return self._first + np.cumsum(np.diff(self._bounds)[order])

    def read(self, epoch: int, chunk: int, start: int, out: NDArray[np.int32]) -> int:
        """Fills `out` from the `start`-th token of a chunk on; how many tokens there were."""
        order, begin = self._order(epoch, chunk), int(self._bounds[chunk])
        stop = min(start + len(out), int(order.ends[-1]))
        # Of another type, all of them would be converted first.
        wanted = np.array([start, stop - 1], order.ends.dtype)
        first, last = np.searchsorted(order.ends, wanted, side="right")
        ends = np.minimum(order.ends[first : last + 1], stop)
        begins = np.concatenate([np.array([start]), ends[:-1]])
        # In the chunk, each sentence is as far from its place in the order as its first token is.
        before = int(order.ends[first - 1]) if first else 0
        away = order.starts[first : last + 1] - np.concatenate([np.array([before]), ends[:-1]])
        places = np.arange(start, stop) + np.repeat(begin + away, ends - begins)
        out[: stop - start] = self._tokens[places]
        return stop - start

    def first_token(self) -> int | None:
        """The token that stays in its place, if there is one."""
        return self._eos if self._first else None

    def _order(self, epoch: int, chunk: int) -> _Order:
        key = epoch, chunk
        if key not in self._orders:
            self._orders[key] = self._find_order(epoch, chunk)
            if len(self._orders) > min(_CACHED, 2 * (len(self._bounds) - 1)):
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]

    def _find_order(self, epoch: int, chunk: int) -> _Order:
        tokens = self._tokens[self._bounds[chunk] : self._bounds[chunk + 1]]
        ends = np.flatnonzero(tokens == self._eos) + 1
        if not len(ends) or ends[-1] != len(tokens):
            ends = np.append(ends, len(tokens))  # the last sentence of the split was cut off
        starts = np.concatenate([[0], ends[:-1]])
        order = self._random(epoch, chunk).permutation(len(ends))
        lengths = (ends - starts)[order]
        return _Order(starts[order].astype(np.int32), np.cumsum(lengths).astype(np.int32))

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, len(numbers), *numbers])


class Epoch:
    """The tokens of `Sentences` in the order of one epoch; only slices can be read."""

    def __init__(self, sentences: Sentences, epoch: int):
        self._sentences, self._epoch = sentences, epoch
        self._order = sentences.order_of_chunks(epoch)
        self._ends = sentences.chunk_ends(self._order)

    def __len__(self) -> int:
        return len(self._sentences)

    def prepare(self, position: int) -> None:
        """Finds the order of the chunk that a slice from `position` on begins in."""
        self[position : position + 2]  # the first token of all may lie in no chunk

    def __getitem__(self, part: slice) -> NDArray[np.int32]:
        start, stop, _ = part.indices(len(self))
        out = np.empty(max(0, stop - start), np.int32)
        done, first = 0, self._sentences.first_token()
        if first is not None and start == 0 and len(out):
            out[0], done = first, 1
        while done < len(out):
            position = start + done
            place = int(np.searchsorted(self._ends, position, side="right"))
            chunk = int(self._order[place])
            begin = int(self._ends[place - 1]) if place else int(first is not None)
            done += self._sentences.read(self._epoch, chunk, position - begin, out[done:])
        return out
