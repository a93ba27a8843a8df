"""The files of a corpus that are on this machine and that the hosts need, as one archive.

The hosts unpack it into `~/txl/corpora/HASH`, beside the folder that they train in. Corpora that
every host can make by itself (the standard library, synthetic tokens) need none.
"""

import gzip
import io
import tarfile
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.on_host import contents
from txl_jax import corpora
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError

FOLDER = "corpora"
"""Below `~/txl`, with a folder for each hash."""
_HOSTS = f"../{FOLDER}/"
"""The same, from the folder that they train in."""
_TEXT, _VOCAB, _ENCODING = "text", "vocab.json", "encoding"
_FROM_TEXT_DIR = ("text", "code", "wiki")


@dataclass(frozen=True)
class Corpus:
    """Files that the hosts need."""

    hash: str
    """Of their names and contents (on_host/contents.py), in hexadecimal digits."""
    data: DataConfig
    """The config's, with the hosts' folders in place of this machine's."""
    files: dict[str, Path]
    """By the name that each has in the archive."""

    @property
    def words(self) -> tuple[str, ...]:
        """What the trainer's command line says of the hosts' folders."""
        words: list[str] = []
        for name in ("text_dir", "data_dir", "vocab_file"):
            folder = getattr(self.data, name)
            if folder.startswith(_HOSTS):
                words += [f"--{name.replace('_', '-')}", folder]
        return tuple(words)

    def pack(self, path: Path) -> None:
        """Writes the archive, tar.gz; the same files give the same bytes.

        Raises UserError for a file that cannot be read, and OSError if the disk is full.
        """
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name, source in self.files.items():
                entry = tarfile.TarInfo(name)
                with _opened(source) as content:
                    entry.size = content.seek(0, io.SEEK_END)
                    content.seek(0)
                    tar.addfile(entry, content)


def key(hash: str) -> str:
    """Where the bucket keeps the archive of a corpus."""
    return f"data/{hash}/corpus.tar.gz"


def find(cfg: DataConfig) -> Corpus | None:
    """The files that the hosts need; None: they need none.

    Reads all of them.

    Raises UserError for a corpus that cannot be used.
    """
    files: dict[str, Path] = {}
    if cfg.dataset not in ("stdlib", "synthetic"):
        files |= _of_corpus(cfg)
    if cfg.vocab_file:
        files |= _of_vocabulary(Path(cfg.vocab_file))
    if not files:
        return None
    files = dict(sorted(files.items()))
    try:
        hash = contents.hash_of(files)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    folder = f"{_HOSTS}{hash}"
    data = cfg
    if cfg.dataset in _FROM_TEXT_DIR:
        # Below --text-dir, what is prepared would be taken for text.
        data = replace(data, text_dir=f"{folder}/{_TEXT}", data_dir=f"{folder}/data")
    elif cfg.dataset not in ("stdlib", "synthetic"):
        data = replace(data, data_dir=folder)
    if cfg.vocab_file:
        name = _ENCODING if Path(cfg.vocab_file).is_dir() else _VOCAB
        data = replace(data, vocab_file=f"{folder}/{name}")
    return Corpus(hash, data, files)


def _of_vocabulary(path: Path) -> dict[str, Path]:
    """The file of a vocabulary, or those of an encoding in a folder."""
    if not path.is_dir():
        return {_VOCAB: path}
    from txl_jax import bpe_vocab  # it takes NumPy, which a launch does not need otherwise

    # Otherwise the hosts would be paid for finding that it is none.
    bpe_vocab.BpeVocab.from_folder(path)
    files = (path / name for name in bpe_vocab.FILES)
    return {f"{_ENCODING}/{file.name}": file for file in files if file.is_file()}


def _of_corpus(cfg: DataConfig) -> dict[str, Path]:
    corpus = corpora.open_corpus(cfg)
    if cfg.dataset not in _FROM_TEXT_DIR:
        return corpus.inputs
    for split in SPLITS:
        # Whatever is wrong with a file or a split, the hosts would be paid for finding it.
        for document in corpus.documents(split):
            deque(document, maxlen=0)
    return {f"{_TEXT}/{name}": path for name, path in corpus.inputs.items()}


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
