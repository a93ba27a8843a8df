"""Vocabularies: text to token ids and back.

`build` makes the vocabulary of a corpus, `save` and `load` keep it as JSON.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txl_jax import storage
from txl_jax.errors import UserError


class Vocab(Protocol):
    """Symbols and their ids, 0 ... len - 1."""

    def __len__(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Smallest unsigned type that holds every id."""
        ...

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Ids of a text, [tokens], of type `dtype`; UserError for symbols it does not know."""
        ...

    def decode(self, ids: ArrayLike) -> bytes:
        """Text of ids; it may begin or end inside a UTF-8 character."""
        ...

    def save(self, path: Path) -> None:
        """Writes the vocabulary as JSON, all at once; raises OSError."""
        ...


@dataclass(frozen=True)
class BytesVocab:
    """One symbol for each byte value that occurs in the corpus, as the original's enwik8 (204)."""

    kind: ClassVar[str] = "bytes"
    values: bytes
    """The byte values; a value's place is its id. `build` puts them in ascending order."""

    @classmethod
    def build(cls, documents: Iterable[bytes]) -> Self:
        """The vocabulary of all bytes in documents."""
        values = b""
        for text in documents:
            values = bytes(sorted({*values, *text.translate(None, delete=values)}))
        return cls(values)

    @classmethod
    def from_json(cls, saved: dict) -> Self:
        """The vocabulary that `save` wrote; ValueError, KeyError or TypeError for anything else."""
        values = bytes(list(saved["values"]))
        if not values or len(set(values)) != len(values):
            raise ValueError("no values, or one of them twice")
        return cls(values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint8)

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        if unknown := text.translate(None, delete=self.values):
            at = text.index(unknown[0])
            before = len(text[:at].decode(errors="ignore"))
            raise UserError(
                f"byte 0x{unknown[0]:02X} of {text.decode(errors='replace')[before]!r} (at byte "
                f"offset {at}) is not among the vocabulary's {len(self)} byte values: use only "
                "characters that the corpus has"
            )
        to_ids = bytes.maketrans(self.values, bytes(range(len(self))))
        return np.frombuffer(text.translate(to_ids), np.uint8)

    def decode(self, ids: ArrayLike) -> bytes:
        return np.frombuffer(self.values, np.uint8)[np.asarray(ids, np.intp)].tobytes()

    def save(self, path: Path) -> None:
        content = {"kind": self.kind, "values": list(self.values)}
        storage.write_text(path, json.dumps(content) + "\n")


_KINDS = {kind.kind: kind for kind in (BytesVocab,)}


def build(kind: str, documents: Iterable[bytes]) -> Vocab:
    """The vocabulary of this kind ("bytes") for a corpus, which is read once."""
    return _KINDS[kind].build(documents)


def load(path: Path) -> Vocab:
    """The vocabulary saved in a file; UserError where there is none or it is damaged."""
    try:
        saved = json.loads(path.read_text())
        return _KINDS[saved["kind"]].from_json(saved)
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a vocabulary, or is damaged: remove its folder and prepare it again"
        ) from None
