"""Vocabularies: text to token ids and back.

`build` makes the vocabulary of a corpus, `save` and `load` keep it as JSON.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from txl_jax.bpe_vocab import LEAST_SIZE, BpeVocab
from txl_jax.bytes_vocab import BytesVocab
from txl_jax.errors import UserError
from txl_jax.measure import Measure
from txl_jax.words_vocab import WordsVocab


class Vocab(Protocol):
    """Symbols and their ids, 0 ... len - 1."""

    kind: ClassVar[str]
    """What it is called in a config: "bytes", "words" or "bpe"."""
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

    @property
    def unknown(self) -> int | None:
        """The id of what symbols that are not in the vocabulary are read as, if there is one."""
        ...

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        """Ids of a text, [tokens], of type `dtype`; UserError for symbols it does not know."""
        ...

    def encode_each(
        self, texts: Iterable[bytes], processes: int
    ) -> Iterator[NDArray[np.unsignedinteger]]:
        """Ids of each text, as `encode`, in their order; up to `processes` share the work."""
        ...

    def decode(self, ids: ArrayLike) -> bytes:
        """Text of ids; it may begin or end inside a UTF-8 character.

        The text of ids one by one, put together, is the text of all of them.
        """
        ...

    def shown(self, token: int) -> str:
        """A symbol as people can read it, in one line."""
        ...

    def to_json(self) -> str:
        """All of it; vocabularies that are equal give the same."""
        ...

    def save(self, path: Path) -> None:
        """Writes the vocabulary as JSON, all at once; raises OSError."""
        ...


_KINDS = {kind.kind: kind for kind in (BytesVocab, WordsVocab, BpeVocab)}


def build(
    kind: str,
    texts: Iterable[bytes],
    lower_case: bool = False,
    size: int = 0,
    processes: int = 1,
) -> Vocab:
    """The vocabulary of a corpus, which is read once.

    Args:
      kind: "bytes", "words" or "bpe".
      texts: the corpus.
      lower_case: for words: capitals are read as small letters.
      size: for bpe: the most tokens that it may have.
      processes: how many may share the work.

    Raises UserError for a size that cannot be.
    """
    if kind == "words":
        return WordsVocab.build(texts, lower_case, processes)
    if kind == "bytes":
        return BytesVocab.build(texts)
    if size < LEAST_SIZE:
        raise UserError(
            f"--vocab-size is {size}, and byte-pair encoding needs {LEAST_SIZE} tokens or more, "
            "one for each byte: set it, or name an encoding with --vocab-file"
        )
    return BpeVocab.build(texts, size)


def given(path: Path, kind: str, lower_case: bool = False) -> Vocab:
    """The vocabulary that a user names: as `load`, and for words also a list with a word a line.

    lower_case: of a list: capitals of the text are read as small letters.

    Raises UserError where it is neither.
    """
    try:
        with path.open("rb") as file:
            is_json = file.read(1) == b"{"
    except OSError:
        is_json = True  # or a folder, or nothing
    return load(path) if is_json or kind != "words" else WordsVocab.listed(path, "", lower_case)


def load(path: Path) -> Vocab:
    """The vocabulary saved in a file, or an encoding as GPT-2's in a folder.

    Raises UserError where there is none or it is damaged.
    """
    if path.is_dir():
        return BpeVocab.from_folder(path)
    try:
        saved = json.loads(path.read_text("utf-8"))
        return _KINDS[saved["kind"]].from_json(saved)
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a vocabulary, or is damaged: remove its folder and prepare it again"
        ) from None
