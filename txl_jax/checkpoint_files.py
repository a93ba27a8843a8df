"""The files of one step's checkpoint: what each process writes, and the marker that commits it.

    120.0/                 step 120, saved by the run's attempt 0
        whole/             leaves of which every device holds the whole: written by process 0
            arrays/        as Orbax stores them, by name
            manifest.json  size and checksum of every file in arrays/
        part-3/            blocks that process 3 holds of the leaves that are split over devices
            arrays/        by the leaf's name and the block's number in the manifest
            manifest.json  besides: which blocks of which leaves these are
        commit.json        what the caller wanted noted, every leaf's shape and type, where its
                           blocks are, and the checksum of every manifest

Manifests and the marker appear in one atomic step, when everything that they vouch for is there.

The checksum is CRC-32: it finds every error of up to 32 bits in a row, misses one in four thousand
million of the others, and outruns disks on any processor. It guards against accidents, not against
forgery.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from txl_jax import storage
from txl_jax.blocks import Box

MANIFEST = "manifest.json"
MARKER = "commit.json"
LATEST, BEST = "", "best"
"""The two series of steps: folders within that of the checkpoints."""
WHOLE = "whole"
_ARRAYS = "arrays"
_ROOM_BESIDES = 1 << 20
"""Bytes set aside for Orbax's own files, some tens of kB, and for blocks not quite full."""


class Saved(NamedTuple):
    """One saving of a step. The later of two has the higher step, or else the higher attempt."""

    series: str
    """Where its folder is within that of all checkpoints: "" or "best"."""
    step: int
    attempt: int
    """The number of the run's start that saved it: it tells two of the same step apart."""

    @property
    def name(self) -> str:
        return f"{self.step}.{self.attempt}"

    @property
    def path(self) -> str:
        """Its folder, from that of all checkpoints."""
        return f"{self.series}/{self.name}" if self.series else self.name

    @classmethod
    def of(cls, series: str, name: str) -> Self | None:
        """From the name of a folder; None if it is another folder."""
        match = re.fullmatch(r"(\d+)\.(\d+)", name)
        return cls(series, int(match[1]), int(match[2])) if match else None


def part(process: int) -> str:
    """The name of the folder with what a process holds of split leaves."""
    return f"part-{process}"


@dataclass(frozen=True)
class Marker:
    """What commits a step: its content vouches for all other files."""

    step: int
    attempt: int
    info: dict[str, Any]
    leaves: dict[str, str]
    """Shape and type of every leaf."""
    blocks: dict[str, dict[str, list[Box]]]
    """For each split leaf, the blocks that each part holds of it, in order of their numbers."""
    units: dict[str, list[int]]
    """Size and checksum of the manifest of `whole` and of each part."""

    def encode(self) -> bytes:
        return _sealed(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Raises ValueError if `raw` is not what `encode` made."""
        content = _unsealed(raw)
        content["blocks"] = {
            name: {unit: _boxes(boxes) for unit, boxes in units.items()}
            for name, units in content["blocks"].items()
        }
        return cls(**content)


def make_marker(
    saved: Saved, info: dict[str, Any], leaves: dict[str, str], manifests: dict[str, bytes]
) -> Marker:
    """The marker of a step from what its caller noted and the manifests of all its units.

    Raises ValueError if a manifest is damaged or is another step's.
    """
    blocks: dict[str, dict[str, list[Box]]] = {}
    for unit, raw in manifests.items():
        content = _unsealed(raw)
        if (content["step"], content["attempt"]) != (saved.step, saved.attempt):
            raise ValueError(f"{unit}/{MANIFEST} is another step's")
        for name, boxes in content["blocks"].items():
            blocks.setdefault(name, {})[unit] = _boxes(boxes)
    units = {unit: size_and_checksum(raw) for unit, raw in manifests.items()}
    return Marker(saved.step, saved.attempt, info, leaves, blocks, units)


def write_unit(
    folder: Path, saved: Saved, unit: str, arrays: dict[str, np.ndarray], blocks: dict[str, list]
) -> None:
    """Writes one unit of a step's folder so that it would survive a power cut, its manifest last.

    `arrays`: by name, none of size 0. `blocks`: for the manifest, the boxes of each split leaf.

    Raises OSError, or what `system_reason` knows the reason of, if that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A full disk is found out here, with nothing written. Orbax would find it out too, but each
    # of its writes under way would print a traceback of its own past any logger.
    with tempfile.TemporaryFile(dir=folder) as room:
        needed = sum(array.nbytes for array in arrays.values()) + _ROOM_BESIDES
        os.posix_fallocate(room.fileno(), 0, needed)
    path = folder / unit
    shutil.rmtree(path, ignore_errors=True)
    if arrays:
        with _orbax() as orbax:
            orbax.save((path / _ARRAYS).absolute(), args=ocp.args.PyTreeSave(arrays))
    path.mkdir(exist_ok=True)
    files = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        sync(file)
        files[file.relative_to(path).as_posix()] = _size_and_checksum_of(file)
    for inner in path.rglob("*"):
        if inner.is_dir():
            sync(inner)
    content = {"step": saved.step, "attempt": saved.attempt, "blocks": blocks, "files": files}
    write_whole(path / MANIFEST, _sealed(content))
    sync(folder)


def read_unit(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of a unit's folder, by name. Raises OSError or ValueError if they are not there."""
    wanted = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
    if not wanted:
        return {}
    with _orbax() as orbax:
        return orbax.restore(
            (path / _ARRAYS).absolute(),
            args=ocp.args.PyTreeRestore(
                dict.fromkeys(wanted, 0), restore_args=wanted, partial_restore=True
            ),
        )


def damage(path: Path, listed: list[int]) -> str | None:
    """What is wrong in the folder of a unit, whose manifest the marker has `listed`; or None."""
    name = f"{path.name}/{MANIFEST}"
    try:
        raw = (path / MANIFEST).read_bytes()
    except OSError as error:
        return f"{name}: {error.strerror}"
    if size_and_checksum(raw) != listed:
        return f"{name} has changed"
    for file in damaged_files(path, raw):
        here = "has changed" if (path / file).exists() else "is missing"
        return f"{path.name}/{file} {here}"
    return None


def damaged_files(path: Path, manifest: bytes) -> list[str]:
    """The files of a unit's folder that are not as its manifest says.

    Raises ValueError if the manifest is damaged.
    """
    wrong = []
    for name, listed in _unsealed(manifest)["files"].items():
        try:
            found = _size_and_checksum_of(path / name)
        except OSError:
            found = None
        if found != listed:
            wrong.append(name)
    return wrong


def listed_files(manifest: bytes) -> list[str]:
    """The files that a whole manifest vouches for."""
    return list(_unsealed(manifest)["files"])


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears whole, for good, or not at all."""
    storage.write_bytes(path, content)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_and_checksum(content: bytes) -> list[int]:
    return [len(content), zlib.crc32(content)]


def _size_and_checksum_of(file: Path) -> list[int]:
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]


def _sealed(content: dict[str, Any]) -> bytes:
    # As it will be read back: JSON has no tuples.
    content = json.loads(json.dumps(content))
    return json.dumps({"checksum": _checksum(content), "content": content}).encode()


def _unsealed(raw: bytes) -> dict[str, Any]:
    """Raises ValueError if `raw` is not what `_sealed` made."""
    try:
        found = json.loads(raw)
        if found["checksum"] == _checksum(found["content"]):
            return found["content"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("cannot be read") from error
    raise ValueError("has changed")


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _boxes(listed: list) -> list[Box]:
    return [tuple((start, stop) for start, stop in box) for box in listed]


def system_reason(error: Exception) -> str | None:
    """The operating system's reason for a failed write, if that is what the error is about."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore, which does the writing, has the number in the text of a ValueError.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else None


class _Arrays(ocp.type_handlers.NumpyHandler):
    """NumPy arrays of any process. Orbax's own handler writes those of process 0 and no others."""

    async def serialize(
        self,
        values: Sequence[np.ndarray],
        infos: Sequence[Any],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        """Writes `values` where Orbax looks for them; nothing is left for it to wait for."""

        async def write(array: np.ndarray, info: Any) -> None:
            await info.await_path_creation()
            base = f"{info.parent_dir}/ocdbt.process_{jax.process_index()}/"
            store = await tensorstore.open(
                {
                    "driver": "zarr",
                    "kvstore": {
                        "driver": "ocdbt",
                        "base": {"driver": "file", "path": base},
                        "path": f"{info.name}/",
                    },
                    # Compression would gain a tenth and take most of the time.
                    "metadata": {"compressor": None, "chunks": array.shape},
                },
                create=True,
                dtype=array.dtype,
                shape=array.shape,
                # What the arrays have in common: few files instead of some dozens for each.
                context=info.ts_context,
            )
            await store.write(array, can_reference_source_data_indefinitely=True)

        await asyncio.gather(
            *(write(array, info) for array, info in zip(values, infos, strict=True))
        )
        return []


def _orbax() -> ocp.Checkpointer:
    """Orbax for this process alone: it waits for no other."""
    # Orbax logs each failed write several times with tracebacks; it raises the same error as well.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process-{process}",
    )
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _Arrays()))
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=alone
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
