"""Corpora as tensorflow-datasets, prepared below `data_dir/tfds`: named ones, and folders of files.

TensorFlow is not needed. A record is a block of about a megabyte of text, in the order of the text,
and of whole lines where it has lines. lm1b and tiny_shakespeare are read by the library's own
builders, except for what these do through TensorFlow: finding their files, and sorting records by a
hash. The library would also make each sentence of lm1b a record; 30 million of them take a quarter
of an hour to read, so that here as many as fit share one.

lm1b has no valid split in the library: valid is the first 2 % of its test split here, which is the
first of its 50 held-out files, and test the rest. The original takes that file,
news.en.heldout-00000-of-00050, for valid and for test alike.

Training reads a named data set from there, but the files of a folder in place: a copy would be of
no use to it. `prepare_documents` makes one for other programs.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.lm1b import lm1b_dataset_builder as lm1b
from tensorflow_datasets.datasets.tiny_shakespeare import (
    tiny_shakespeare_dataset_builder as tiny_shakespeare,
)
from tqdm import tqdm

from txl_jax import downloads, layouts, prepared
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError
from txl_jax.folders import Folder, whole_lines
from txl_jax.layouts import LAYOUTS
from txl_jax.sources import SOURCES

_BLOCK = 1 << 20
_Examples = Iterator[tuple[Any, dict[str, Any]]]
_Shards = Mapping[str, Sequence[Callable[[], _Examples]]]


def prepare(dataset: str, data_dir: Path) -> None:
    """Downloads a data set and prepares it, unless that was done.

    Only one process may do it at a time. One that was killed leaves nothing that would be used.

    Raises:
      UserError: as `downloads.fetch`, an archive that is damaged or lacks a file, or a folder that
        cannot be written.
    """
    folder = prepared.folder(data_dir, dataset)
    if folder.is_dir():
        return
    archive = downloads.fetch(SOURCES[dataset].archive, data_dir / prepared.DOWNLOADS)
    kind = {"lm1b": _Lm1b, "tiny_shakespeare": _TinyShakespeare}.get(dataset, _Blocks)
    damage = (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError)
    with _writing(folder):
        try:
            kind(dataset, archive, data_dir=data_dir / prepared.FOLDER).download_and_prepare()
        except damage as error:
            raise UserError(f"{archive} is damaged ({error}): remove it and start again") from None


def prepare_documents(name: str, corpus: Folder, data_dir: Path) -> Path:
    """Writes the documents of a folder as a data set, unless that was done; where it is.

    A record is a document: `path`, that of its file below the folder, and `text`, in the order of
    `Folder.documents`, in splits train, valid and test. The folder `data_dir/tfds/NAME/HASH/1.0.0`
    has a hash of all this in its name. A document has to fit into memory.

    Only one process may do it at a time. One that was killed leaves nothing that would be used.

    Raises:
      UserError: files of the corpus cannot be used, or changed meanwhile, or the folder cannot be
        written.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for path, document in corpus.documents_by_file(split):
            _add(digest, split, path, b"".join(document))
    library = data_dir / prepared.FOLDER
    folder = library / name / digest.hexdigest()[:12] / "1.0.0"
    if not folder.is_dir():
        with _writing(folder):
            _Documents(name, corpus, digest.hexdigest(), data_dir=library).download_and_prepare()
    return folder


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Removes what a killed process left beside folder; UserError where it cannot be written."""
    try:
        for left_over in folder.parent.glob("*incomplete*"):
            shutil.rmtree(left_over)
        # The library announces in several lines what is known already.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (OSError, RuntimeError) as error:  # array_record raises the second
        reason = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise UserError(
            f"cannot write {folder}: {reason.removeprefix('write() failed: ')}; make room there or "
            "name another folder with --data-dir"
        ) from None


class _InOrder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """A builder that writes records as they come, so that little memory is enough."""

    code_path = None  # the library would look for checksums beside this file
    features: tuple[str, ...] = ("text",)

    def __init__(self, name: str, **options: Any):
        vars(self)["name"] = prepared.library_name(name)  # else one for each class
        self._n_bytes = 0
        self._bar = tqdm(
            desc=f"preparing {name}",
            unit="B",
            unit_scale=True,
            delay=2,
            leave=False,
            disable=None,
        )
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in self.features}
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, *arguments: Any, **options: Any) -> None:
        with self._bar:
            super()._download_and_prepare(*arguments, **options)
        assert self.info.metadata is not None, "as _info makes it"
        self.info.metadata[prepared.N_BYTES] = self._n_bytes

    def _add(self, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        self._bar.update(n_bytes)


class _Documents(_InOrder, skip_registration=True):
    """The documents of a folder of files."""

    VERSION = tfds.core.Version("1.0.0")
    features = ("path", "text")

    def __init__(self, name: str, corpus: Folder, expected: str, **options: Any):
        self._corpus = corpus
        self._expected, self._digest = expected, hashlib.sha256()
        config = tfds.core.BuilderConfig(name=expected[:12])
        # The library would look for it among those of the class, and warn.
        vars(self)["get_builder_config"] = lambda **_: config
        super().__init__(name, config=config, **options)
        self._bar.total = corpus.n_bytes

    def _download_and_prepare(self, *arguments: Any, **options: Any) -> None:
        super()._download_and_prepare(*arguments, **options)
        if self._digest.hexdigest() != self._expected:
            raise UserError(
                f"files in {self._corpus.root} changed while they were read: start again"
            )

    def _shard_iterators_per_split(self, dl_manager: object) -> _Shards:
        return {split: [functools.partial(self._examples, split)] for split in SPLITS}

    def _examples(self, split: str) -> _Examples:
        for i, (path, document) in enumerate(self._corpus.documents_by_file(split)):
            text = b"".join(document)
            _add(self._digest, split, path, text)
            self._add(len(text))
            yield i, {"path": os.fsencode(path), "text": text}


class _Archived(_InOrder, skip_registration=True):
    """A named data set, which is in an archive."""

    def __init__(self, dataset: str, archive: Path, **options: Any):
        self._layout = LAYOUTS[dataset]
        self._source = SOURCES[dataset]
        self._archive = archive
        super().__init__(dataset, **options)

    def _measured(self, examples: _Examples) -> _Examples:
        for key, example in examples:
            text = example["text"]
            text = text.encode() if isinstance(text, str) else text
            self._add(len(text if self._layout.only_bytes else whole_lines(text)))
            yield key, example


class _Blocks(_Archived, skip_registration=True):
    """Text in files of an archive, in blocks."""

    VERSION = tfds.core.Version("1.0.0")

    def _shard_iterators_per_split(self, dl_manager: object) -> _Shards:
        shards = {}
        self._bar.total = 0
        for split in SPLITS:
            name = self._source.member.format(split)
            with self._member(name) as (_, size):
                self._bar.total = size if self._source.held_out else self._bar.total + size
            shards[split] = [functools.partial(self._examples, split, name)]
        return shards

    def _examples(self, split: str, name: str) -> _Examples:
        with self._member(name) as (file, size):
            text = self._part(split, file, size) if self._source.held_out else file
            blocks = layouts.blocks(self._layout, text, self._archive / name)
            yield from self._measured((i, {"text": block}) for i, block in enumerate(blocks))

    def _part(self, split: str, file: IO[bytes], size: int) -> IO[bytes]:
        """The stretch of a file that is a split, as the original's prep_enwik8.py cuts it."""
        held_out = self._source.held_out
        bounds = [0, size - 2 * held_out, size - held_out, size]
        if bounds[1] <= 0:
            raise UserError(f"{self._archive} holds {size} bytes of text, too few to be the right")
        i = SPLITS.index(split)
        file.seek(bounds[i])
        text = file.read(bounds[i + 1] - bounds[i])
        # prep_text8.py drops the spaces at the ends of each part, and writes others as "_".
        return io.BytesIO(text.strip().replace(b" ", b"_") if self._layout.spaces else text)

    @contextlib.contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """A file of the archive, opened, and its size in bytes."""
        with contextlib.ExitStack() as opened:
            try:
                if self._archive.suffix == ".zip":
                    archive = opened.enter_context(zipfile.ZipFile(self._archive))
                    size = archive.getinfo(name).file_size
                    file = opened.enter_context(archive.open(name))
                else:
                    archive = opened.enter_context(tarfile.open(self._archive))
                    size = archive.getmember(name).size
                    file = archive.extractfile(name)
            except KeyError:
                raise UserError(
                    f"{self._archive} lacks {name}: remove it and start again"
                ) from None
            assert file is not None, f"{name} is no file"
            yield file, size


class _Lm1b(_Archived, lm1b.Builder, skip_registration=True):
    """The library's builder of One Billion Words; a shard is a file of the archive."""

    def _shard_iterators_per_split(self, dl_manager: object) -> _Shards:
        unpacked = Path(self.data_dir) / "unpacked"  # goes with this folder if anything fails
        self._unpack(unpacked)
        patterns = {"train": lm1b._TRAIN_FILE_FORMAT, "test": lm1b._HELDOUT_FILE_FORMAT}
        files = {split: sorted(unpacked.glob(pattern)) for split, pattern in patterns.items()}
        for split, pattern in patterns.items():
            if not files[split]:
                raise _lacks(self._archive, pattern)
        self._bar.total = sum(file.stat().st_size for file in itertools.chain(*files.values()))
        self._bar.reset(self._bar.total)
        return {
            split: [functools.partial(self._examples, file) for file in paths]
            for split, paths in files.items()
        }

    def _unpack(self, folder: Path) -> None:
        bar: tqdm = tqdm(
            desc=f"unpacking {self._archive.name}",
            unit="B",
            unit_scale=True,
            total=self._archive.stat().st_size,
            delay=2,
            leave=False,
            disable=None,
        )
        with bar, self._archive.open("rb") as packed, tarfile.open(fileobj=packed) as archive:
            for member in archive:
                archive.extract(member, folder, filter="data")
                bar.update(packed.tell() - bar.n)

    def _examples(self, file: Path) -> _Examples:
        sentences = (f"{example['text']}\n" for _, example in self._generate_examples([file]))
        yield from self._measured((i, {"text": text}) for i, text in enumerate(_joined(sentences)))
        file.unlink()


class _TinyShakespeare(_Archived, tiny_shakespeare.Builder, skip_registration=True):
    """The library's builder of Karpathy's selection from Shakespeare's plays."""

    def _shard_iterators_per_split(self, dl_manager: object) -> _Shards:
        text = self._archive.read_text("utf-8")
        bounds = [0, int(len(text) * 0.9), 0, len(text)]
        bounds[2] = bounds[1] + int((len(text) - bounds[1]) * 0.5)
        self._bar.total = len(text)
        return {
            split: [functools.partial(self._examples, split, text[start:end])]
            for split, start, end in zip(self._source.splits, bounds, bounds[1:], strict=False)
        }

    def _examples(self, split: str, text: str) -> _Examples:
        return self._measured(self._generate_examples(split, text))


def _add(digest: Any, split: str, path: str, text: bytes) -> None:
    """Adds a document to a hash of all of them."""
    digest.update(f"{split} {len(os.fsencode(path))} {len(text)} ".encode() + os.fsencode(path))
    digest.update(text)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Blocks of `_BLOCK` characters or somewhat more."""
    block, length = [], 0
    for line in lines:
        block.append(line)
        length += len(line)
        if length >= _BLOCK:
            yield "".join(block)
            block, length = [], 0
    if block:
        yield "".join(block)


def _lacks(archive: Path, name: str) -> UserError:
    return UserError(f"{archive} lacks {name}: remove it and start again")
