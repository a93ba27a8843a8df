"""Vocabularies: text to token ids and back.

`build` makes the vocabulary of a corpus, `save` and `load` keep it as JSON.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txl_jax.bytes_vocab import BytesVocab
from txl_jax.errors import UserError
from txl_jax.measure import Measure
from txl_jax.words_vocab import WordsVocab


class Vocab(Protocol):
    """Symbols and their ids, 0 ... len - 1."""

    measure: ClassVar[Measure]
    """What losses are shown in."""

    def __len__(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Smallest unsigned type that holds every id."""
        ...

    @property
    def start(self) -> NDArray[np.unsignedinteger]:
        """Ids, [tokens ≥ 1], after which a model begins a document."""
        ...

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Ids of a text, [tokens], of type `dtype`; UserError for symbols it does not know."""
        ...

    def decode(self, ids: ArrayLike) -> bytes:
        """Text of ids; it may begin or end inside a UTF-8 character.

        The text of ids one by one, put together, is the text of all of them.
        """
        ...

    def save(self, path: Path) -> None:
        """Writes the vocabulary as JSON, all at once; raises OSError."""
        ...


_KINDS = {kind.kind: kind for kind in (BytesVocab, WordsVocab)}


def build(kind: str, documents: Iterable[bytes]) -> Vocab:
    """The vocabulary of this kind ("bytes", "words") for a corpus, which is read once."""
    return _KINDS[kind].build(documents)


def count(kind: str, text: bytes) -> int:
    """Number of tokens that a text becomes; no vocabulary has to be built to know it."""
    return _KINDS[kind].count(text)


def load(path: Path) -> Vocab:
    """The vocabulary saved in a file; UserError where there is none or it is damaged."""
    try:
        saved = json.loads(path.read_text("utf-8"))
        return _KINDS[saved["kind"]].from_json(saved)
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a vocabulary, or is damaged: remove its folder and prepare it again"
        ) from None
