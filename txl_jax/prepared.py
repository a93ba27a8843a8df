"""Named data sets that `builders` has prepared, below `data_dir/tfds`."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError
from txl_jax.folders import whole_lines
from txl_jax.layouts import LAYOUTS, Layout
from txl_jax.sources import SOURCES, WORD_LISTS, Source

FOLDER = "tfds"
"""Holds the prepared data sets, below data_dir."""
DOWNLOADS = f"{FOLDER}/downloads"
"""Holds what was downloaded, below data_dir."""
N_BYTES = "n_bytes"
"""Size of the text in bytes, in the metadata of a prepared data set."""


@dataclass(frozen=True)
class Prepared:
    """A named data set that was downloaded and prepared."""

    root: Path
    """Folder of its files, as tensorflow-datasets lays them out."""
    data_dir: Path
    layout: Layout
    source: Source
    n_bytes: int
    """Size of the text in bytes."""
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
        paths = sorted(path for path in self.root.iterdir() if path.is_file())
        paths += [self.word_list] if self.word_list else []
        return {path.relative_to(self.data_dir).as_posix(): path for path in paths}

    def documents(self, split: str) -> Iterator[Iterable[bytes]]:
        """The text of a split, one document, in blocks of about a megabyte, of whole lines where
        it has lines.

        The document raises UserError for files that cannot be read.
        """
        yield self._text(split)

    def _text(self, split: str) -> Iterator[bytes]:
        import tensorflow_datasets as tfds

        name = self.source.splits[SPLITS.index(split)]
        try:
            builder: Any = tfds.builder_from_directory(self.root)
            records = builder.as_data_source(split=name)
            for i in range(len(records)):
                text = records[i]["text"]
                yield text if self.layout.only_bytes else whole_lines(text)
        # The libraries below raise several kinds for files that are cut short or changed.
        except (OSError, ValueError, IndexError, KeyError, RuntimeError) as error:
            raise UserError(
                f"cannot read {self.root} ({str(error).splitlines()[0]}): remove the folder and "
                "prepare the data set again"
            ) from None


def prepared(cfg: DataConfig) -> Prepared | None:
    """The data set that cfg names, if it is prepared below `cfg.data_dir`.

    Raises UserError where its metadata cannot be read.
    """
    data_dir, source = Path(cfg.data_dir), SOURCES[cfg.dataset]
    root = folder(data_dir, cfg.dataset)
    words = word_list(data_dir, cfg)
    if not root.is_dir() or (words and not words.is_file()):
        return None
    try:
        n_bytes = json.loads((root / "metadata.json").read_bytes())[N_BYTES]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{root} is damaged: remove the folder and prepare the data set again"
        ) from None
    return Prepared(root, data_dir, LAYOUTS[cfg.dataset], source, n_bytes, words)


def folder(data_dir: Path, dataset: str) -> Path:
    """Where a data set is prepared: it stands there whole or not at all."""
    return data_dir / FOLDER / library_name(dataset) / SOURCES[dataset].version


def library_name(dataset: str) -> str:
    """What tensorflow-datasets calls a data set."""
    return dataset.replace("-", "_")


def word_list(data_dir: Path, cfg: DataConfig) -> Path | None:
    """Where the words of the data set that cfg names have to be, if cfg wants such a file."""
    words = WORD_LISTS.get(cfg.dataset) if cfg.vocab == "words" else None
    return data_dir / DOWNLOADS / words.name if words else None
