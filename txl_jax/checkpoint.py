"""Checkpoints of a train state: written by Orbax in the background, read only if they are whole.

Layout of a folder of checkpoints:

    120/                 the state after step 120
        arrays/          the state's leaves, by name, as Orbax stores them
        manifest.json    what the caller wanted noted, every leaf's shape and type, and the size and
                         checksum of every file in arrays/
    best/110/            the same, for the best step so far

The manifest is written last, in one atomic step, when everything else is on the disk. It makes the
checkpoint exist: a folder without one is the remains of a save that was cut short, is never read,
and goes when training starts again. A checkpoint of a step that has one already goes into a folder
of its own (120.1/), so that nothing is taken away before what takes its place is there.

The checksum is CRC-32: it finds every error of up to 32 bits in a row, misses one in four thousand
million of the others, and outruns disks on any processor. It guards against accidents, not against
forgery.
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from txl_jax.errors import UserError

PyTree = Any

_ARRAYS = "arrays"
_MANIFEST = "manifest.json"
_BEST = "best"
_ROOM_BESIDES = 1 << 20
"""Bytes set aside for Orbax's own files, some tens of kB, and for blocks not quite full."""


class Checkpoints:
    """The checkpoints of one run, for the one process that trains it."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Opens `folder`, makes it if need be, and clears away saves that were cut short.

        `keep`: so many of the newest steps stay, and so many of the best. Two or more let a run go
        on from the one before when the newest turns out damaged, and other processes read the
        newest while it is being superseded.

        Raises UserError if the folder cannot be written.
        """
        self._latest = folder
        self._best = folder / _BEST
        self._keep = keep
        try:
            for series in (self._latest, self._best):
                series.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=series).close()
                for path in _step_folders(series):
                    if not (path / _MANIFEST).exists():
                        shutil.rmtree(path)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writes: dict[Path, Future[None]] = {}

    def save(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
        """Saves `state` as that of `step`; returns when it is copied, before it is written.

        `state`: a pytree of arrays, typed random keys included; its buffers may be donated as soon
        as this returns. `info`: what JSON can hold; `restore` returns it.

        If the save before is still being written, this waits for it, so that copies do not pile up
        in the host's memory. Once the new checkpoint is whole and on the disk, older ones beyond
        `keep` go, and so do those of later steps: training went on from before them because they
        were damaged.

        Raises UserError if a save before this one failed; those before that are still there.
        """
        self._save(self._latest, step, state, info)

    def save_best(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
        """As `save`, but apart from the others: `state` is the best so far."""
        self._save(self._best, step, state, info)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, the best apart, newest last; damage is not looked for."""
        return sorted({_step(path) for path in _committed(self._latest)})

    def restore(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """State and info of the newest whole checkpoint; None if there is none at all.

        `abstract_state`: the state's tree, with arrays or `jax.ShapeDtypeStruct`s as leaves. Each
        leaf comes back with the sharding given there (without one: on the first device), in
        buffers of its own that may be donated.

        A damaged checkpoint gets a line on standard error, and the one before it is taken.

        Raises UserError if all are damaged, or if a leaf is missing, is not wanted, or has another
        shape or type.
        """
        self.wait()
        return _restore_newest(self._latest, abstract_state, within="")

    def wait(self) -> None:
        """Returns when everything saved is on the disk. Raises UserError if that failed."""
        self._finish(list(self._writes))

    def close(self) -> None:
        """Waits as `wait` does and ends the background thread; nothing can be saved after it."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

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

    def _save(self, series: Path, step: int, state: PyTree, info: dict[str, Any]) -> None:
        self._finish([key for key, write in self._writes.items() if key == series or write.done()])
        named = by_name(state)
        leaves = {name: _describe(leaf) for name, leaf in named.items()}
        # The writer gets a copy of what the caller may change, and errors show up here.
        content = json.loads(json.dumps({"info": info, "leaves": leaves}))
        words = {name: _words(leaf) for name, leaf in named.items() if leaf.size > 0}
        for array in words.values():
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        # np.asarray would not do: on the CPU it is a view of a buffer that is about to be donated.
        host = {name: np.array(array) for name, array in words.items()}
        self._writes[series] = self._writer.submit(_write, series, self._keep, step, host, content)

    def _finish(self, series: list[Path]) -> None:
        for key in series:
            self._writes.pop(key).result()


def exists(folder: Path) -> bool:
    """Whether a run that keeps its checkpoints in `folder` has one to go on from."""
    return bool(_committed(folder))


def restore_params(
    folder: Path, abstract_params: PyTree, which: Literal["best", "latest"] | int = "best"
) -> tuple[PyTree, dict[str, Any]]:
    """The `params` of a saved state and its info, to use a model without training it further.

    `folder` as in `Checkpoints`; nothing is changed there, and training may go on meanwhile.
    `abstract_params` as in `Checkpoints.restore`, but only for what the state has under `params`;
    the rest (optimizer state, memory) is not loaded. `which`: a step, or `latest` or `best`, where
    a damaged checkpoint gives way to the one before it if there is one.

    Raises UserError as `Checkpoints.restore`, and if there is no such checkpoint.
    """
    wanted = {"params": abstract_params}
    if isinstance(which, int):
        same = [path for path in _committed(folder) if _step(path) == which]
        if not same:
            known = ", ".join(str(_step(path)) for path in _committed(folder)) or "none"
            raise UserError(f"no checkpoint of step {which} in {folder}; there are: {known}")
        if damage := _damage(same[-1]):
            raise UserError(f"checkpoint {same[-1]} is damaged ({damage}); take another step")
        state, info = _read(same[-1], wanted, within="params/")
    else:
        series = folder / _BEST if which == "best" else folder
        restored = _restore_newest(series, wanted, within="params/")
        if restored is None:
            raise UserError(f"no checkpoint in {series}; train first, or name another folder")
        state, info = restored
    return state["params"], info


def _restore_newest(
    series: Path, wanted: PyTree, within: str
) -> tuple[PyTree, dict[str, Any]] | None:
    damaged: list[str] = []
    for path in reversed(_committed(series)):
        damage = _damage(path)
        if damage is None:
            for line in damaged:
                print(f"{line}; going back to {path.name}", file=sys.stderr)
            try:
                return _read(path, wanted, within)
            except (OSError, ValueError):
                if (path / _MANIFEST).exists():
                    raise
        if not (path / _MANIFEST).exists():
            # The process that trains has replaced it meanwhile: there is a newer one.
            return _restore_newest(series, wanted, within)
        damaged.append(f"checkpoint {path} is damaged ({damage})")
    if damaged:
        raise UserError(
            f"no whole checkpoint in {series} (newest: {damaged[0]}); "
            "put a copy there, or delete the folder to start again"
        )
    return None


def _read(path: Path, wanted: PyTree, within: str) -> tuple[PyTree, dict[str, Any]]:
    """The leaves of `wanted` from a whole checkpoint, and its info.

    The names of the leaves in `wanted` and of those in the checkpoint that begin with `within`
    have to be the same.
    """
    content = json.loads((path / _MANIFEST).read_text())["content"]
    named = by_name(wanted)
    stored = {name: leaf for name, leaf in content["leaves"].items() if name.startswith(within)}
    for name in [*named, *stored]:
        here = _describe(named[name]) if name in named else "absent"
        there = stored.get(name, "absent")
        if here != there:
            raise UserError(
                f"checkpoint {path} does not fit: {name} is {there} in it and should be {here}; "
                "use the config that it was made with, or another folder"
            )
    words = {
        name: jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=_sharding(leaf))
        for name, leaf in named.items()
        for words in [jax.eval_shape(_words, leaf)]
    }
    in_file = {name: leaf for name, leaf in words.items() if leaf.size > 0}
    with _orbax() as orbax:
        arrays = orbax.restore(
            (path / _ARRAYS).absolute(),
            args=ocp.args.PyTreeRestore(
                in_file,
                restore_args=ocp.checkpoint_utils.construct_restore_args(in_file),
                partial_restore=True,
            ),
        )
    leaves = []
    for name, leaf in named.items():
        if name in arrays:
            # What Orbax returns may lie in memory that NumPy owns, and cannot be donated then.
            value = jax.device_put(arrays.pop(name), words[name].sharding, may_alias=False)
        else:
            value = jnp.zeros(words[name].shape, words[name].dtype, device=words[name].sharding)
        leaves.append(_like(leaf, value))
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves), content["info"]


def _write(
    series: Path, keep: int, step: int, host: dict[str, np.ndarray], content: dict[str, Any]
) -> None:
    """Writes and commits one checkpoint, then removes what it makes superfluous in its series."""
    same = [_order(other)[1] for other in _step_folders(series) if _step(other) == step]
    path = series / (f"{step}.{max(same) + 1}" if same else str(step))
    try:
        # A full disk is found out here, with nothing written. Orbax would find it out too, but each
        # of its writes under way would print a traceback of its own past any logger.
        with tempfile.TemporaryFile(dir=series) as room:
            needed = sum(array.nbytes for array in host.values()) + _ROOM_BESIDES
            os.posix_fallocate(room.fileno(), 0, needed)
        with _orbax() as orbax:
            orbax.save((path / _ARRAYS).absolute(), args=ocp.args.PyTreeSave(host))
        _commit(path, content)
        older = [other for other in _committed(series) if _step(other) < step]
        kept = {path, *older[max(0, len(older) - keep + 1) :]}
        for other in set(_committed(series)) - kept:
            # Without its manifest it is gone, even if the rest outlives a kill.
            (other / _MANIFEST).unlink()
            shutil.rmtree(other)
    except Exception as error:
        if not (path / _MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)
        reason = _system_reason(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write checkpoint {path}: {reason}; earlier checkpoints are unharmed"
        ) from error


def _commit(path: Path, content: dict[str, Any]) -> None:
    """Puts all below `path` on the disk for good, and then the manifest."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = {}
    for file in files:
        _sync(file)
        listed[file.relative_to(path).as_posix()] = _size_and_checksum(file)
    for folder in [*(folder for folder in path.rglob("*") if folder.is_dir()), path, path.parent]:
        _sync(folder)
    content = {**content, "files": listed}
    draft = path / f"{_MANIFEST}.draft"
    draft.write_text(json.dumps({"checksum": _checksum(content), "content": content}))
    _sync(draft)
    draft.replace(path / _MANIFEST)
    _sync(path)


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a committed checkpoint; None if it is whole."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["checksum"] != _checksum(manifest["content"]):
            return f"{_MANIFEST} has changed"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    for name, listed in manifest["content"]["files"].items():
        try:
            found = _size_and_checksum(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != listed:
            return f"{name} has changed"
    return None


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _size_and_checksum(file: Path) -> list[int]:
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]


def _sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_folders(series: Path) -> list[Path]:
    """Folders of steps in order of step, then of writing, be they committed or not."""
    if not series.is_dir():
        return []
    named = (path for path in series.iterdir() if re.fullmatch(r"\d+(\.\d+)?", path.name))
    return sorted(named, key=_order)


def _committed(series: Path) -> list[Path]:
    return [path for path in _step_folders(series) if (path / _MANIFEST).exists()]


def _step(path: Path) -> int:
    return _order(path)[0]


def _order(path: Path) -> tuple[int, int]:
    """Step, and how many folders that step had before: (120, 0) for `120`, (120, 1) for `120.1`."""
    step, _, again = path.name.partition(".")
    return int(step), int(again or 0)


def by_name(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, such as `params/layers/w`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have the same name"
    return named


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{', '.join(str(n) for n in leaf.shape)}]"


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _words(leaf: Any) -> Any:
    """The leaf as numbers: a typed random key's are uint32 [..., words], others are themselves."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(leaf: Any, words: jax.Array) -> jax.Array:
    """Turns `_words` back into a leaf of the type of `leaf`."""
    if not _is_key(leaf):
        return words
    implementations: list[Any] = []
    # key_impl reads the leaf's type but takes no ShapeDtypeStruct; what it gets here is a tracer.
    jax.eval_shape(lambda key: implementations.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(words, impl=implementations[0])


def _system_reason(error: Exception) -> str | None:
    """The operating system's reason for a failed write, if that is what the error is about."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore, which does Orbax's writing, has the number in the text of a ValueError.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else None


def _orbax() -> ocp.Checkpointer:
    # Orbax logs each failed write several times with tracebacks; it raises the same error as well.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
