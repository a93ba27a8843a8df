"""Token files: a corpus as ids on disk, made once."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from txl_jax import corpora, storage, vocab
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS, Corpus
from txl_jax.errors import UserError
from txl_jax.vocab import Vocab
from txl_jax.words_vocab import WordsVocab

_FORMAT = 1
"""Raised when the same corpus and settings would give other token files than before."""


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """A prepared corpus."""

    folder: Path
    """Holds train.npy, valid.npy, test.npy, vocab.json and manifest.json."""
    splits: dict[str, NDArray[np.unsignedinteger]]
    """Tokens of train, valid and test, each [tokens], memory-mapped."""
    vocab: Vocab
    """Vocabulary of the tokens."""
    fingerprint: str
    """Hash of the documents and settings that the tokens were made from."""


@dataclass(frozen=True, eq=False)
class Survey:
    """A corpus that was read once: all that is known of its tokens before any is written."""

    cfg: DataConfig
    corpus: Corpus
    vocab: Vocab
    """Vocabulary of the tokens."""
    n_tokens: dict[str, int]
    """Number of tokens of train, valid and test."""
    fingerprint: str
    """Hash of the documents and settings."""

    def token_files(self) -> TokenFiles:
        """The token files of the corpus; they are made if they do not yet exist.

        Token files that are cut short are made again. Files appear in their folder
        `cfg.data_dir/DATASET-VOCAB-HASH` all at once; several processes may make them at the same
        time.

        Raises UserError for a folder that cannot be written.
        """
        name = f"{self.cfg.dataset}-{self.cfg.vocab}-{self.fingerprint[:12]}"
        folder = Path(self.cfg.data_dir) / name
        files = _open(folder, self.fingerprint)
        if files is None:
            try:
                storage.check_writable(folder)
                _make(folder, self)
            except OSError as error:
                raise UserError(
                    f"cannot write token files to {folder}: {error.strerror}; make room there or "
                    "name another folder with --data-dir"
                ) from None
            files = _open(folder, self.fingerprint)
        if files is None:
            raise UserError(
                f"the token files in {folder} are damaged: remove the folder, start again"
            )
        return files


def survey(cfg: DataConfig) -> Survey:
    """Reads the corpus that cfg names and writes nothing.

    It is read and hashed at every call, so that token files made from another state of it, or with
    other settings, are never used.

    Raises UserError for a corpus that cannot be used.
    """
    given = vocab.load(Path(cfg.vocab_file)) if cfg.vocab_file else None
    corpus = corpora.open_corpus(cfg)
    n_tokens: dict[str, int] = {split: 0 for split in SPLITS}

    def documents() -> Iterator[bytes]:
        for split in SPLITS:
            for text in reader.documents(split):
                n_tokens[split] += vocab.count(cfg.vocab, text)
                if split in corpus.counted:
                    yield text

    with _Reader(corpus, cfg, "reading") as reader:
        if given is None and corpus.word_list:
            given = WordsVocab.listed(corpus.word_list)
        texts = documents()
        vocabulary = vocab.build(cfg.vocab, texts) if given is None else given
        deque(texts, maxlen=0)  # the fingerprint is that of all documents
    return Survey(cfg, corpus, vocabulary, n_tokens, reader.fingerprint())


def prepare(cfg: DataConfig) -> TokenFiles:
    """The token files of the corpus that cfg names; UserError as `survey` and `token_files`."""
    return survey(cfg).token_files()


class _Reader:
    """Hands on the documents of a corpus, hashes them, and shows how far it is."""

    def __init__(self, corpus: Corpus, cfg: DataConfig, action: str):
        self._corpus = corpus
        settings = {"format": _FORMAT, "dataset": cfg.dataset, "vocab": cfg.vocab}
        if corpus.word_list:
            settings["words"] = hashlib.sha256(corpus.word_list.read_bytes()).hexdigest()
        if cfg.vocab_file:
            settings["vocab_file"] = Path(cfg.vocab_file).read_text("utf-8")
        self._hash = hashlib.sha256(json.dumps(settings).encode())
        self._bar = tqdm(
            desc=f"{action} {corpus.root}",
            total=corpus.n_bytes,
            unit="B",
            unit_scale=True,
            delay=2,
            leave=False,
            disable=None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def documents(self, split: str) -> Iterator[bytes]:
        self._hash.update(split.encode())
        for text in self._corpus.documents(split):
            self._hash.update(len(text).to_bytes(8))
            self._hash.update(text)
            self._bar.update(len(text))
            yield text

    def fingerprint(self) -> str:
        return self._hash.hexdigest()


def _open(folder: Path, fingerprint: str) -> TokenFiles | None:
    """The token files in folder, or None where they are missing, not whole, or others."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["fingerprint"] != fingerprint or any(
            (folder / name).stat().st_size != size for name, size in manifest["bytes"].items()
        ):
            return None
        splits = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
        return TokenFiles(folder, splits, vocab.load(folder / "vocab.json"), fingerprint)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _make(folder: Path, found: Survey) -> None:
    """Writes the token files to a hidden folder beside `folder`, then gives it that name."""
    cfg, corpus, vocabulary = found.cfg, found.corpus, found.vocab
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir()
        with _Reader(corpus, cfg, "encoding") as reader:
            counts = {
                split: _write(unfinished / f"{split}.npy", vocabulary, reader.documents(split))
                for split in SPLITS
            }
        if reader.fingerprint() != found.fingerprint:
            raise UserError(f"files in {corpus.root} changed while they were read: start again")
        vocabulary.save(unfinished / "vocab.json")
        manifest = {
            "fingerprint": found.fingerprint,
            "dataset": cfg.dataset,
            "vocab": cfg.vocab,
            "vocab_size": len(vocabulary),
            "splits": counts,
            "bytes": {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())},
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        # The name must not reach the disk before the contents: a power cut may come between.
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        _publish(unfinished, folder, found.fingerprint)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: Path, vocabulary: Vocab, documents: Iterator[bytes]) -> dict[str, int]:
    """Writes the tokens of documents as a .npy file; the numbers of documents and tokens."""
    n_documents = n_tokens = 0
    with path.open("wb") as file:
        _write_header(file, vocabulary.dtype, 0)
        for text in documents:
            ids = vocabulary.encode(text)
            file.write(ids.data)
            n_documents += 1
            n_tokens += len(ids)
        file.seek(0)
        _write_header(file, vocabulary.dtype, n_tokens)
    return {"documents": n_documents, "tokens": n_tokens}


def _write_header(file: BinaryIO, dtype: np.dtype, n_tokens: int) -> None:
    # NumPy pads the header so that its length is the same for any length of the first axis.
    form = {"descr": dtype.str, "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, form)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(unfinished: Path, folder: Path, fingerprint: str) -> None:
    """Gives a whole folder its name; if that is taken, uses or mends what stands there."""
    try:
        os.rename(unfinished, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process was first, or its files are damaged. The contents follow from the
        # fingerprint, so each file can be replaced on its own, even while others read it.
        if _open(folder, fingerprint) is None:
            for path in unfinished.iterdir():
                os.replace(path, folder / path.name)
