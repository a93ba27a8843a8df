"""Vocabulary of bytes."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txl_jax import storage
from txl_jax.documents import END
from txl_jax.errors import UserError
from txl_jax.measure import BITS_PER_BYTE, Measure


@dataclass(frozen=True)
class BytesVocab:
    """One symbol for each byte value that occurs in the corpus, as the original's enwik8 (204)."""

    kind: ClassVar[str] = "bytes"
    measure: ClassVar[Measure] = BITS_PER_BYTE
    values: bytes
    """The byte values; a value's place is its id. `build` puts them in ascending order."""

    @classmethod
    def build(cls, texts: Iterable[bytes]) -> Self:
        """The vocabulary of all bytes in texts."""
        values = b""
        for text in texts:
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

    @property
    def unknown(self) -> int | None:
        return None

    @property
    def start(self) -> NDArray[np.unsignedinteger]:
        # Corpora that are one long text have no END, and text8 has no newline either.
        signs = (sign for sign in (END, b"\n", b" ") if sign in self.values)
        return self.encode(next(signs, self.values[:1]))

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

    def encode_each(
        self, texts: Iterable[bytes], processes: int
    ) -> Iterator[NDArray[np.unsignedinteger]]:
        # Translating takes less time than it would to hand the text to other processes.
        return map(self.encode, texts)

    def decode(self, ids: ArrayLike) -> bytes:
        return np.frombuffer(self.values, np.uint8)[np.asarray(ids, np.intp)].tobytes()

    def shown(self, token: int) -> str:
        return repr(self.values[token : token + 1])

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "values": list(self.values)})

    def save(self, path: Path) -> None:
        storage.write_text(path, self.to_json() + "\n")
