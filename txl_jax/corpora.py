"""Where text comes from: the documents of a corpus, split into train, valid and test.

In a folder of text a document is one file. A hash of the file's path alone decides its split and
its place in it: about 2 % of the files go to valid, 2 % to test; the order is the same on every
machine and mixes the folders; a file that is added or changed moves no other file. A document is
given as the file's bytes, with a newline added if it does not end in one, and then `END`, so that a
model sees where a document ends.

The data sets of the original have their splits in files of known names. They are read in blocks,
so that a file need not fit into memory; a document is such a block, and nothing is added to it.
"""

import hashlib
import re
import sysconfig
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from txl_jax.config import DataConfig
from txl_jax.errors import UserError

SPLITS = ("train", "valid", "test")
END = b"\f"
"""Ends every document: a form feed, the old sign for a new page."""

# Another prefix would draw other files. With this one the standard library's valid and test splits
# hold 180 to 245 kB each in Python 3.11, 3.12 and 3.13.
_HASH_PREFIX = b"transformer-xl/"

_STDLIB_LEFT_OUT = {
    *("site-packages", "dist-packages"),
    *("test", "tests"),
    # Not in every Python: later versions dropped them, or Linux distributions package them apart.
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo"),
    # Tables, and a hundred near copies of each other.
    *("encodings", "entities.py", "pydoc_data", "__phello__"),
    "python-config.py",
}
_GENERATED = re.compile(rb"(auto(matically)?[- ]?|file is |configuration )generated", re.IGNORECASE)
_GENERATED_WITHIN = 600


class Corpus(Protocol):
    """Text in three splits, below one folder."""

    @property
    def root(self) -> Path:
        """Folder that the files lie below."""
        ...

    @property
    def n_bytes(self) -> int:
        """Size of all files together in bytes."""
        ...

    @property
    def counted(self) -> tuple[str, ...]:
        """The splits that the vocabulary is made from."""
        ...

    @property
    def word_list(self) -> Path | None:
        """The file with the words of its vocabulary; None: the vocabulary is what occurs in it."""
        ...

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split, in order; one at a time is in memory.

        Raises UserError for files that cannot be used.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A corpus of files that are dealt to the splits by a hash of their names."""

    counted = SPLITS
    word_list = None
    root: Path
    """Folder that the files lie below."""
    files: dict[str, tuple[str, ...]]
    """For each split the POSIX paths of its files relative to root, in order."""
    n_bytes: int
    """Size of all files together in bytes."""

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split, in order; one at a time is in memory.

        Empty files and files with NUL bytes (binary ones) are left out.

        Raises UserError for a file that cannot be read or is not UTF-8, and at the end of a split
        that had no document.
        """
        empty = True
        for name in self.files[split]:
            path = self.root / name
            try:
                text = path.read_bytes()
            except OSError as error:
                raise _unreadable(error) from None
            if not text or 0 in text:
                continue
            _check_utf8(text, path)
            empty = False
            yield text + END if text.endswith(b"\n") else text + b"\n" + END
        if empty:
            raise UserError(
                f"{self.root} has no text for the split {split!r} (its files are dealt by a hash "
                "of their paths, 96 % to train, 2 % to valid, 2 % to test): add files, or cut "
                "large ones into a few hundred smaller ones (split -n l/500 FILE)"
            )


@dataclass(frozen=True)
class Layout:
    """Where a data set of the original has its text, and what of it counts."""

    folder: str
    """Below data_dir."""
    files: dict[str, tuple[str, ...]]
    """For each split the names, or patterns, that its files may have; the first that exist hold."""
    source: str
    """How to get the files."""
    counted: tuple[str, ...] = SPLITS
    """The splits that the vocabulary is made from."""
    word_list: str = ""
    """File of the words of the vocabulary."""
    only_bytes: bool = False
    """The text has no lines: blocks end anywhere, and its tokens are bytes."""
    left_out: bytes = b""
    """Bytes that are no text."""
    spaces: bytes = b""
    """Bytes that stand for spaces."""


_GETDATA = "getdata.sh of the original Transformer-XL makes them"
_NEWS = "1-billion-word-language-modeling-benchmark-r13output/"
LAYOUTS = {
    "wikitext-103": Layout(
        "wikitext-103",
        {split: (f"{split}.txt", f"wiki.{split}.tokens") for split in SPLITS},
        f"unpack wikitext-103-v1.zip there, or take the folder that {_GETDATA}",
        counted=("train",),
    ),
    # The original reads train.txt, where prep_enwik8.py writes each byte as a number but a newline
    # as itself, and drops that as white space: 204 values are left. In train.txt.raw, which the
    # same script writes, the same bytes stand as they are.
    "enwik8": Layout(
        "enwik8",
        {split: (f"{split}.txt.raw",) for split in SPLITS},
        f"{_GETDATA} from enwik8.zip",
        only_bytes=True,
        left_out=b"\n",
    ),
    # In train.txt each character is followed by a space, and a space is written as "_".
    "text8": Layout(
        "text8",
        {split: (f"{split}.txt",) for split in SPLITS},
        f"{_GETDATA} from text8.zip",
        only_bytes=True,
        left_out=b" \n",
        spaces=b"_",
    ),
    "lm1b": Layout(
        "one-billion-words",
        {
            "train": (f"{_NEWS}training-monolingual.tokenized.shuffled/news.en-*", "train.txt"),
            "valid": ("valid.txt",),
            "test": ("test.txt",),
        },
        _GETDATA,
        word_list="1b_word_vocab.txt",
    ),
}
"""The data sets of the original that are read from its files."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Named:
    """A data set of the original, in the files that its getdata.sh leaves."""

    root: Path
    """Folder that the files lie in."""
    layout: Layout
    files: dict[str, tuple[Path, ...]]
    """For each split its files, in order."""
    n_bytes: int
    """Size of all files together in bytes."""
    word_list: Path | None
    """The file with its words, if they are wanted."""

    @property
    def counted(self) -> tuple[str, ...]:
        """The splits that the vocabulary is made from."""
        return self.layout.counted

    def documents(self, split: str) -> Iterator[bytes]:
        """The text of a split in blocks of about a megabyte, of whole lines where it has lines.

        A newline is added to a last line that has none.

        Raises UserError for a file that cannot be read, or is not UTF-8 where it has lines.
        """
        for path in self.files[split]:
            try:
                with path.open("rb") as file:
                    if self.layout.only_bytes:
                        yield from self._bytes(file)
                    else:
                        yield from _lines(file, path)
            except OSError as error:
                raise _unreadable(error) from None

    def _bytes(self, file: BinaryIO) -> Iterator[bytes]:
        spaces = self.layout.spaces
        table = bytes.maketrans(spaces, b" " * len(spaces))
        while block := file.read(_BLOCK):
            yield block.translate(table, delete=self.layout.left_out)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    start = 0
    while lines := file.readlines(_BLOCK):
        block = b"".join(lines)
        _check_utf8(block, path, start)
        start += len(block)
        yield block if block.endswith(b"\n") else block + b"\n"


def _check_utf8(text: bytes, path: Path, start: int = 0) -> None:
    """Raises UserError unless `text`, which begins at byte `start` of the file, is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte offset {start + error.start}: convert it "
            "(iconv -f LATIN1 -t UTF-8, say) or move it out of the folder"
        ) from None


def open_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that cfg names; its files are listed, not yet read.

    `stdlib` is the Python source of the running interpreter's standard library, without tests,
    generated files and packages that not every Python 3.11+ has. `text` is every UTF-8 text file
    below `cfg.text_dir`, without hidden files and folders. Symbolic links are not followed. The
    others lie below `cfg.data_dir`, as `LAYOUTS` says.

    Raises UserError where there is no such folder, no file in it, or it cannot be read.
    """
    try:
        if cfg.dataset == "synthetic":
            raise UserError(
                "--dataset synthetic has nothing to learn from: add --throughput, or name a real "
                "data set"
            )
        if cfg.dataset == "text":
            return _text(cfg)
        if cfg.text_dir:
            raise UserError("--text-dir is read only with --dataset text: add it")
        if cfg.dataset == "stdlib":
            return _stdlib(Path(sysconfig.get_path("stdlib")))
        return _named(cfg)
    except OSError as error:
        raise _unreadable(error) from None


def _stdlib(root: Path) -> Folder:
    sources = (path for path in _walk(root, _STDLIB_LEFT_OUT) if path.suffix == ".py")
    corpus = _corpus(root, (path for path in sources if not _is_generated(path)))
    if not corpus.n_bytes:
        raise UserError(
            f"this Python has no source of its standard library in {root}: run a Python that has, "
            "or train on a folder of text with --dataset text --text-dir DIR"
        )
    return corpus


def _text(cfg: DataConfig) -> Folder:
    if not cfg.text_dir:
        raise UserError("--dataset text needs --text-dir, the folder that holds the text")
    root = Path(cfg.text_dir)
    if not root.is_dir():
        raise UserError(f"--text-dir {root} is not a folder: name one that holds UTF-8 text files")
    if Path(cfg.data_dir).resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"--data-dir {cfg.data_dir} lies inside --text-dir {root}, so that what is prepared "
            "there would become text: name a --data-dir outside it"
        )
    corpus = _corpus(root, _walk(root))
    if not corpus.n_bytes:
        raise UserError(f"--text-dir {root} has no text files: name a folder that holds UTF-8 text")
    return corpus


def _named(cfg: DataConfig) -> Named:
    layout = LAYOUTS[cfg.dataset]
    if layout.only_bytes and cfg.vocab != "bytes":
        raise UserError(f"{cfg.dataset} has no words to tell apart: train on it with --vocab bytes")
    root = Path(cfg.data_dir) / layout.folder
    files: dict[str, tuple[Path, ...]] = {}
    for split, patterns in layout.files.items():
        found = (tuple(sorted(root.glob(pattern))) for pattern in patterns)
        files[split] = next((paths for paths in found if paths), ())
    missing = [" or ".join(layout.files[split]) for split in SPLITS if not files[split]]
    word_list = None
    if layout.word_list and cfg.vocab == "words":
        word_list = root / layout.word_list
        missing += [] if word_list.is_file() else [layout.word_list]
    if missing:
        raise UserError(f"{root} lacks {', '.join(missing)} of {cfg.dataset}: {layout.source}")
    n_bytes = sum(path.stat().st_size for paths in files.values() for path in paths)
    return Named(root, layout, files, n_bytes, word_list)


def _corpus(root: Path, paths: Iterable[Path]) -> Folder:
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(sizes, key=_hash):
        files[{0: "valid", 1: "test"}.get(_hash(name) % 50, "train")].append(name)
    return Folder(
        root, {split: tuple(names) for split, names in files.items()}, sum(sizes.values())
    )


def _walk(folder: Path, left_out: Container[str] = ()) -> Iterator[Path]:
    """Regular files below folder that are not hidden and not reached through a symbolic link.

    Files and folders whose name is in left_out are passed over.
    """
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in left_out or path.is_symlink():
            continue
        if path.is_dir():
            yield from _walk(path, left_out)
        elif path.is_file():
            yield path


def _hash(name: str) -> int:
    return int.from_bytes(
        hashlib.sha256(_HASH_PREFIX + name.encode(errors="surrogateescape")).digest()
    )


def _is_generated(path: Path) -> bool:
    with path.open("rb") as file:
        return _GENERATED.search(file.read(_GENERATED_WITHIN)) is not None


def _unreadable(error: OSError) -> UserError:
    return UserError(f"cannot read {error.filename}: {error.strerror}")
