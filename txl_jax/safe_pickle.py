"""Pickles from elsewhere, read without running anything that they ask for.

A pickle is a program: it names functions and classes, calls them and fills what they return. Here a
name stands for one of three things:

    a function of ours     where the caller has one for it (tensors), or it is a container of Python
    a harmless call        whose result nobody needs; it gives a `Record` of its name
    a passive class        for every other name: an object of it is a `Record` of what was saved

A passive class cannot be called, so that a pickle which wants a function is refused, and says which
one. No module is imported, no code of a class runs, whatever is in the pickle.
"""

import collections
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from txl_jax.errors import UserError


class _Uncallable(type):
    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise _Refused(cls.__dict__.get("path", cls.__name__))


class _Refused(Exception):
    """The name of what a pickle wants to call."""


class Record(metaclass=_Uncallable):
    """An object of a class that is not loaded: what a pickle says of it."""

    path: ClassVar[str] = ""
    """Module and name of its class."""
    attributes: dict[str, Any]
    """What was saved as its attributes."""

    def __new__(cls, *_: Any, **__: Any) -> "Record":
        record = object.__new__(cls)
        record.attributes = {}
        return record

    def __setstate__(self, state: Any) -> None:
        # A class with slots saves two dictionaries: those of __dict__ and those of the slots.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.attributes.update(part)


_HARMLESS = {
    "_codecs.encode",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "re._compile",
    "torch.device",
    "torch.nn.backends.thnn._get_thnn_function_backend",
}


def load(
    file: IO[bytes],
    path: Path,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The next pickle of an open file.

    Args:
      file: open at its beginning; left open behind it.
      path: where it lies, for messages.
      functions: for `module.name`, what stands for it. They get arguments of any kind.
      persistent: what stands for an id of an object that lies outside the pickle.

    Raises:
      UserError: the pickle wants to call something that is not known to be harmless, or is damaged.
    """
    unpickler = _Unpickler(file, encoding="utf-8")
    unpickler.known = _CONTAINERS | {name: _record_of(name) for name in _HARMLESS}
    unpickler.known |= functions or {}
    unpickler.outside = persistent
    try:
        return unpickler.load()
    except UserError:
        raise
    except _Refused as refused:
        name = str(refused).encode("unicode_escape").decode()
        raise UserError(
            f"{path} wants to call {name} while it is read, which weights have no need of: it is "
            "refused, and nothing was run; take the weights from another file"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} is not a file of weights, or is damaged ({type(error).__name__})"
        ) from None


class _Unpickler(pickle._Unpickler):
    # The unpickler that is written in Python: a pickle of a few bytes can have the one in C take
    # gigabytes for its list of objects.
    known: Mapping[str, Any]
    outside: Callable[[Any], Any] | None

    def find_class(self, module: str, name: str) -> Any:
        path = f"{_PYTHON_2.get(module, module)}.{name}"
        return self.known[path] if path in self.known else _passive(path)

    def persistent_load(self, pid: Any) -> Any:
        if self.outside is None:
            raise ValueError("an object outside the pickle")
        return self.outside(pid)


_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _passive(path: str) -> type[Record]:
    return type(Record)("Record", (Record,), {"path": path})


def _record_of(path: str) -> Callable[..., Record]:
    passive = _passive(path)
    return lambda *_: Record.__new__(passive)


def _reconstruct(cls: Any, *_: Any) -> Record:
    """In place of what old pickles make objects with: the class, its base and the base's value."""
    if not (isinstance(cls, _Uncallable) and issubclass(cls, Record)):
        raise ValueError("not a class")
    return Record.__new__(cls)


_CONTAINERS: dict[str, Any] = {
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.Counter": collections.Counter,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "copyreg._reconstructor": _reconstruct,
}
