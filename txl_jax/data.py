"""From a corpus to token files on disk, and from those to segments [batch, time].

B batch, T segment (tgt_len).
"""

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
from txl_jax.corpora import SPLITS, Corpus
from txl_jax.errors import UserError
from txl_jax.vocab import Vocab, WordsVocab

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


@dataclass(frozen=True, eq=False)
class Streams:
    """A split cut into `batch` contiguous streams, and the streams into segments of `tgt_len`.

    Row b of segment i + 1 goes on where row b of segment i ended, so that memory can be carried
    from one to the next. A prediction j has token j as its input and token j + 1 as its target.

    The streams have no state. The segment that a training step reads is
    `epoch, i = divmod(n, len(streams))`, where n segments were read before it.
    """

    tokens: NDArray[np.integer]
    """The split, [tokens]."""
    batch: int
    """Streams B."""
    tgt_len: int
    """Predictions T of one stream in a segment."""
    stride: int
    """Predictions from the start of one stream to the start of the next."""
    length: int
    """Predictions of a stream."""
    context: int = 0
    """Predictions with which every stream but the first begins that are not its own: their tokens
    are read, for the sake of memory, but the stream before predicts them."""

    @classmethod
    def trimmed(cls, tokens: NDArray[np.integer], batch: int, tgt_len: int) -> Self:
        """For training: streams of n = len(tokens) // batch tokens, each n - 1 predictions.

        This is the original's `LMOrderedIterator`: the split's last len(tokens) % batch tokens are
        left out, and no stream predicts the first token of the next. The last segment of an epoch
        may be shorter than tgt_len; it is padded.

        Raises UserError where a stream is shorter than one segment.
        """
        check_length(len(tokens), batch, tgt_len)
        n = len(tokens) // batch
        return cls(np.asarray(tokens), batch, tgt_len, stride=n, length=n - 1)

    @classmethod
    def covering(cls, tokens: NDArray[np.integer], batch: int, tgt_len: int) -> Self:
        """For a quick evaluation: every one of the len(tokens) - 1 predictions once.

        Streams hold n = ceil((len(tokens) - 1) / batch) predictions; the last ones are padded. Each
        begins with empty memory, so that a larger batch makes the mean loss a little higher.

        Raises UserError where there are fewer than two tokens.
        """
        n = -(-_predictions(tokens) // batch)
        return cls(np.asarray(tokens), batch, tgt_len, stride=n, length=n)

    @classmethod
    def seamless(
        cls, tokens: NDArray[np.integer], batch: int, tgt_len: int, context: int, together: int = 1
    ) -> Self:
        """For an exact evaluation: every prediction once, as if there were one stream.

        Streams are cut where the segments of one stream end, and every stream but the first reads
        `context` segments before its own ones. The first has as many more of its own, so that all
        take equally long: batch x n + context segments cover the text, for the least n. If
        `context` reaches as far back as a prediction can look, its loss does not depend on batch.

        Args:
          context: segments that are read before those that count.
          together: streams are cut only between blocks of this many segments (where memory is
            emptied before each block, context can be 0).

        Raises UserError where there are fewer than two tokens.
        """
        segments = -(-_predictions(tokens) // tgt_len)
        blocks = -(-max(1, segments - context) // together)
        own = together * -(-blocks // batch)
        return cls(
            np.asarray(tokens),
            batch,
            tgt_len,
            stride=own * tgt_len,
            length=min(context + own, segments) * tgt_len,
            context=context * tgt_len,
        )

    def __len__(self) -> int:
        """Segments in an epoch."""
        return -(-self.length // self.tgt_len)

    @property
    def n_tokens(self) -> int:
        """Predictions in an epoch, padding and context not counted."""
        own = max(0, self.length - self.context)
        return min(self.length + (self.batch - 1) * own, len(self.tokens) - 1)

    @property
    def n_context(self) -> int:
        """Tokens that streams with predictions of their own read as context."""
        others = -(-(len(self.tokens) - 1 - self.context) // self.stride) - 1
        return self.context * min(max(0, others), self.batch - 1)

    def segment(
        self, i: int, rows: slice = slice(None)
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Inputs and targets of segment i, int32 [rows, T] each; padding is input 0, target -1.

        Targets of context are -1 too. Only the tokens of these rows are read. Raises IndexError
        where there is no segment i.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"segment {i} of {len(self)}")
        streams = range(self.batch)[rows]
        inputs = np.zeros((len(streams), self.tgt_len), np.int32)
        targets = np.full_like(inputs, -1)
        done = i * self.tgt_len
        for row, stream in enumerate(streams):
            start = stream * self.stride + done
            left = min(self.length - done, len(self.tokens) - 1 - start)
            n = max(0, min(self.tgt_len, left))
            inputs[row, :n] = self.tokens[start : start + n]
            skipped = min(n, max(0, self.context - done)) if stream else 0
            targets[row, skipped:n] = self.tokens[start + skipped + 1 : start + n + 1]
        return inputs, targets


def _predictions(tokens: NDArray[np.integer]) -> int:
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} tokens hold nothing to predict: 2 or more are needed")
    return len(tokens) - 1


def check_length(n_tokens: int, batch: int, tgt_len: int) -> None:
    """Raises UserError unless `n_tokens` in `batch` streams give each a segment of `tgt_len`."""
    n = n_tokens // batch
    if n > tgt_len:
        return
    fits = []
    if n >= 2:
        fits.append(f"--tgt-len {n - 1} or less")
    if most := n_tokens // (tgt_len + 1):
        fits.append(f"--batch {most} or less")
    raise UserError(
        f"{n_tokens} tokens in a batch of {batch} give streams of {n} tokens, too short for a "
        f"tgt_len of {tgt_len} (and 1 to predict): use {' or '.join([*fits, 'more text'])}"
    )
