"""Vocabulary of words."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txl_jax import storage
from txl_jax.errors import UserError
from txl_jax.measure import PERPLEXITY, Measure


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
