"""The named data sets, and the files that the original's getdata.sh leaves of them.

Their splits are in files of known names. A split is one document, and nothing is added to it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS, check_utf8, unreadable
from txl_jax.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Where a data set has its text, and what of it counts."""

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
    lower_case: bool = False
    """Capitals of its words count as small letters."""
    line_start: bool = False
    """The sign that ends a line also stands before the first one of a split."""
    only_bytes: bool = False
    """The text has no lines: blocks end anywhere, and its tokens are bytes."""
    numbers: str = ""
    """Ends the names of files in which bytes are written as numbers, with white space between."""
    left_out: bytes = b""
    """Bytes that are no text."""
    spaces: bytes = b""
    """Bytes that stand for spaces."""


_SPLIT_FILES = {split: (f"{split}.txt",) for split in SPLITS}
_WIKITEXT_FILES = {split: (f"{split}.txt", f"wiki.{split}.tokens") for split in SPLITS}
_GETDATA = "getdata.sh of the original Transformer-XL makes them"
_NEWS = "1-billion-word-language-modeling-benchmark-r13output/"
LAYOUTS = {
    "wikitext-103": Layout(
        "wikitext-103",
        _WIKITEXT_FILES,
        f"unpack wikitext-103-v1.zip there, or take the folder that {_GETDATA}",
        counted=("train",),
    ),
    "wikitext-2": Layout(
        "wikitext-2",
        _WIKITEXT_FILES,
        f"unpack wikitext-2-v1.zip there, or take the folder that {_GETDATA}",
    ),
    # The original reads train.txt, where prep_enwik8.py writes each byte as a number but a newline
    # as itself, and drops that as white space: 204 values are left. In train.txt.raw, which the
    # same script writes, the same bytes stand as they are, and are read faster.
    "enwik8": Layout(
        "enwik8",
        {split: (f"{split}.txt.raw", f"{split}.txt") for split in SPLITS},
        f"{_GETDATA} from enwik8.zip",
        only_bytes=True,
        numbers=".txt",
        left_out=b"\n",
    ),
    # In train.txt each character is followed by a space, and a space is written as "_".
    "text8": Layout(
        "text8",
        _SPLIT_FILES,
        f"{_GETDATA} from text8.zip",
        only_bytes=True,
        left_out=b" \n",
        spaces=b"_",
    ),
    "ptb": Layout(
        "penn",
        {split: (f"{split}.txt", f"ptb.{split}.txt") for split in SPLITS},
        f"{_GETDATA} from simple-examples.tgz",
        lower_case=True,
    ),
    # A sentence is a line of characters, each followed by a space; a space is written as "_".
    "ptb-char": Layout(
        "pennchar",
        {split: (f"{split}.txt", f"ptb.char.{split}.txt") for split in SPLITS},
        f"{_GETDATA} from simple-examples.tgz",
        only_bytes=True,
        left_out=b" ",
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
        line_start=True,
    ),
    "tiny_shakespeare": Layout(
        "tiny_shakespeare", _SPLIT_FILES, "cut the text into these three files"
    ),
}
"""The data sets that have a name, by it."""

_BLOCK = 1 << 20
_VALUES = {str(value).encode(): value for value in range(0x100)}


@dataclass(frozen=True)
class Named:
    """A named data set, in files that the user has put into its folder."""

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

    @property
    def lower_case(self) -> bool:
        """Whether capitals of its words count as small letters."""
        return self.layout.lower_case

    @property
    def line_start(self) -> bool:
        """Whether a split begins with the sign that ends a line."""
        return self.layout.line_start

    @property
    def inputs(self) -> dict[str, Path]:
        """Its files, and the list of its words, by their paths below `data_dir`."""
        paths = [path for split in SPLITS for path in self.files[split]]
        paths += [self.word_list] if self.word_list else []
        folder = self.layout.folder
        return {f"{folder}/{path.relative_to(self.root).as_posix()}": path for path in paths}

    def documents(self, split: str) -> Iterator[Iterable[bytes]]:
        """The text of a split, one document, in blocks of about a megabyte, of whole lines where
        it has lines.

        A newline is added to a last line that has none.

        The document raises UserError for a file that cannot be read, or is not UTF-8 where it has
        lines.
        """
        yield self._text(split)

    def _text(self, split: str) -> Iterator[bytes]:
        for path in self.files[split]:
            try:
                with path.open("rb") as file:
                    yield from blocks(self.layout, file, path)
            except OSError as error:
                raise unreadable(error, path) from None


def has_files(cfg: DataConfig) -> bool:
    """Whether the data set that cfg names has any of its files in its folder."""
    root, layout = _root(cfg), LAYOUTS[cfg.dataset]
    return any(
        next(root.glob(pattern), None) for patterns in layout.files.values() for pattern in patterns
    )


def named(cfg: DataConfig) -> Named:
    """The data set that cfg names, in its folder below `cfg.data_dir`, as `LAYOUTS` says.

    Raises UserError where files are missing.
    """
    root, layout = _root(cfg), LAYOUTS[cfg.dataset]
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


def check_vocab(cfg: DataConfig) -> None:
    """Raises UserError where the data set that cfg names has no vocabulary of this kind."""
    if LAYOUTS[cfg.dataset].only_bytes and cfg.vocab != "bytes":
        raise UserError(f"{cfg.dataset} has no words to tell apart: train on it with --vocab bytes")


def blocks(layout: Layout, file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The text of an open file in blocks, as in `Named.documents`; errors name `path`.

    Raises UserError where the layout has lines and the file is not UTF-8, or has numbers and the
    file something else.
    """
    if layout.numbers and path.suffix == layout.numbers:
        yield from _of_numbers(file, path)
    elif layout.only_bytes:
        table = bytes.maketrans(layout.spaces, b" " * len(layout.spaces))
        while block := file.read(_BLOCK):
            yield block.translate(table, delete=layout.left_out)
    else:
        start = 0
        while lines := file.readlines(_BLOCK):
            block = b"".join(lines)
            check_utf8(block, path, start)
            start += len(block)
            yield block if block.endswith(b"\n") else block + b"\n"


def _of_numbers(file: IO[bytes], path: Path) -> Iterator[bytes]:
    begun = b""
    while block := file.read(_BLOCK):
        numbers = (begun + block).split()
        begun = b"" if block[-1:].isspace() else numbers.pop()
        yield _bytes(numbers, path)
    yield _bytes([begun] if begun else [], path)


def _bytes(numbers: list[bytes], path: Path) -> bytes:
    try:
        return bytes(map(_VALUES.__getitem__, numbers))
    except KeyError as error:
        raise UserError(
            f"{path} has {error.args[0][:20]!r} where numbers from 0 to 255 stand in what "
            f"prep_enwik8.py writes: text as it is belongs into {path.name}.raw"
        ) from None


def _root(cfg: DataConfig) -> Path:
    return Path(cfg.data_dir) / LAYOUTS[cfg.dataset].folder
