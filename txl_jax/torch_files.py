"""PyTorch's files without PyTorch: read without running their code, and written.

A file is a pickle in which tensors refer to storages (flat arrays that several tensors may share):

    zip      since PyTorch 1.6: NAME/data.pkl, and each storage in NAME/data/KEY
    legacy   before: a magic number, a version, facts about the machine, the pickle, the keys of the
             storages, each a pickle of its own; then each storage: its length (int64), its values

A file that is a plain pickle (vocabularies are) is read as well.
"""

import io
import itertools
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from txl_jax import safe_pickle
from txl_jax.errors import UserError
from txl_jax.safe_pickle import Record

_MAGIC = 0x1950A86A20F9469CFC6C
_TYPES = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
_STORAGES = {
    f"{module}.{name}Storage": np.dtype(kind)
    for module in ("torch", "torch.cuda")
    for name, kind in _TYPES.items()
}


class Tensor(NamedTuple):
    """A tensor of a file."""

    array: np.ndarray
    """Its values; tensors that share a storage are views of the same memory."""


class _Storage(NamedTuple):
    values: np.ndarray


class _StorageType(NamedTuple):
    dtype: np.dtype


def read(path: Path) -> Any:
    """What `torch.save` or `pickle.dump` put into a file.

    Tensors and parameters are `Tensor`s; an object of a class is a `Record`, a module included.

    Raises:
      UserError: there is no such file, it wants to run code, is damaged, or of another kind.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_zip(file, path)
            file.seek(0)
            return _read_legacy(file, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def state_dict(found: Any) -> dict[str, np.ndarray] | None:
    """Names and tensors of a state dict or of a module, as `read` gives them; None for others.

    A module's are named as `Module.state_dict()` names them; the prefix that wrappers for several
    GPUs or half precision put before every name is taken off.
    """
    if isinstance(found, Record) and "_modules" in found.attributes:
        tensors = {
            f"{name}.{key}".removeprefix("."): tensor.array
            for name, module in modules(found).items()
            for kind in ("_parameters", "_buffers")
            for key, tensor in _entries(module, kind)
            if isinstance(tensor, Tensor)
        }
    elif isinstance(found, Mapping) and any(isinstance(w, Tensor) for w in found.values()):
        tensors = {str(name): w.array for name, w in found.items() if isinstance(w, Tensor)}
    else:
        return None
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): array for name, array in tensors.items()}
    return tensors


def modules(found: Any) -> dict[str, Record]:
    """A module and all modules within it, by name; its own is empty."""
    return dict(_modules(found, "", ())) if isinstance(found, Record) else {}


def _modules(module: Record, name: str, around: tuple[Record, ...]) -> Iterator[tuple[str, Record]]:
    yield name, module
    around = (*around, module)
    for own, part in _entries(module, "_modules"):
        # One that held itself would have no end.
        if isinstance(part, Record) and not any(part is other for other in around):
            yield from _modules(part, f"{name}.{own}".removeprefix("."), around)


def _entries(module: Record, kind: str) -> list[tuple[str, Any]]:
    entries = module.attributes.get(kind)
    return [(str(n), e) for n, e in entries.items()] if isinstance(entries, Mapping) else []


def _read_zip(file: IO[bytes], path: Path) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
            if len(names) != 1:
                raise UserError(f"{path} is an archive, but not one of PyTorch: it has no data.pkl")
            folder = names[0].removesuffix("data.pkl")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise UserError(f"{path} was not written by PyTorch: its parts are compressed")
            if f"{folder}byteorder" in archive.namelist():
                _check_order(archive.read(f"{folder}byteorder") == b"little", path)
            storages: dict[str, np.ndarray] = {}

            def persistent(pid: Any) -> Any:
                kind, storage_type, key, _, size = pid
                if kind != "storage":
                    raise ValueError(kind)
                if key not in storages:
                    values = archive.read(f"{folder}data/{key}")
                    storages[key] = np.frombuffer(values, storage_type.dtype)
                return _Storage(storages[key][:size])

            part = io.BytesIO(archive.read(names[0]))
            return safe_pickle.load(part, path, _FUNCTIONS, persistent)
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(f"{path} is damaged ({type(error).__name__})") from None


def _read_legacy(file: IO[bytes], path: Path) -> Any:
    first = safe_pickle.load(file, path)
    if not isinstance(first, int):
        return first
    if first != _MAGIC:
        raise UserError(f"{path} is not a file of PyTorch, or of one before version 0.2")
    safe_pickle.load(file, path)
    facts = safe_pickle.load(file, path)
    _check_order(isinstance(facts, dict) and facts.get("little_endian") is True, path)
    room = path.stat().st_size
    storages: dict[str, np.ndarray] = {}

    def persistent(pid: Any) -> Any:
        if pid[0] == "module":  # a class, with its source beside it
            return pid[1]
        kind, storage_type, key, _, size, view = pid
        if kind != "storage":
            raise ValueError(kind)
        if key not in storages:
            # The values come after the pickle; tensors are views that are filled then.
            if size * storage_type.dtype.itemsize > room:
                raise ValueError("a storage larger than the file")
            storages[key] = np.empty(size, storage_type.dtype)
        if view is None:
            return _Storage(storages[key])
        _, start, length = view
        return _Storage(storages[key][start : start + length])

    found = safe_pickle.load(file, path, _FUNCTIONS, persistent)
    keys = safe_pickle.load(file, path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path} is damaged: it has no list of storages")
    for key in keys:
        values, size = storages.get(key), file.read(8)
        if values is None or size != struct.pack("<q", values.size):
            raise UserError(f"{path} is damaged: storage {key!r} is not as long as it should be")
        if file.readinto(values.view(np.uint8)) != values.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(f"{path} is cut short")
        del storages[key]
    if storages:
        raise UserError(f"{path} is damaged: it lacks storages")
    return found


def _check_order(is_little: bool, path: Path) -> None:
    if not is_little:
        raise UserError(f"{path} was written on a big-endian machine: convert it there")


def _rebuild_tensor(storage: Any, start: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    """In place of `torch._utils._rebuild_tensor_v2`: a view of a storage, in its bounds."""
    values = storage.values
    if start < 0 or min((*shape, *strides), default=0) < 0 or len(shape) != len(strides):
        raise ValueError("a negative length")
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= values.size:
        raise ValueError("a tensor beyond its storage")
    steps = [step * values.itemsize for step in strides]
    return Tensor(np.lib.stride_tricks.as_strided(values[start:], tuple(shape), steps))


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


_FUNCTIONS: dict[str, Any] = {
    **{name: _StorageType(dtype) for name, dtype in _STORAGES.items()},
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": lambda sizes=(): tuple(sizes),
}


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that `torch.load` reads, also with `weights_only`; float32 only.

    Arrays that are the same object share a storage, as tied tensors do. The same tensors give the
    same file. Raises OSError.
    """
    keys: dict[int, str] = {}
    arrays: list[np.ndarray] = []
    ops = [pickle.PROTO, b"\x02", _ORDERED_DICT, pickle.MARK]
    for name, tensor in tensors.items():
        key = keys.get(id(tensor))
        if key is None:
            key = keys[id(tensor)] = str(len(arrays))
            arrays.append(np.ascontiguousarray(tensor, "<f4"))
        strides = tuple(itertools.accumulate(tensor.shape[:0:-1], lambda a, b: a * b, initial=1))
        strides = strides[::-1][: tensor.ndim]
        ops += [
            *(_plain(name), _name("torch._utils", "_rebuild_tensor_v2"), pickle.MARK),
            *(pickle.MARK, _plain("storage"), _name("torch", "FloatStorage"), _plain(key)),
            *(_plain("cpu"), _plain(tensor.size), pickle.TUPLE, pickle.BINPERSID),
            *(_plain(0), _plain(tensor.shape), _plain(strides), pickle.NEWFALSE, _ORDERED_DICT),
            *(pickle.TUPLE, pickle.REDUCE),
        ]
    ops += [pickle.SETITEMS, pickle.STOP]
    draft = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"weights/{name}"), content)  # without a date

        add("data.pkl", b"".join(ops))
        add("byteorder", b"little")
        for key, array in enumerate(arrays):
            add(f"data/{key}", array.tobytes())
        add("version", b"3\n")
    draft.replace(path)


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _plain(value: Any) -> bytes:
    """The operations that put a string, a number or a tuple of them on the unpickler's stack."""
    return pickle.dumps(value, protocol=2)[2:-1]


_ORDERED_DICT = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
