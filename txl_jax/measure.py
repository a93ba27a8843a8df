"""What a mean loss is called where people read it: bits per byte, or perplexity."""

import math
from collections.abc import Callable
from dataclasses import dataclass


def _bits(loss: float) -> float:
    return loss / math.log(2)


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Measure:
    """How losses of one kind of token are shown."""

    name: str
    """In a table."""
    short: str
    """In a progress line."""
    tag: str
    """In TensorBoard, after `learning/`."""
    tokens: str
    """What the tokens are, in the plural."""
    digits: int
    """Digits after the point of a result; a progress line has one less."""
    of: Callable[[float], float]
    """From a mean loss in nats for each token."""

    def progress(self, loss: float) -> str:
        """The loss as it stands in a progress line, as `bpb 2.226` or `ppl 20.09`."""
        return f"{self.short} {self.of(loss):.{self.digits - 1}f}"

    def text(self, loss: float) -> str:
        """The loss as it stands in a table, as `2.2263` or `20.086`."""
        return f"{self.of(loss):.{self.digits}f}"


BITS_PER_BYTE = Measure("bits per byte", "bpb", "bpc", "bytes", 4, _bits)
PERPLEXITY = Measure("perplexity", "ppl", "ppl", "words", 3, _perplexity)
TOKEN_PERPLEXITY = Measure("perplexity", "ppl", "ppl", "tokens", 3, _perplexity)
"""Of tokens that are neither words nor bytes. How many bits a byte has cannot be told from their
loss, and vocabularies of another size are not to be compared by it."""
