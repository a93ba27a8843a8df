"""Where the checkpoints of a run lie: in a folder, or in a store with copies in a folder."""

import os
import re
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from txl_jax import checkpoint_files as files
from txl_jax.checkpoint_files import MANIFEST, MARKER, Saved
from txl_jax.errors import UserError
from txl_jax.store import Store

_DOWNLOADS = 8
"""Files that are downloaded at a time."""


class Shelf(Protocol):
    """The saved steps of one series, "" or "best", and what is needed to commit and to read them.

    Methods raise OSError where the folder or the store fails; it is a FileNotFoundError for what
    is not there.
    """

    def found(self, series: str) -> dict[Saved, set[str]]:
        """All steps, committed or not, the newest last; of each the manifests and the marker there.

        These are names from the step's folder on. Raises UserError if there are steps of a version
        of this program that had another layout.
        """
        ...

    def read(self, saved: Saved, name: str) -> bytes:
        """A manifest or the marker."""
        ...

    def commit(self, saved: Saved, marker: bytes) -> None:
        """Writes the marker, for good."""
        ...

    def remove(self, steps: Iterable[Saved]) -> None:
        """Removes steps, their markers first: without one a step is gone, whatever outlives it."""
        ...

    def bring(self, saved: Saved, units: dict[str, list[int]]) -> str | None:
        """Sees to it that these units are whole in the local folder.

        `units`: size and checksum of the manifest of each. Returns what is wrong, or None.
        """
        ...


def committed(steps: dict[Saved, set[str]]) -> list[Saved]:
    """Those of a shelf's steps that exist for a reader."""
    return [saved for saved, names in steps.items() if MARKER in names]


def superseded(steps: dict[Saved, set[str]], new: Saved, keep: int) -> list[Saved]:
    """What may go once `new` is committed.

    These are committed steps beyond the newest `keep`, and later ones too: training went on from
    before them because they were damaged. And what was begun before and never committed. Nothing
    of an attempt after that of `new` goes, nor what its own has begun since.
    """
    ours = [saved for saved in steps if saved.attempt <= new.attempt and saved != new]
    older = [saved for saved in committed(steps) if saved in ours and saved.step < new.step]
    kept = older[max(0, len(older) - keep + 1) :]
    return [
        saved
        for saved in ours
        if saved not in kept
        and (MARKER in steps[saved] or saved.step < new.step or saved.attempt < new.attempt)
    ]


class FolderShelf:
    """Checkpoints in a folder that every process of the run sees."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def found(self, series: str) -> dict[Saved, set[str]]:
        """As `Shelf.found`."""
        folder = self._folder / series
        if not folder.is_dir():
            return {}
        names = os.listdir(folder)
        for name in names:
            _refuse_old_layout(folder, name, (folder / name / MANIFEST).exists())
        steps = {}
        for saved in sorted(filter(None, (Saved.of(series, name) for name in names))):
            path = folder / saved.name
            try:
                manifests = [f"{unit}/{MANIFEST}" for unit in os.listdir(path)]
            except FileNotFoundError:  # another process of this machine has just removed it
                continue
            steps[saved] = {name for name in (*manifests, MARKER) if (path / name).exists()}
        return steps

    def read(self, saved: Saved, name: str) -> bytes:
        """As `Shelf.read`."""
        return (self._folder / saved.path / name).read_bytes()

    def commit(self, saved: Saved, marker: bytes) -> None:
        """As `Shelf.commit`."""
        path = self._folder / saved.path
        files.sync(path.parent)
        files.write_whole(path / MARKER, marker)

    def remove(self, steps: Iterable[Saved]) -> None:
        """As `Shelf.remove`."""
        for saved in steps:
            path = self._folder / saved.path
            (path / MARKER).unlink(missing_ok=True)
            # Another process of this machine may be at the same.
            shutil.rmtree(path, ignore_errors=True)

    def bring(self, saved: Saved, units: dict[str, list[int]]) -> str | None:
        """As `Shelf.bring`: everything is local."""
        path = self._folder / saved.path
        with ThreadPoolExecutor(_DOWNLOADS) as threads:
            found = threads.map(lambda unit: files.damage(path / unit, units[unit]), units)
            return next(filter(None, found), None)


class StoreShelf:
    """Checkpoints in a store, under the name of the local folder that takes copies of them."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._root = f"{folder.name}/"

    def found(self, series: str) -> dict[Saved, set[str]]:
        """As `Shelf.found`."""
        steps: dict[Saved, set[str]] = {}
        prefix = f"{self._root}{series}/" if series else self._root
        for full_name in self._store.names(prefix):
            step, _, name = full_name.removeprefix(prefix).partition("/")
            _refuse_old_layout(prefix, step, name == MANIFEST)
            saved = Saved.of(series, step)
            if saved is not None:
                names = steps.setdefault(saved, set())
                if name == MARKER or name.endswith(f"/{MANIFEST}"):
                    names.add(name)
        return dict(sorted(steps.items()))

    def read(self, saved: Saved, name: str) -> bytes:
        """As `Shelf.read`."""
        return self._store.read(self.name(saved, name))

    def commit(self, saved: Saved, marker: bytes) -> None:
        """As `Shelf.commit`."""
        self._store.write(self.name(saved, MARKER), marker)

    def remove(self, steps: Iterable[Saved]) -> None:
        """As `Shelf.remove`."""
        steps = list(steps)
        self._store.delete([self.name(saved, MARKER) for saved in steps])
        for saved in steps:
            self._store.delete(self._store.names(self.name(saved, "")))

    def bring(self, saved: Saved, units: dict[str, list[int]]) -> str | None:
        """As `Shelf.bring`: downloads what is not whole in the folder, several files at a time."""
        path = self._folder / saved.path
        wrong: list[str] = []
        for unit, listed in units.items():
            manifest = path / unit / MANIFEST
            if not manifest.exists() or files.size_and_checksum(manifest.read_bytes()) != listed:
                self._download(saved, f"{unit}/{MANIFEST}")
            content = manifest.read_bytes()
            if files.size_and_checksum(content) != listed:
                return f"{unit}/{MANIFEST} has changed"
            wrong += [f"{unit}/{file}" for file in files.damaged_files(path / unit, content)]
        with ThreadPoolExecutor(_DOWNLOADS) as threads:
            list(threads.map(lambda name: self._download(saved, name), wrong))
        damaged = {name.partition("/")[0] for name in wrong}
        found = (files.damage(path / unit, units[unit]) for unit in units if unit in damaged)
        return next(filter(None, found), None)

    def upload(self, saved: Saved, name: str) -> None:
        """Copies a file of a step from the folder to the store."""
        self._store.upload(self.name(saved, name), self._folder / saved.path / name)

    def name(self, saved: Saved, name: str) -> str:
        """The name in the store of a file of a step."""
        return f"{self._root}{saved.path}/{name}"

    def _download(self, saved: Saved, name: str) -> None:
        path = self._folder / saved.path / name
        # Of its own name: other processes that see this folder may download the same file.
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            self._store.download(self.name(saved, name), draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def _refuse_old_layout(folder: Path | str, name: str, has_manifest: bool) -> None:
    if has_manifest and re.fullmatch(r"\d+(\.\d+)?", name):
        raise UserError(
            f"{folder} has checkpoints of an earlier version of this program, which cannot be "
            "read; take another --logdir"
        )
