"""Vocabulary of words."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txl_jax import storage
from txl_jax.documents import unreadable
from txl_jax.errors import UserError
from txl_jax.measure import PERPLEXITY, Measure
from txl_jax.workers import Workers


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
    lower_case: bool = False
    """Capitals are read as small letters."""

    @classmethod
    def build(cls, texts: Iterable[bytes], lower_case: bool = False, processes: int = 1) -> Self:
        """The vocabulary of all words in texts; words as frequent as each other stand in the
        order in which they first occur, and `<eos>` before all.
        """
        with Workers(_Counting(lower_case), processes) as workers:
            in_order = chain.from_iterable(workers.map(texts))
            counts: Counter[str] = Counter(dict.fromkeys(in_order, 0))
            for counting in workers.tasks():
                counts.update(counting.counts)
        del counts[_EOS]
        return cls((_EOS, *(word for word, _ in counts.most_common())), _EOS, lower_case)

    @classmethod
    def listed(cls, path: Path, eos: str = "", lower_case: bool = False) -> Self:
        """The vocabulary in a file with a word a line, as the original's `vocab_file`; how often it
        occurs may stand behind it.

        eos: the word that ends a line, which the list has to have. Empty: `<eos>`, or `<S>` as in
        the list of One Billion Words; `<eos>` is put before a list that has neither.

        Raises UserError where it cannot be read or is another file.
        """
        try:
            lines = path.read_text("utf-8").split("\n")
        except OSError as error:
            raise unreadable(error, path) from None
        except UnicodeDecodeError:
            lines = []
        entries = [line.split() for line in lines if line.strip()]
        words = tuple(dict.fromkeys(word for word, *_ in entries))
        if eos and eos not in words:
            raise UserError(f"{path} is not a list of words with {eos} among them")
        # Words of others may hold a rare kind of space: the original takes what stands before it.
        n_odd = sum(len(entry) > 2 or not entry[-1].isdecimal() for entry in entries if entry[1:])
        if not words or (not eos and 2 * n_odd >= len(entries)):
            raise UserError(f"{path} is neither a vocab.json nor a list with a word a line")
        eos = eos or next((sign for sign in (_EOS, LISTED_EOS) if sign in words), "")
        return cls(words, eos, lower_case) if eos else cls((_EOS, *words), _EOS, lower_case)

    @classmethod
    def from_json(cls, saved: dict) -> Self:
        """The vocabulary that `save` wrote; ValueError, KeyError or TypeError for anything else."""
        words, eos, lower_case = tuple(saved["words"]), saved["eos"], saved.get("lower_case", False)
        if any(str.split(word) != [word] for word in words) or len(set(words)) != len(words):
            raise ValueError("not words, or one of them twice")
        if eos not in words:
            raise ValueError("no end of a line")
        return cls(words, eos, bool(lower_case))

    def __len__(self) -> int:
        return len(self.words)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.min_scalar_type(len(self) - 1)

    def __reduce__(self) -> tuple:
        return type(self), (self.words, self.eos, self.lower_case)

    @property
    def start(self) -> NDArray[np.unsignedinteger]:
        return np.array([self._ids[self.eos]], self.dtype)

    @property
    def unknown(self) -> int | None:
        return self._ids.get("<unk>", self._ids.get("<UNK>"))

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        words = _split(text, self.eos, self.lower_case)
        unknown = self.unknown
        if unknown is None:
            ids = map(self._ids.__getitem__, words)
        else:
            ids = map(self._ids.get, words, repeat(unknown))
        try:
            return np.fromiter(ids, self.dtype, len(words))
        except KeyError as error:
            raise UserError(
                f"{error.args[0]!r} is not among the vocabulary's {len(self)} words: use only "
                "words that the corpus has"
            ) from None

    def encode_each(
        self, texts: Iterable[bytes], processes: int
    ) -> Iterator[NDArray[np.unsignedinteger]]:
        with Workers(self.encode, processes) as workers:
            yield from workers.map(texts)

    def decode(self, ids: ArrayLike) -> bytes:
        """Text of ids: a space and a word, or the end of a line, for each of them."""
        words = (self.words[i] for i in np.asarray(ids, np.intp))
        return "".join("\n" if word == self.eos else f" {word}" for word in words).encode()

    def shown(self, token: int) -> str:
        return self.words[token]

    def to_json(self) -> str:
        content = {"kind": self.kind, "eos": self.eos, "words": self.words}
        content |= {"lower_case": True} if self.lower_case else {}
        return json.dumps(content, ensure_ascii=False)

    def save(self, path: Path) -> None:
        storage.write_text(path, self.to_json() + "\n")

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


_EOS = "<eos>"
LISTED_EOS = "<S>"
"""Ends a line of One Billion Words."""


@dataclass
class _Counting:
    """How often each word occurs in the texts that it is called with, in their order."""

    lower_case: bool
    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, text: bytes) -> list[str]:
        """The words of a text that were in none before, as they first occur."""
        before = len(self.counts)
        self.counts.update(_split(text, _EOS, self.lower_case))
        return [*islice(reversed(self.counts), len(self.counts) - before)][::-1]


def _split(text: bytes, eos: str, lower_case: bool) -> list[str]:
    """The words of a text, `eos` for every line end; Unicode's white space is what divides."""
    lines = text.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    if lower_case:
        lines = lines.lower()
    return lines.replace("\n", f" {eos} ").split()
