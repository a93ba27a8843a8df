"""Vocabulary of byte-pair encoding."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from txl_jax import pieces, storage
from txl_jax.documents import END, unreadable
from txl_jax.errors import UserError
from txl_jax.measure import TOKEN_PERPLEXITY, Measure

FILES = ("vocab.json", "merges.txt", "tokenizer.json")
"""What may be in the folder of an encoding."""
LEAST_SIZE = 256
"""One token for each byte, so that there is no text that it cannot encode."""
_END_OF_TEXT = "<|endoftext|>"
_AT_ONCE = 1 << 16
"""Bytes that one thread encodes at a time."""
# A run as long as this, as of digits in a table, says nothing about a language, and what merging
# its pairs takes grows with the square of its length.
_LONG_RUN = re.compile(r"\S{1000}|\s{1000}")


@dataclass(frozen=True)
class BpeVocab:
    """Byte-pair encoding of the bytes of words, as GPT-2's (Radford et al. 2019).

    Every text in UTF-8 can be encoded, and decoding gives its bytes back. `END` is always a token
    of its own: `<|endoftext|>` where the vocabulary has that, as models trained by others saw it
    there.
    """

    kind: ClassVar[str] = "bpe"
    measure: ClassVar[Measure] = TOKEN_PERPLEXITY
    tokens: tuple[str, ...]
    """The tokens by id; each byte is written as one character, as GPT-2's files have it."""
    merges: tuple[tuple[str, str], ...]
    """The pairs of tokens that become one, those that come first first."""

    @classmethod
    def build(cls, texts: Iterable[bytes], size: int) -> Self:
        """An encoding of at most `size` tokens (256 or more), made from texts in UTF-8."""
        trainer = BpeTrainer(
            vocab_size=size, initial_alphabet=ByteLevel.alphabet(), show_progress=False
        )
        tokenizer = _tokenizer(BPE())
        tokenizer.train_from_iterator(_runs(texts), trainer)
        return cls._of_model(json.loads(tokenizer.to_str())["model"])

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The encoding in a folder as GPT-2's: vocab.json and merges.txt, or tokenizer.json.

        Raises UserError where it cannot be read or is of another kind.
        """
        try:
            if (folder / "vocab.json").exists():
                lines = (folder / "merges.txt").read_text("utf-8").splitlines()
                merges = [
                    line for line in lines if line.strip() and not line.startswith("#version")
                ]
                content = (folder / "vocab.json").read_text("utf-8")
                return cls._of_model({"vocab": json.loads(content), "merges": merges})
            saved = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            model = saved["model"]
            if model["type"] != "BPE" or saved["pre_tokenizer"]["type"] != "ByteLevel":
                raise ValueError("not byte-level BPE")
            if saved["normalizer"] is not None:
                raise ValueError("changes the text")
            added = {token["content"]: token["id"] for token in saved["added_tokens"]}
            return cls._of_model({"vocab": model["vocab"] | added, "merges": model["merges"]})
        except OSError as error:
            raise unreadable(error, folder) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder} holds no byte-level BPE as GPT-2's: vocab.json and merges.txt, or "
                "tokenizer.json"
            ) from None

    @classmethod
    def from_json(cls, saved: dict) -> Self:
        """The vocabulary that `save` wrote; ValueError, KeyError or TypeError for anything else."""
        ids = {token: i for i, token in enumerate(saved["tokens"])}
        if len(ids) != len(saved["tokens"]):
            raise ValueError("a token twice")
        return cls._of_model({"vocab": ids, "merges": saved["merges"]})

    @classmethod
    def _of_model(cls, model: dict[str, Any]) -> Self:
        """From tokens with their ids, and pairs, which may be written with a space between."""
        ids = model["vocab"]
        tokens = tuple(sorted(ids, key=ids.__getitem__))
        if [ids[token] for token in tokens] != list(range(len(ids))):
            raise ValueError("ids with a gap")
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        merges = tuple((first, second) for first, second in pairs)
        needed = {*_CHARACTERS, *(part for pair in merges for part in (*pair, "".join(pair)))}
        if not needed <= ids.keys():
            raise ValueError("a byte or a merged pair is no token")
        return cls(tokens, merges)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.min_scalar_type(len(self) - 1)

    @property
    def unknown(self) -> int | None:
        return None

    @property
    def start(self) -> NDArray[np.unsignedinteger]:
        return self.encode(END)

    def encode(self, text: bytes) -> NDArray[np.unsignedinteger]:
        chunks: list[str | None] = []
        try:
            for i, part in enumerate(text.split(END)):
                chunks += [None] if i else []
                chunks += [piece.decode() for piece in pieces.cut([part], _AT_ONCE)]
        except UnicodeDecodeError as error:
            raise UserError(
                f"byte 0x{error.object[error.start]:02X} of {error.object[:40]!r}… is not UTF-8, "
                "and byte-pair encoding is of text in UTF-8: convert it (iconv -t UTF-8, say)"
            ) from None
        texts = [chunk for chunk in chunks if chunk is not None]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        ids = [self._end if chunk is None else next(encoded).ids for chunk in chunks]
        return np.concatenate([np.asarray(part, self.dtype) for part in ids or [[]]])

    def encode_each(
        self, texts: Iterable[bytes], processes: int
    ) -> Iterator[NDArray[np.unsignedinteger]]:
        # The library has threads of its own.
        return map(self.encode, texts)

    def decode(self, ids: ArrayLike) -> bytes:
        return b"".join(map(self._bytes.__getitem__, np.asarray(ids, np.intp)))

    def shown(self, token: int) -> str:
        return repr(self._bytes[token].decode(errors="replace"))

    def to_json(self) -> str:
        content = {"kind": self.kind, "tokens": self.tokens, "merges": self.merges}
        return json.dumps(content, ensure_ascii=False)

    def save(self, path: Path) -> None:
        storage.write_text(path, self.to_json() + "\n")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        ids = {token: i for i, token in enumerate(self.tokens)}
        return _tokenizer(BPE(ids, list(self.merges)))

    @cached_property
    def _end(self) -> list[int]:
        sign = _END_OF_TEXT if _END_OF_TEXT in self.tokens else _CHARACTERS[END[0]]
        return [self.tokens.index(sign)]

    @cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        values = {character: value for value, character in enumerate(_CHARACTERS)}
        found = [
            bytes(values[character] for character in token)
            if values.keys() >= set(token)
            else token.encode()
            for token in self.tokens
        ]
        found[self._end[0]] = END
        return tuple(found)


def _characters() -> tuple[str, ...]:
    """How GPT-2 writes each byte: as the character of Latin-1 where that can be seen, the others as
    those from U+0100 on.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(value if value in seen else next(others)) for value in range(0x100))


_CHARACTERS = _characters()


def _tokenizer(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    return tokenizer


def _runs(texts: Iterable[bytes]) -> Iterator[str]:
    """The texts without `END`, in parts that have no long runs."""
    end = END.decode()
    for text in texts:
        for piece in pieces.cut([text], _AT_ONCE):
            yield from _LONG_RUN.sub(lambda run: run[0] + end, piece.decode()).split(end)
