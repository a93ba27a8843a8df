"""Corpora of files: any folder of text, the source of Python's standard library.

A document is one file. A hash of the file's path alone decides its split and its place in it:
about 2 % of the files go to valid, 2 % to test; the order is the same on every machine and mixes
the folders; a file that is added or changed moves no other file. A document is given as the file's
bytes, with a newline added if it does not end in one, and then `END`, so that a model sees where a
document ends.
"""

import glob
import hashlib
import itertools
import re
import sysconfig
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from txl_jax import text_files
from txl_jax.config import DataConfig
from txl_jax.documents import END, SPLITS, not_utf8, unreadable
from txl_jax.errors import UserError
from txl_jax.text_files import NotUtf8

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


@dataclass(frozen=True)
class Folder:
    """A corpus of files that are dealt to the splits by a hash of their names."""

    counted = SPLITS
    word_list = None
    lower_case = False
    line_start = False
    root: Path
    """Folder that the files lie below."""
    files: dict[str, tuple[str, ...]]
    """For each split the POSIX paths of its files relative to root, in order."""
    n_bytes: int
    """Size of all files together in bytes."""

    @property
    def inputs(self) -> dict[str, Path]:
        """Its files by their paths below root."""
        return {name: self.root / name for split in SPLITS for name in self.files[split]}

    def documents(self, split: str) -> Iterator[Iterable[bytes]]:
        """The documents of a split, in order, each in blocks; as `documents_by_file`."""
        return (document for _, document in self.documents_by_file(split))

    def documents_by_file(self, split: str) -> Iterator[tuple[str, Iterable[bytes]]]:
        """The documents of a split, in order, each in blocks, with the path of its file below root.

        Empty files and files with NUL bytes (binary ones) are left out. To know that, a file that
        is longer than a block is read twice.

        Raises UserError for a file that cannot be read or is not UTF-8, and at the end of a split
        that had no document.
        """
        empty = True
        for name in self.files[split]:
            try:
                for document in self._documents_of(name):
                    empty = False
                    yield name, document
            except OSError as error:
                raise unreadable(error, self.root / name) from None
        if empty:
            raise UserError(
                f"{self.root} has no text for the split {split!r} (its files are dealt by a hash "
                "of their paths, 96 % to train, 2 % to valid, 2 % to test): add files, or cut "
                "large ones into a few hundred smaller ones (split -n l/500 FILE)"
            )

    def _documents_of(self, name: str) -> Iterator[Iterable[bytes]]:
        """The documents that a file holds: here itself."""
        path = self.root / name
        content = text_files.blocks(path)
        try:
            if text_files.is_text(content):
                yield itertools.chain(text_files.whole_lines(content), [END])
        except NotUtf8 as error:
            raise not_utf8(path, error.offset) from None


_F = TypeVar("_F", bound=Folder)


def stdlib() -> Folder:
    """The source of the running interpreter's standard library.

    Without tests, generated files and packages that not every Python 3.11+ has. Raises UserError
    where there is none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = (path for path in walk(root, _STDLIB_LEFT_OUT) if path.suffix == ".py")
    corpus = deal(Folder, root, (path for path in sources if not _is_generated(path)))
    if not corpus.n_bytes:
        raise UserError(
            f"this Python has no source of its standard library in {root}: run a Python that has, "
            "or train on a folder of text with --dataset text --text-dir DIR"
        )
    return corpus


def text(cfg: DataConfig) -> Folder:
    """Every UTF-8 text file below `cfg.text_dir`.

    Without hidden files and folders; symbolic links are not followed. Raises UserError as `chosen`,
    and where there is no text.
    """
    root, paths = chosen(cfg)
    corpus = deal(Folder, root, files_of(paths))
    if not corpus.n_bytes:
        raise UserError(
            f"--text-dir {cfg.text_dir} has no text files: name a folder that holds UTF-8 text"
        )
    return corpus


def chosen(cfg: DataConfig) -> tuple[Path, list[Path]]:
    """What `cfg.text_dir` names: the folder that all of it lies below, and its folders and files.

    `text_dir` is a folder, or a pattern as in a shell (`**` stands for folders of any depth); what
    is hidden or a symbolic link does not match. Raises UserError where there is no such folder, or
    the data folder lies in it.
    """
    if not cfg.text_dir:
        raise UserError(f"--dataset {cfg.dataset} needs --text-dir, the folder that holds the text")
    root = Path(cfg.text_dir)
    if root.is_dir():
        paths = [root]
    elif not glob.has_magic(cfg.text_dir):
        raise UserError(f"--text-dir {root} is not a folder: name one that holds UTF-8 text files")
    else:
        while glob.has_magic(str(root)):
            root = root.parent
        matches = map(Path, glob.glob(cfg.text_dir, recursive=True))
        paths = [path for path in matches if is_visible(path, root)]
        if not paths:
            raise UserError(f"nothing matches --text-dir {cfg.text_dir}: name a folder that exists")
    data_dir = Path(cfg.data_dir).resolve()
    if any(data_dir.is_relative_to(path.resolve()) for path in paths):
        raise UserError(
            f"--data-dir {cfg.data_dir} lies inside --text-dir {cfg.text_dir}, so that what is "
            "prepared there would become text: name a --data-dir outside it"
        )
    return root, paths


def deal(kind: type[_F], root: Path, paths: Iterable[Path]) -> _F:
    """The corpus of the files `paths` below root, dealt to the splits."""
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(sizes, key=_hash):
        files[{0: "valid", 1: "test"}.get(_hash(name) % 50, "train")].append(name)
    return kind(root, {split: tuple(names) for split, names in files.items()}, sum(sizes.values()))


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among paths, and those below the folders among them, as `walk` finds them."""
    for path in paths:
        if path.is_dir():
            yield from walk(path)
        elif path.is_file():
            yield path


def whole_lines(text: bytes) -> bytes:
    """`text` with a newline added if it does not end in one."""
    return text if text.endswith(b"\n") else text + b"\n"


def walk(folder: Path, left_out: Container[str] = ()) -> Iterator[Path]:
    """Regular files below folder that are not hidden and not reached through a symbolic link.

    Files and folders whose name is in left_out are passed over.
    """
    for path in folder.iterdir():
        if not is_visible(path, folder) or path.name in left_out:
            continue
        if path.is_dir():
            yield from walk(path, left_out)
        elif path.is_file():
            yield path


def is_visible(path: Path, above: Path) -> bool:
    """Whether no part of a path below the folder `above` is hidden or a symbolic link."""
    while path != above:
        if path.name.startswith(".") or path.is_symlink():
            return False
        path = path.parent
    return True


def _hash(name: str) -> int:
    return int.from_bytes(
        hashlib.sha256(_HASH_PREFIX + name.encode(errors="surrogateescape")).digest()
    )


def _is_generated(path: Path) -> bool:
    with path.open("rb") as file:
        return _GENERATED.search(file.read(_GENERATED_WITHIN)) is not None
