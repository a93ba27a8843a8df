"""Vocabularies: text to token ids and back.

`build` makes the vocabulary of a corpus, `save` and `load` keep it as JSON.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txl_jax import storage
from txl_jax.corpora import END
from txl_jax.errors import UserError
from txl_jax.measure import BITS_PER_BYTE, PERPLEXITY, Measure


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


@dataclass(frozen=True)
class BytesVocab:
    """One symbol for each byte value that occurs in the corpus, as the original's enwik8 (204)."""

    kind: ClassVar[str] = "bytes"
    measure: ClassVar[Measure] = BITS_PER_BYTE
    values: bytes
    """The byte values; a value's place is its id. `build` puts them in ascending order."""

    @classmethod
    def build(cls, documents: Iterable[bytes]) -> Self:
        """The vocabulary of all bytes in documents."""
        values = b""
        for text in documents:
            values = bytes(sorted({*values, *text.translate(None, delete=values)}))
        return cls(values)

    @staticmethod
    def count(text: bytes) -> int:
        """Number of tokens that a text becomes."""
        return len(text)

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

    def decode(self, ids: ArrayLike) -> bytes:
        return np.frombuffer(self.values, np.uint8)[np.asarray(ids, np.intp)].tobytes()

    def save(self, path: Path) -> None:
        content = {"kind": self.kind, "values": list(self.values)}
        storage.write_text(path, json.dumps(content) + "\n")


@dataclass(frozen=True)
class WordsVocab:
    """Words, the most frequent first, as the original's `utils/vocabulary.py` numbers them.

    A word is what stands between white space. `eos` stands for the end of a line, and so do the
    words of an empty line consist of it alone. A word that is not in the vocabulary is read as
    `<unk>`, where the corpus has that word.
    """

    kind: ClassVar[str] = "words"
    measure: ClassVar[Measure] = PERPLEXITY
    words: tuple[str, ...]
    """The words by id."""
    eos: str
    """One of them, which ends a line."""

    @classmethod
    def build(cls, documents: Iterable[bytes]) -> Self:
        """The vocabulary of all words in documents; words as frequent as each other stand in the
        order in which they first occur, and `<eos>` before all.
        """
        counts: Counter[str] = Counter()
        for text in documents:
            counts.update(_split(text, _EOS))
        del counts[_EOS]
        return cls((_EOS, *(word for word, _ in counts.most_common())), _EOS)

    @staticmethod
    def count(text: bytes) -> int:
        """Number of tokens that a text becomes."""
        return len(_split(text, _EOS))

    @classmethod
    def listed(cls, path: Path) -> Self:
        """The vocabulary of One Billion Words, from the file that belongs to it, a word a line.

        Raises UserError where it cannot be read or is another file.
        """
        try:
            lines = path.read_text("utf-8").split("\n")
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        except UnicodeDecodeError:
            lines = []
        words = tuple(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
        if _LISTED_EOS not in words:
            raise UserError(f"{path} is not a list of words with {_LISTED_EOS} among them")
        return cls(words, _LISTED_EOS)

    @classmethod
    def from_json(cls, saved: dict) -> Self:
        """The vocabulary that `save` wrote; ValueError, KeyError or TypeError for anything else."""
        words, eos = tuple(saved["words"]), saved["eos"]
        if any(str.split(word) != [word] for word in words) or len(set(words)) != len(words):
            raise ValueError("not words, or one of them twice")
        if eos not in words:
            raise ValueError("no end of a line")
        return cls(words, eos)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.min_scalar_type(len(self) - 1)

    @property
    def start(self) -> NDArray[np.unsignedinteger]:
        return np.array([self._ids[self.eos]], self.dtype)

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        words = _split(text, self.eos)
        unknown = self._ids.get("<unk>", self._ids.get("<UNK>"))
        if unknown is None and (others := set(words) - self._ids.keys()):
            raise UserError(
                f"{next(word for word in words if word in others)!r} is not among the vocabulary's "
                f"{len(self)} words: use only words that the corpus has"
            )
        return np.fromiter(map(self._ids.get, words, repeat(unknown)), self.dtype, len(words))

    def decode(self, ids: ArrayLike) -> bytes:
        """Text of ids: a space and a word, or the end of a line, for each of them."""
        words = (self.words[i] for i in np.asarray(ids, np.intp))
        return "".join("\n" if word == self.eos else f" {word}" for word in words).encode()

    def save(self, path: Path) -> None:
        content = {"kind": self.kind, "eos": self.eos, "words": self.words}
        storage.write_text(path, json.dumps(content, ensure_ascii=False) + "\n")

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


_EOS = "<eos>"
_LISTED_EOS = "<S>"


def _split(text: bytes, eos: str) -> list[str]:
    """The words of a text, `eos` for every line end; Unicode's white space is what divides."""
    lines = text.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return lines.replace("\n", f" {eos} ").split()


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
