"""Reads checkpoints: the newest that is whole, and of it what this process needs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from txl_jax import blocks, checkpoint_files
from txl_jax.blocks import Box
from txl_jax.checkpoint_files import BEST, LATEST, MARKER, WHOLE, Marker, Saved
from txl_jax.checkpoint_leaves import (
    PyTree,
    block_name,
    by_name,
    describe,
    like,
    sharding_of,
    words_of,
)
from txl_jax.checkpoint_shelf import FolderShelf, Shelf, StoreShelf, committed
from txl_jax.errors import UserError
from txl_jax.store import Patient, Store

Gather = Callable[[str, str], list[str]]
"""A collective: what each process passes under a name, in the order of their numbers."""


def exists(folder: Path, store: Store | None = None) -> bool:
    """Whether a run that keeps its checkpoints in `folder`, or `store`, has one to go on from.

    Raises UserError if it has those of another version, or if the store cannot be reached.
    """
    shelf = open_shelf(folder, store)
    with reached(shelf, folder):
        return bool(committed(shelf.found(LATEST)))


def next_attempt(folder: Path, store: Store | None = None) -> int:
    """Higher than the attempt of any step, whole or not, in `folder` or in `store`.

    A start that S3 never heard of may have left steps in the folder.

    Raises UserError as `exists`.
    """
    shelf = open_shelf(folder, store)
    with reached(shelf, folder):
        shelves = FolderShelf(folder), shelf
        found = [where.found(series) for where in shelves for series in (LATEST, BEST)]
        return max((saved.attempt + 1 for steps in found for saved in steps), default=0)


def restore_params(
    folder: Path,
    abstract_params: PyTree,
    which: Literal["best", "latest"] | int = "best",
    store: Store | None = None,
    gather: Gather | None = None,
) -> tuple[PyTree, dict[str, Any]]:
    """The `params` of a saved state and its info, to use a model without training it further.

    `folder` and `store` as in `Checkpoints`; nothing is changed there, and training may go on
    meanwhile. What is downloaded from a store stays in the folder. `abstract_params` as in
    `Checkpoints.restore`, but only for what the state has under `params`; the rest (optimizer
    state, memory) is not loaded. `which`: a step, or `latest` or `best`, where a damaged checkpoint
    gives way to the one before it if there is one. `gather`, as in `Checkpoints`, has the
    processes of a run agree on that one; without it each reads for itself.

    Raises UserError as `Checkpoints.restore`, and if there is no such checkpoint.
    """
    wanted, shelf = {"params": abstract_params}, open_shelf(folder, store)
    if isinstance(which, int):
        with reached(shelf, folder):
            steps = committed(shelf.found(LATEST))
            same = [saved for saved in steps if saved.step == which]
            if not same:
                known = ", ".join(str(saved.step) for saved in steps) or "none"
                raise UserError(f"no checkpoint of step {which} in {folder}; there are: {known}")
            look = _look(shelf, folder, same[-1], wanted, "params/")
            if look.damage or not look.marker:
                raise UserError(
                    f"checkpoint {folder / same[-1].path} is damaged ({look.damage or 'it is gone'}"
                    "); take another step"
                )
            state, info = _read(folder, look, wanted)
    else:
        series = BEST if which == "best" else LATEST
        restored = restore_newest(shelf, folder, series, wanted, "params/", gather or alone)
        if restored is None:
            raise UserError(
                f"no checkpoint in {folder / series}; train first, or name another folder"
            )
        state, info = restored
    return state["params"], info


class _Look(NamedTuple):
    """What came of looking at a committed step before its arrays are read."""

    saved: Saved
    marker: Marker | None
    """None if it is damaged, or has been superseded meanwhile."""
    damage: str | None
    misfit: str | None = None
    """What the state that is wanted and the one that is stored do not agree in."""
    named: dict[str, Any] | None = None
    """By name, the leaves to read: all that are wanted, or those that have to agree."""


def restore_newest(
    shelf: Shelf,
    folder: Path,
    series: str,
    wanted: PyTree,
    within: str,
    gather: Gather,
    may_differ: str | None = None,
) -> tuple[PyTree, dict[str, Any]] | None:
    """As `Checkpoints.restore`; names of leaves have to be the same if they begin with `within`."""
    tried: list[Saved] = []
    damaged: list[str] = []
    with reached(shelf, folder):
        # Listed again each time: the process that trains may have committed a newer one meanwhile.
        # Process 0 has committed them; others may not see them yet, where folders are cached.
        while name := gather("newest", _newest(shelf, series, tried))[0]:
            saved = Saved.of(series, name)
            assert saved is not None
            tried.append(saved)
            look = _look(shelf, folder, saved, wanted, within, may_differ)
            if everyone(gather, look.marker is not None and look.damage is None):
                for line in damaged:
                    print(f"{line}; going back to {saved.name}", file=sys.stderr)
                try:
                    return _read(folder, look, wanted)
                except (OSError, ValueError):
                    if saved in committed(shelf.found(series)):
                        raise
            elif look.damage or (look.marker is None and gather is not alone):
                why = look.damage or f"{MARKER} is not seen here"
                damaged.append(f"checkpoint {folder / saved.path} is damaged ({why})")
    if damaged or (tried and gather is not alone):
        newest = damaged[0] if damaged else "another process says that it is damaged"
        raise UserError(
            f"no whole checkpoint in {folder / series} (newest: {newest}); "
            "put a copy there, or delete the folder to start again"
        )
    return None


def _look(
    shelf: Shelf,
    folder: Path,
    saved: Saved,
    wanted: PyTree,
    within: str,
    may_differ: str | None = None,
) -> _Look:
    """Looks at all of a step that this process needs; with a store it is in the folder then."""
    try:
        raw = shelf.read(saved, MARKER)
    except FileNotFoundError:
        return _Look(saved, None, None)
    try:
        marker = Marker.decode(raw)
    except ValueError as error:
        return _Look(saved, None, f"{MARKER} {error}")
    if (marker.step, marker.attempt) != (saved.step, saved.attempt):
        return _Look(saved, None, f"{MARKER} is that of another step")
    named = by_name(wanted)
    stored = {name: leaf for name, leaf in marker.leaves.items() if name.startswith(within)}
    here = {name: describe(leaf) for name, leaf in named.items()}
    wrong = [name for name in here | stored if here.get(name) != stored.get(name)]
    left_out = {name for name in here | stored if may_differ and name.startswith(may_differ)}
    if left_out.isdisjoint(wrong):
        left_out = set()
    for name in wrong:
        if name not in left_out:
            there, should = stored.get(name, "absent"), here.get(name, "absent")
            misfit = f"{name} is {there} in it and should be {should}"
            return _Look(saved, marker, None, misfit)
    named = {name: leaf for name, leaf in named.items() if name not in left_out}
    needed = {unit for name, leaf in named.items() for unit, *_ in _sources(marker, name, leaf)}
    units = {unit: listed for unit, listed in marker.units.items() if unit in needed}
    try:
        return _Look(saved, marker, shelf.bring(saved, units), named=named)
    except FileNotFoundError as error:
        gone = MARKER not in shelf.found(saved.series).get(saved, ())
        return _Look(saved, None, None if gone else f"{error.filename or error} is missing")


def _read(folder: Path, look: _Look, wanted: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The leaves of `wanted` from a step that `_look` found whole, and its info."""
    marker, path = look.marker, folder / look.saved.path
    if look.misfit:
        raise UserError(
            f"checkpoint {path} does not fit: {look.misfit}; "
            "use the config that it was made with, or another folder"
        )
    assert marker is not None and look.named is not None
    sources = {name: _sources(marker, name, leaf) for name, leaf in look.named.items()}
    names: dict[str, list[str]] = {}
    for unit, array, _ in (source for listed in sources.values() for source in listed):
        names.setdefault(unit, []).append(array)
    arrays = {
        unit: checkpoint_files.read_unit(path / unit, listed) for unit, listed in names.items()
    }
    leaves = by_name(wanted)
    for name, leaf in look.named.items():
        words = jax.eval_shape(words_of, leaf)
        stored = [(box, arrays[unit].pop(array)) for unit, array, box in sources[name]]
        value = blocks.place(sharding_of(leaf), words.shape, words.dtype, stored)
        leaves[name] = like(leaf, value)
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves.values()), marker.info


def _sources(marker: Marker, name: str, leaf: Any) -> list[tuple[str, str, Box]]:
    """Where what this process needs of a leaf is stored: unit, name of the array, its box."""
    shape = jax.eval_shape(words_of, leaf).shape
    if 0 in shape:
        return []
    if name not in marker.blocks:
        return [(WHOLE, name, blocks.everything(shape))]
    needed = blocks.boxes_here(sharding_of(leaf), shape)
    return [
        (unit, block_name(name, number), box)
        for unit, boxes in marker.blocks[name].items()
        for number, box in enumerate(boxes)
        if any(blocks.overlap(box, wanted) is not None for wanted in needed)
    ]


def _newest(shelf: Shelf, series: str, tried: list[Saved]) -> str:
    """The name of the newest committed step that was not tried; empty if there is none."""
    left = [saved for saved in committed(shelf.found(series)) if saved not in tried]
    return left[-1].name if left else ""


def alone(name: str, value: str) -> list[str]:
    """As `Gather`, where there is one process."""
    return [value]


def everyone(gather: Gather, ok: bool) -> bool:
    """Whether all processes say true."""
    return all(gather("everyone", "ok" * ok))


def open_shelf(folder: Path, store: Store | None) -> Shelf:
    """Where the checkpoints of `folder` are read: there, or in its store, with patience."""
    return StoreShelf(Patient(store), folder) if store else FolderShelf(folder)


@contextmanager
def reached(where: Any, folder: Path) -> Iterator[None]:
    """Turns a store that cannot be reached into a UserError."""
    try:
        yield
    except OSError as error:
        if not isinstance(where, StoreShelf):
            raise
        raise UserError(
            f"cannot read the checkpoints of {folder} from its store: {error}; the same command "
            "goes on when it is back"
        ) from error
