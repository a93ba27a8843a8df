"""Strings that end a text, found wherever they begin and end in tokens (Aho and Corasick 1975).

Letters: S states, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from txl_jax.errors import UserError
from txl_jax.vocab import Vocab

ENDED = -1
"""Stands in `StopStrings.table` for the end of the text."""


class StopStrings:
    """An automaton that reads a text byte by byte and notices the first of some strings.

    Its state is the longest end of the text that is the beginning of a string; state 0 is none.

    Raises:
      UserError: a string is empty.
    """

    step: np.ndarray
    """int32 [S, 256]: the next state after a byte."""
    depth: np.ndarray
    """int32 [S]: how many bytes at the end of the text may yet become a string."""
    found: np.ndarray
    """int32 [S]: length of the longest string that ends here; 0: none does."""

    def __init__(self, strings: Sequence[bytes]):
        if not all(strings):
            raise UserError("a stop string is empty; it has to have at least one character")
        children: list[dict[int, int]] = [{}]
        depth, found = [0], [0]
        for string in strings:
            state = 0
            for byte in string:
                if byte not in children[state]:
                    children[state][byte] = len(children)
                    children.append({})
                    depth.append(depth[state] + 1)
                    found.append(0)
                state = children[state][byte]
            found[state] = len(string)
        self.step = np.zeros((len(children), 256), np.int32)
        shorter = [0] * len(children)  # the longest proper end of a state that is a state
        waiting = deque([0])
        while waiting:
            state = waiting.popleft()
            self.step[state] = self.step[shorter[state]]
            found[state] = found[state] or found[shorter[state]]
            for byte, child in children[state].items():
                shorter[child] = self.step[state, byte]
                self.step[state, byte] = child
                waiting.append(child)
        self.depth, self.found = np.asarray(depth, np.int32), np.asarray(found, np.int32)

    def table(self, vocab: Vocab) -> np.ndarray:
        """int32 [S, V]: the next state after a token; `ENDED` where a string ends in its text."""
        pieces = [vocab.decode([token]) for token in range(len(vocab))]
        lengths = np.asarray([len(piece) for piece in pieces])
        longest = int(lengths.max())
        text = np.zeros((len(pieces), longest), np.uint8)
        for row, piece in zip(text, pieces, strict=True):
            row[: len(piece)] = np.frombuffer(piece, np.uint8)
        states = len(self.step)
        table = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(pieces), axis=1)
        for place in range(longest):
            tokens = np.flatnonzero(lengths > place)
            before = table[:, tokens]
            after = self.step[before, text[tokens, place]]
            after = np.where(self.found[after] > 0, ENDED, after)
            table[:, tokens] = np.where(before == ENDED, ENDED, after)
        return table


class StoppedText:
    """A text that arrives in pieces and ends before the first stop string would be shown.

    The first is the one that is whole first; of several that end at the same byte, the longest.
    """

    def __init__(self, stops: StopStrings):
        self._stops, self._state, self._held = stops, 0, b""
        self.ended = False
        """Whether a stop string has come."""

    def add(self, piece: bytes) -> bytes:
        """What can be shown now that `piece` has come: all that no stop string can begin in."""
        text = self._held + piece
        for place in range(len(self._held), len(text)):
            self._state = int(self._stops.step[self._state, text[place]])
            if length := int(self._stops.found[self._state]):
                self.ended, self._held = True, b""
                return text[: place + 1 - length]
        shown = len(text) - int(self._stops.depth[self._state])
        self._held = text[shown:]
        return text[:shown]

    def rest(self) -> bytes:
        """What was held back, once no more is to come."""
        rest, self._held = self._held, b""
        return rest
