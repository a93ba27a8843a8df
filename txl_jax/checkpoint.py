"""Checkpoints of a train state: written in the background by every process, read only if whole.

Replicated leaves are written once, by process 0; of those that are split over devices every
process writes what it holds (`checkpoint_files` shows the files). Process 0 commits a step when all
of it is there: with a marker, written last, in one atomic step. A step without its marker is under
way, or the remains of a save that was cut short. It is never read.

No process talks to another in the background, where no collective may run. They meet in the folder
that all of them see, or in the store to which each uploads its files.
"""

import json
import math
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np

from txl_jax import blocks, checkpoint_files
from txl_jax.blocks import Box
from txl_jax.checkpoint_files import BEST, LATEST, MANIFEST, MARKER, WHOLE, Saved
from txl_jax.checkpoint_leaves import PyTree, block_name, by_name, describe, words_of
from txl_jax.checkpoint_reader import (
    Gather,
    alone,
    everyone,
    next_attempt,
    open_shelf,
    restore_newest,
)
from txl_jax.checkpoint_shelf import FolderShelf, Shelf, StoreShelf, committed, superseded
from txl_jax.errors import UserError
from txl_jax.store import Store


class Mirror(Protocol):
    """What copies files to a store in the background."""

    def submit(self, key: str, what: str, job: Callable[[Callable[[], bool]], None]) -> None:
        """Has `job(cancelled)` run on a thread of the mirror's, again later if it raises OSError.

        A job that was not begun goes when a newer one comes with the same key; `cancelled()` is
        true in one that was. `what` names it in messages.
        """
        ...


class Checkpoints:
    """The checkpoints of one run. All its processes have one, and call its methods alike."""

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        attempt: int | None = None,
        store: Store | None = None,
        mirror: Mirror | None = None,
        gather: Gather | None = None,
        patience: float = 300,
    ) -> None:
        """Opens `folder`, makes it if need be, and clears away saves that were cut short.

        Args:
          folder: every process sees the same one; or, with a store, the one of this machine.
          keep: so many of the newest steps stay, and so many of the best. Two or more let a run go
            on from the one before when the newest turns out damaged, and other processes read the
            newest while it is being superseded.
          attempt: the number of the run's start, the same in all its processes and higher than in
            any start before. A single process without a store finds the next one by itself.
          store: where checkpoints are kept if not in the folder, which holds copies then: at most
            keep + 1 of each series. They are named there as here, from the folder's name on.
          mirror: with a store: what uploads to it.
          gather: how the processes agree, called by the main thread only. A single process needs
            none.
          patience: seconds for which process 0 waits for what other processes have to write, in
            `wait`, `close` and `restore`. In the background, until it says so on standard error, or
            has the mirror say so; it goes on waiting then.

        Raises UserError if the folder cannot be written, or was written by another version.
        """
        if (store is None) != (mirror is None):
            raise ValueError("a store goes with a mirror")
        self._folder = folder
        self._keep = keep
        self._mirror = mirror
        self._gather = gather or alone
        self._patience = patience
        self._process = jax.process_index()
        by_itself = jax.process_count() == 1 and store is None
        self._local = FolderShelf(folder)
        self._shelf: Shelf = StoreShelf(store, folder) if store else self._local
        self._to_read = open_shelf(folder, store)
        try:
            for series in (LATEST, BEST):
                (folder / series).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder / series).close()
            steps = self._local.found(LATEST) | self._local.found(BEST)
            if attempt is None:
                if not by_itself:
                    raise ValueError("processes that share checkpoints have to be told the attempt")
                attempt = next_attempt(folder)
            self._attempt = attempt
            if self._process == 0 and store is None:
                # What has this attempt's number, other processes may be writing by now.
                self._local.remove(
                    saved
                    for saved, names in steps.items()
                    if MARKER not in names and saved.attempt < attempt
                )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writes: dict[str, Future[None]] = {}
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._commits: list[Future[None]] = []
        self._waiting: list[_Step] = []
        self._newest: dict[str, Saved] = {}
        self._committing = threading.Lock()
        self._deadline = math.inf

    def save(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
        """Saves `state` as that of `step`; returns when it is copied, before it is written.

        `state`: a pytree of arrays, typed random keys included; its buffers may be donated as soon
        as this returns. `info`: what JSON can hold; `restore` returns it.

        If this process is still writing the save before, this waits for it, so that copies do not
        pile up in the host's memory. It does not wait for other processes, nor for uploads. Once
        the new checkpoint is whole, older ones beyond `keep` go, and so do those of later steps:
        training went on from before them because they were damaged.

        Raises UserError if a save before this one failed; those before that are still there.
        """
        self._save(LATEST, step, state, info)

    def save_best(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
        """As `save`, but apart from the others: `state` is the best so far."""
        self._save(BEST, step, state, info)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, the best apart, newest last; damage is not looked for.

        With a store that is away: those of which this machine knows.
        """
        try:
            found = self._shelf.found(LATEST)
        except OSError:
            found = self._local.found(LATEST)
        return sorted({saved.step for saved in committed(found)})

    def restore(
        self, abstract_state: PyTree, may_differ: str | None = None
    ) -> tuple[PyTree, dict[str, Any]] | None:
        """State and info of the newest whole checkpoint; None if there is none at all.

        `abstract_state`: the state's tree, with arrays or `jax.ShapeDtypeStruct`s as leaves. Each
        leaf comes back with the sharding given there (without one: on the first device), in
        buffers of its own that may be donated. The processes and devices may be others than those
        that saved it. Each process reads, and downloads, only what its devices hold.

        `may_differ`: how the names of some leaves begin, such as `memory/`. If one of them has
        another shape or type in the checkpoint, all are returned as they are in `abstract_state`.

        All processes call this and get the same step: the newest that process 0 sees. A checkpoint
        that one of them finds damaged gets a line on its standard error, and all take the one
        before.

        Raises UserError if all are damaged, if a leaf is missing, is not wanted, or has another
        shape or type, or if the store cannot be reached.
        """
        failed = None
        try:
            self.wait()
        except UserError as error:
            failed = error
        if not everyone(self._gather, failed is None):
            raise failed or UserError("another process could not write its part of a checkpoint")
        return restore_newest(
            self._to_read, self._folder, LATEST, abstract_state, "", self._gather, may_differ
        )

    def wait(self) -> None:
        """Returns when everything saved is on the disk. Raises UserError if that failed.

        Without a store: when it is committed, which process 0 knows. Uploads to a store are the
        mirror's.
        """
        self._finish(list(self._writes))
        self._deadline = time.monotonic() + self._patience
        try:
            while self._commits:
                self._commits.pop(0).result()
        finally:
            self._deadline = math.inf

    def close(self) -> None:
        """Waits as `wait` does and ends the background threads; nothing can be saved after it."""
        try:
            self.wait()
        finally:
            self._deadline = -math.inf
            self._writer.shutdown()
            self._committer.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except UserError as failed_save:
            if error is None:
                raise
            error.add_note(f"besides, {failed_save}")

    def _save(self, series: str, step: int, state: PyTree, info: dict[str, Any]) -> None:
        self._finish([key for key, write in self._writes.items() if key == series or write.done()])
        while self._commits and self._commits[0].done():
            self._commits.pop(0).result()
        named = by_name(state)
        leaves = {name: describe(leaf) for name, leaf in named.items()}
        words = {name: words_of(leaf) for name, leaf in named.items() if leaf.size > 0}
        parts = {
            name: blocks.parts(array.sharding, array.shape)
            for name, array in words.items()
            if isinstance(array, jax.Array) and not array.sharding.is_fully_replicated
        }
        processes = sorted({process for boxes in parts.values() for process in boxes})
        units = _copies(words, parts, self._process)
        new = _Step(
            Saved(series, step, self._attempt),
            # The writer gets a copy of what the caller may change, and errors show up here.
            json.loads(json.dumps(info)),
            leaves,
            [WHOLE, *(checkpoint_files.part(process) for process in processes)],
        )
        self._writes[series] = self._writer.submit(self._write, new, units)

    def _finish(self, series: list[str]) -> None:
        for key in series:
            self._writes.pop(key).result()

    def _write(self, new: "_Step", units: "dict[str, _Unit]") -> None:
        """Writes what this process has of a step, and has it committed or uploaded."""
        path = self._folder / new.saved.path
        if any((path / unit / MANIFEST).exists() for unit in units):
            raise ValueError(f"{path} has been saved already")
        with _failed_writes(path, list(units)):
            for name, unit in units.items():
                checkpoint_files.write_unit(path, new.saved, name, unit.arrays, unit.boxes)
        if self._mirror:
            if units:
                job = partial(self._upload, new, list(units), set())
                what = f"checkpoint {new.saved.path}"
                self._mirror.submit(new.saved.series or "latest", what, job)
            self._prune_copies(new.saved)
        elif self._process == 0 and not self._commit(new):
            self._waiting.append(new)
            self._commits.append(self._committer.submit(self._wait_for_parts, new))

    def _commit(self, new: "_Step") -> bool:
        """Commits a step if it is whole, and removes older ones; whether it, or a later one, is."""
        series = new.saved.series
        path = self._folder / new.saved.path
        with self._committing, _failed_writes(path, [WHOLE, checkpoint_files.part(0)]):
            if series in self._newest and new.saved <= self._newest[series]:
                return True
            if new.missing(self._shelf.found(series)):
                return False
            self._shelf.commit(new.saved, new.marker(self._shelf))
            self._newest[series] = new.saved
            self._shelf.remove(superseded(self._shelf.found(series), new.saved, self._keep))
        return True

    def _wait_for_parts(self, new: "_Step") -> None:
        """Returns once a step, or a later one of its series, is whole and committed."""
        late, said = time.monotonic() + self._patience, False
        for pause in _pauses(longest=0.5):
            later = [other for other in self._waiting if other.saved.series == new.saved.series]
            if any(self._commit(step) for step in (new, *later) if step.saved >= new.saved):
                break
            if time.monotonic() > self._deadline:
                missing = new.missing(self._shelf.found(new.saved.series))
                raise UserError(
                    f"checkpoint {self._folder / new.saved.path} is not whole: {', '.join(missing)}"
                    " did not come from other processes; earlier checkpoints are unharmed"
                )
            if time.monotonic() > late and not said:
                missing = new.missing(self._shelf.found(new.saved.series))
                print(
                    f"checkpoint {self._folder / new.saved.path} is not whole after "
                    f"{self._patience:.0f} s: {', '.join(missing)} did not come from other "
                    "processes yet; training goes on",
                    file=sys.stderr,
                    flush=True,
                )
                said = True
            time.sleep(pause)
        self._waiting.remove(new)

    def _upload(
        self, new: "_Step", units: list[str], done: set[str], cancelled: Callable[[], bool]
    ) -> None:
        """Uploads this process's units of a step; process 0 commits it when all others' are there.

        `done`: names of files that an earlier try has uploaded. Once begun it goes on also if there
        is a newer step: where uploads take longer than it is from save to save, none would ever be
        committed otherwise. It ends when its files are gone from this machine, `keep` saves later.
        """
        assert isinstance(self._shelf, StoreShelf)
        if cancelled():
            return
        path = self._folder / new.saved.path
        for unit in units:
            try:
                manifest = (path / unit / MANIFEST).read_bytes()
                for file in (*checkpoint_files.listed_files(manifest), MANIFEST):
                    if f"{unit}/{file}" not in done:
                        self._shelf.upload(new.saved, f"{unit}/{file}")
                        done.add(f"{unit}/{file}")
            except FileNotFoundError:
                if cancelled():  # superseded, and its copy here is gone
                    return
                raise
        if self._process == 0 and self._all_uploaded(new, cancelled):
            marker = new.marker(self._shelf)
            self._shelf.commit(new.saved, marker)
            with suppress(OSError):  # the copy is superseded, and gone
                self._local.commit(new.saved, marker)
            steps = self._shelf.found(new.saved.series)
            self._shelf.remove(superseded(steps, new.saved, self._keep))

    def _all_uploaded(self, new: "_Step", cancelled: Callable[[], bool]) -> bool:
        """Waits until all units of a step are in the store; False if that will never be.

        Raises TimeoutError after `patience`.
        """
        deadline = time.monotonic() + self._patience
        for pause in _pauses(longest=2):
            steps = self._shelf.found(new.saved.series)
            missing = new.missing(steps)
            if not missing:
                return True
            later = {name for saved, names in steps.items() if saved > new.saved for name in names}
            given_up = any(f"{unit}/{MANIFEST}" in later for unit in missing)
            if cancelled() and (given_up or not (self._folder / new.saved.path / WHOLE).exists()):
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"checkpoint {new.saved.path}: {', '.join(missing)} did not come from other "
                    "processes"
                )
            time.sleep(pause)
        raise AssertionError("pauses do not end")

    def _prune_copies(self, new: Saved) -> None:
        """Removes from this machine older steps than the newest `keep`; it is about the disk only.

        Of this attempt's, other processes of the machine remove what is theirs themselves.
        """
        own = [checkpoint_files.part(self._process), *([WHOLE] if self._process == 0 else [])]
        steps = [saved for saved in self._local.found(new.series) if saved.attempt <= new.attempt]
        kept = [saved for saved in steps if saved <= new][-self._keep :]
        for saved in steps:
            if saved in kept:
                continue
            if saved.attempt < new.attempt:
                self._local.remove([saved])
                continue
            if self._process == 0:
                (self._folder / saved.path / MARKER).unlink(missing_ok=True)
            _remove_units(self._folder / saved.path, own)


class _Unit(NamedTuple):
    """What one process writes of a step into one folder."""

    arrays: dict[str, np.ndarray]
    boxes: dict[str, list[Box]]
    """Where the arrays of split leaves are in the leaves."""


@dataclass(frozen=True)
class _Step:
    """What process 0 has to know to commit a step."""

    saved: Saved
    info: dict[str, Any]
    leaves: dict[str, str]
    units: list[str]
    """All that the processes write together."""

    def missing(self, steps: dict[Saved, set[str]]) -> list[str]:
        """The units that are not there yet."""
        there = steps.get(self.saved, set())
        return [unit for unit in self.units if f"{unit}/{MANIFEST}" not in there]

    def marker(self, shelf: Shelf) -> bytes:
        """What commits the step, all of whose units are there."""
        manifests = {unit: shelf.read(self.saved, f"{unit}/{MANIFEST}") for unit in self.units}
        return checkpoint_files.make_marker(self.saved, self.info, self.leaves, manifests).encode()


def _copies(
    words: dict[str, Any], parts: dict[str, dict[int, list[Box]]], process: int
) -> dict[str, _Unit]:
    """Copies on the host of what this process has to write.

    `words`: the leaves; `parts`: the boxes of each process for those that are split.
    """
    whole = {name: leaf for name, leaf in words.items() if name not in parts and process == 0}
    boxes = {name: of[process] for name, of in parts.items() if process in of}
    held = {
        block_name(name, number): (box, words[name].dtype, blocks.held(words[name], box))
        for name, listed in boxes.items()
        for number, box in enumerate(listed)
    }
    for array in (*whole.values(), *(data for *_, found in held.values() for _, data in found)):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    units = {}
    if process == 0:
        # np.asarray would not do: on the CPU it is a view of a buffer that is about to be donated.
        units[WHOLE] = _Unit({name: np.array(array) for name, array in whole.items()}, {})
    if boxes:
        arrays = {
            name: blocks.gather(box, dtype, [(at, np.asarray(data)) for at, data in found])
            for name, (box, dtype, found) in held.items()
        }
        units[checkpoint_files.part(process)] = _Unit(arrays, boxes)
    return units


@contextmanager
def _failed_writes(path: Path, units: list[str]) -> Iterator[None]:
    """Removes `units` of a step that cannot be written, and says why."""
    try:
        yield
    except Exception as error:
        if not (path / MARKER).exists():
            _remove_units(path, units)
        reason = checkpoint_files.system_reason(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write checkpoint {path}: {reason}; earlier checkpoints are unharmed"
        ) from error


def _remove_units(path: Path, units: list[str]) -> None:
    """Removes units of a step, and the step's folder if nothing else is in it."""
    for unit in units:
        shutil.rmtree(path / unit, ignore_errors=True)
    with suppress(OSError):  # the rest is other processes'
        path.rmdir()


def _pauses(longest: float) -> Iterator[float]:
    """Seconds to wait before each new look at what other processes do."""
    pause = 0.01
    while True:
        yield pause
        pause = min(2 * pause, longest)
