"""Token files: a corpus as ids on disk, made once.

What a corpus became is kept in a folder whose name has the hash of its text and settings, the
fingerprint. Its manifest.json also has signatures, one for each of the last copies of the text: a
hash of the sizes, times and inodes of the files that were read. While these are the same the corpus
need not be read again to know that the token files are its own; when they are not, it is read, and
only its fingerprint decides.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from txl_jax import corpora, known_sizes, locks, pieces, storage, vocab
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS, Corpus, unreadable
from txl_jax.errors import UserError
from txl_jax.layouts import LAYOUTS
from txl_jax.vocab import Vocab
from txl_jax.words_vocab import LISTED_EOS, WordsVocab

_FORMAT = 2
"""Raised when the same corpus and settings would give other token files than before."""
_MANIFEST = "manifest.json"
_FOR_EACH_PROCESS = 32 << 20
"""Bytes of text for which it is worth starting one more process."""
_MOST_PROCESSES = 8
_TICK_NS = 20_000_000
_COARSE_TICK_NS = 2_000_000_000
"""Within this time after a change of a file another one may leave its times as they are: on most
file systems, and on those that keep whole seconds."""
_LEFT_SECONDS = 3600.0
_SIGNATURES = 8
"""As many copies of a text may be used in turn, and none is read again."""
_COMMONEST = 20
_AT_ONCE = 1 << 20
_TOO_MANY_UNKNOWN = 0.5


@dataclass(frozen=True)
class Counts:
    """What is known of the tokens of a split."""

    documents: int
    tokens: int
    unknown: int
    """Tokens that stand for words outside the vocabulary, in the corpus itself or as read here."""


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """A prepared corpus."""

    folder: Path
    """Holds train.npy and train.documents.npy, those of valid and test, vocab.json and
    manifest.json."""
    splits: dict[str, NDArray[np.unsignedinteger]]
    """Tokens of train, valid and test, each [tokens], memory-mapped."""
    documents: dict[str, NDArray[np.int64]]
    """Where in a split each document begins, and the number of tokens, [documents + 1]."""
    vocab: Vocab
    """Vocabulary of the tokens."""
    fingerprint: str
    """Hash of the documents and settings that the tokens were made from, and of the vocabulary."""
    sentences: bool
    """The lines of train are sentences that follow each other in no order."""
    counts: dict[str, Counts]
    """Of train, valid and test."""
    commonest: tuple[tuple[str, int], ...]
    """The twenty commonest tokens of train as people read them, and how often they occur."""
    new: bool = False
    """Whether they were made at this start, by this process or one that it waited for."""


def prepare(cfg: DataConfig) -> TokenFiles:
    """The token files of the corpus that cfg names; they are made if they do not yet exist.

    Token files that are cut short are made again. Files appear in their folder
    `cfg.data_dir/DATASET-VOCAB-HASH` all at once. Of several processes that need them, one makes
    them and the others wait for it. Token files that are there are used although nothing can be
    written.

    Raises UserError for a corpus that cannot be used, or a folder that cannot be written.
    """
    source = _Source(cfg)
    if files := _known(source, source.signature()):
        return files
    data_dir = Path(cfg.data_dir)
    try:
        try:
            storage.check_writable(data_dir)
        except OSError:
            if not _manifests(source):
                raise
            # Nothing can be made here, but the text may be that of token files that are there.
            return _read(source, source.signature())
        lock = data_dir / f".{source.name}-{source.hash[:12]}.lock"
        with locks.alone(lock, f"prepares {data_dir}"):
            source.remove_unfinished()
            # Taken before the text is read: what changes meanwhile makes the next start read it.
            signature = source.signature()
            files = _known(source, signature)
            return replace(files, new=True) if files else _read(source, signature)
    except OSError as error:
        raise UserError(
            f"cannot write token files to {data_dir}: {error.strerror}; make room there or name "
            "another folder with --data-dir"
        ) from None


class _Source:
    """A corpus, and the settings that decide what its tokens are.

    Raises UserError where the corpus cannot be used, or the settings do not go together.
    """

    def __init__(self, cfg: DataConfig):
        self.cfg = cfg
        self.name = f"{cfg.dataset}-{cfg.vocab}"
        lower_case = cfg.dataset in LAYOUTS and LAYOUTS[cfg.dataset].lower_case
        file = Path(cfg.vocab_file)
        self.given = vocab.given(file, cfg.vocab, lower_case) if cfg.vocab_file else None
        if self.given and self.given.kind != cfg.vocab:
            raise UserError(
                f"--vocab-file {cfg.vocab_file} is a vocabulary of {self.given.kind}: add --vocab "
                f"{self.given.kind}, or leave it out"
            )
        if cfg.vocab_size and (cfg.vocab != "bpe" or cfg.vocab_file):
            raise UserError(
                "--vocab-size is for an encoding that is made here: add --vocab bpe, and no "
                "--vocab-file, or leave it out"
            )
        corpora.obtain(cfg)
        self.corpus: Corpus = corpora.open_corpus(cfg)
        if self.given is None and self.corpus.word_list:
            self.given = WordsVocab.listed(self.corpus.word_list, LISTED_EOS)

    @property
    def processes(self) -> int:
        """How many processes the size of the corpus is worth."""
        most = min(os.cpu_count() or 1, _MOST_PROCESSES)
        return max(1, min(most, self.corpus.n_bytes // _FOR_EACH_PROCESS))

    @cached_property
    def hash(self) -> str:
        """Of the settings and of a vocabulary that is given."""
        settings: dict[str, Any] = {"format": _FORMAT, "dataset": self.cfg.dataset}
        settings |= {"vocab": self.cfg.vocab, "vocab_size": self.cfg.vocab_size}
        settings |= {"lower_case": self.corpus.lower_case, "line_start": self.corpus.line_start}
        settings |= {"given": self.given.to_json()} if self.given else {}
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @property
    def unfinished(self) -> str:
        """With which the names of folders begin that are being filled from it."""
        return f".{self.name}-{self.hash[:12]}.new."

    def remove_unfinished(self) -> None:
        """Removes what processes have left that were killed: nothing is written there any more."""
        for path in Path(self.cfg.data_dir).glob(f"{self.unfinished}*"):
            with contextlib.suppress(OSError):  # another process may be faster
                written = max(file.stat().st_mtime for file in (path, *path.iterdir()))
                if time.time() - written > _LEFT_SECONDS:
                    shutil.rmtree(path)

    def signature(self) -> str:
        """Hash of the settings and of size, times and inode of every file of the corpus.

        Waits until a change from now on would show in them: for a few milliseconds if a file has
        just been written.
        """
        found = hashlib.sha256(self.hash.encode())
        settled = 0
        for name, path in sorted(self.corpus.inputs.items()):
            try:
                status = path.stat()
            except OSError as error:
                raise unreadable(error, path) from None
            changed = status.st_ctime_ns
            coarse = changed % 1_000_000_000 == 0
            settled = max(settled, changed + (_COARSE_TICK_NS if coarse else _TICK_NS))
            facts = (name, status.st_size, status.st_mtime_ns, changed, status.st_ino)
            found.update(repr(facts).encode())
        wait = settled - time.time_ns()
        time.sleep(min(max(0, wait), _COARSE_TICK_NS) / 1e9)
        return found.hexdigest()


class _Reader:
    """Hands on the text of a corpus in pieces, hashes it, and shows how far it is."""

    def __init__(self, source: _Source, action: str):
        self._corpus = source.corpus
        self._hash = hashlib.sha256(source.hash.encode())
        self.begins: deque[bool] = deque()
        """For each piece, whether a document begins with it; whoever wants to know takes it."""
        self._bar = tqdm(
            desc=f"{action} {self._corpus.root}",
            total=self._corpus.n_bytes,
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

    def pieces(self, split: str) -> Iterator[bytes]:
        """The text of a split; UserError where there is none but white space."""
        text, lengths = hashlib.sha256(), hashlib.sha256()
        blank = True
        for document in self._corpus.documents(split):
            length = 0
            for piece in pieces.cut(document, pieces.SIZE):
                text.update(piece)
                self._bar.update(len(piece))
                self.begins.append(not length)
                length += len(piece)
                blank = blank and piece.isspace()
                yield piece
            lengths.update(length.to_bytes(8))
        if blank:
            raise UserError(
                f"{self._corpus.root} has nothing but empty lines for the split {split!r}: add text"
            )
        self._hash.update(split.encode() + text.digest() + lengths.digest())

    def fingerprint(self) -> str:
        return self._hash.hexdigest()


def _known(source: _Source, signature: str) -> TokenFiles | None:
    """The token files that were made from the files of this signature, if there are any."""
    for path in _manifests(source):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text("utf-8"))
            if signature in manifest["signatures"]:
                files = _open(path.parent, manifest["fingerprint"])
                if files and path.parent == _folder(source, files.fingerprint):
                    return files
    return None


def _manifests(source: _Source) -> list[Path]:
    return sorted(Path(source.cfg.data_dir).glob(f"{source.name}-*/{_MANIFEST}"))


def _folder(source: _Source, fingerprint: str) -> Path:
    return Path(source.cfg.data_dir) / f"{source.name}-{fingerprint[:12]}"


def _read(source: _Source, signature: str) -> TokenFiles:
    """The token files of a corpus that has to be read to know them."""
    cfg, corpus, vocabulary = source.cfg, source.corpus, source.given
    with _Reader(source, "reading") as reader:
        # Each piece is looked at once, though it may be of no use to the vocabulary.
        counted = (
            piece for split in SPLITS for piece in reader.pieces(split) if split in corpus.counted
        )
        if vocabulary is None:
            vocabulary = vocab.build(
                cfg.vocab, counted, corpus.lower_case, cfg.vocab_size, source.processes
            )
        deque(counted, maxlen=0)  # the fingerprint is that of all splits
    text = reader.fingerprint()
    # Byte-pair encoding made by another version of its library may be another one.
    fingerprint = hashlib.sha256(f"{text} {vocabulary.to_json()}".encode()).hexdigest()
    folder = _folder(source, fingerprint)
    if known := _open(folder, fingerprint):
        _sign(folder, signature)
    else:
        _make(folder, source, vocabulary, text, fingerprint, signature)
    files = _open(folder, fingerprint)
    if files is None:
        raise UserError(f"the token files in {folder} are damaged: remove the folder, start again")
    return replace(files, new=known is None)


def _sign(folder: Path, signature: str) -> None:
    """Notes that the token files are those of a corpus with this signature, too."""
    path = folder / _MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    others = [other for other in manifest.get("signatures", []) if other != signature]
    manifest["signatures"] = [*others, signature][-_SIGNATURES:]
    # Without, the corpus is only read again at the next start.
    with contextlib.suppress(OSError):
        storage.write_text(path, json.dumps(manifest, indent=2) + "\n")


def _open(folder: Path, fingerprint: str) -> TokenFiles | None:
    """The token files in folder, or None where they are missing, not whole, or others."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        if manifest["fingerprint"] != fingerprint or any(
            (folder / name).stat().st_size != size for name, size in manifest["bytes"].items()
        ):
            return None
        return TokenFiles(
            folder,
            {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS},
            {split: np.load(folder / f"{split}.documents.npy") for split in SPLITS},
            vocab.load(folder / "vocab.json"),
            fingerprint,
            bool(manifest["sentences"]),
            {split: Counts(**manifest["splits"][split]) for split in SPLITS},
            tuple((shown, count) for shown, count in manifest["commonest"]),
        )
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _make(
    folder: Path,
    source: _Source,
    vocabulary: Vocab,
    text: str,
    fingerprint: str,
    signature: str,
) -> None:
    """Writes the token files to a hidden folder beside `folder`, then gives it that name.

    `text`: hash of what was read, which has to be there still.
    """
    unfinished = folder.with_name(f"{source.unfinished}{uuid.uuid4().hex}")
    line_start = source.cfg.vocab == "words" and source.corpus.line_start
    try:
        unfinished.mkdir()
        splits: dict[str, Counts] = {}
        commonest: list[tuple[str, int]] = []
        with _Reader(source, "encoding") as reader:
            for split in SPLITS:
                path = unfinished / f"{split}.npy"
                begin = vocabulary.start if line_start else vocabulary.start[:0]
                each = vocabulary.encode_each(reader.pieces(split), source.processes)
                offsets = _write(path, vocabulary.dtype, begin, each, reader.begins)
                np.save(unfinished / f"{split}.documents.npy", offsets)
                frequencies = _frequencies(path, len(vocabulary))
                unknown = vocabulary.unknown
                splits[split] = Counts(
                    len(offsets) - 1,
                    int(offsets[-1]),
                    0 if unknown is None else int(frequencies[unknown]),
                )
                commonest = commonest or _commonest(frequencies, vocabulary)
        if reader.fingerprint() != text:
            raise UserError(
                f"files in {source.corpus.root} changed while they were read: start again"
            )
        if source.given:
            _check_known(source, splits)
        n_tokens = {split: counts.tokens for split, counts in splits.items()}
        size = None if source.cfg.vocab_file else len(vocabulary)
        known_sizes.check(source.cfg.dataset, vocabulary.kind, n_tokens, size)
        vocabulary.save(unfinished / "vocab.json")
        manifest = {
            "fingerprint": fingerprint,
            "signatures": [signature],
            "dataset": source.cfg.dataset,
            "vocab": source.cfg.vocab,
            "vocab_size": len(vocabulary),
            "sentences": line_start,
            "splits": {split: asdict(counts) for split, counts in splits.items()},
            "commonest": commonest,
            "bytes": {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())},
        }
        storage.write_text(unfinished / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        # The name must not reach the disk before the contents: a power cut may come between.
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        _publish(unfinished, folder, fingerprint)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_known(source: _Source, splits: dict[str, Counts]) -> None:
    """Raises UserError where most words of a split are not in the vocabulary that was given."""
    for split, counts in splits.items():
        if counts.unknown > _TOO_MANY_UNKNOWN * counts.tokens:
            given = source.cfg.vocab_file or source.corpus.word_list
            raise UserError(
                f"{given} is the vocabulary of another corpus: of the {counts.tokens} tokens of "
                f"{split!r} {counts.unknown} are not in it"
            )


def _write(
    path: Path,
    dtype: np.dtype,
    begin: NDArray[np.unsignedinteger],
    each: Iterator[NDArray[np.unsignedinteger]],
    begins: deque[bool],
) -> NDArray[np.int64]:
    """Writes tokens as a .npy file, `begin` first; where its documents begin, and their end."""
    offsets: list[int] = []
    n_tokens = len(begin)
    with path.open("wb") as file:
        _write_header(file, dtype, 0)
        file.write(begin.data)
        for ids in each:
            if begins.popleft():
                offsets.append(n_tokens if offsets else 0)
            file.write(ids.data)
            n_tokens += len(ids)
        file.seek(0)
        _write_header(file, dtype, n_tokens)
    return np.array([*offsets, n_tokens], np.int64)


def _write_header(file: BinaryIO, dtype: np.dtype, n_tokens: int) -> None:
    # NumPy pads the header so that its length is the same for any length of the first axis.
    form = {"descr": dtype.str, "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, form)


def _frequencies(path: Path, size: int) -> NDArray[np.int64]:
    """How often each token occurs in a .npy file, [size]."""
    found = np.zeros(size, np.int64)
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        # Not memory-mapped: pages that were looked at would count as memory of this process.
        while len(tokens := np.fromfile(file, dtype, _AT_ONCE)):
            found += np.bincount(tokens, minlength=size)
    return found


def _commonest(frequencies: NDArray[np.int64], vocabulary: Vocab) -> list[tuple[str, int]]:
    first = np.argsort(-frequencies, kind="stable")[:_COMMONEST]
    return [(vocabulary.shown(i), int(frequencies[i])) for i in first if frequencies[i]]


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
