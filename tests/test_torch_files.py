"""PyTorch's files: read as PyTorch wrote them, refused where they want more than to be read."""

import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from txl_jax import torch_files
from txl_jax.errors import UserError
from txl_jax.safe_pickle import Record
from txl_jax.torch_files import Tensor

WEIGHTS = Path(__file__).parent / "weights"
FORMATS = pytest.mark.parametrize("form", ["zip", "legacy"])
MAGIC = 0x1950A86A20F9469CFC6C


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        torch_files.read(path)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    return message


def state_dict(path: Path) -> dict[str, np.ndarray]:
    tensors = torch_files.state_dict(torch_files.read(path))
    assert tensors is not None
    return tensors


@FORMATS
def test_every_type_and_view_is_read(form):
    found = state_dict(WEIGHTS / f"types_{form}.pt")
    kinds = ["bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "int8"]
    for name in [*kinds, "uint8", "bool"]:
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        expected = np.arange(6).astype(dtype)
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], expected)
    base = np.arange(24, dtype=np.float32)
    views = {
        "whole": base.reshape(4, 6),
        "transposed": base.reshape(4, 6).T,
        "part": base[5:17].reshape(3, 4)[:, 1:],
        "repeated": np.full(3, 7, np.float32),
        "number": np.asarray(9, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "parameter": base[:2],
    }
    assert found.keys() == views.keys() | {*kinds, "uint8", "bool"}
    for name, expected in views.items():
        assert found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name], expected)


def test_module_and_state_dict_hold_the_same_in_both_formats():
    expected = state_dict(WEIGHTS / "original_state_zip.pt")
    assert len(expected) == 42 and expected["layers.1.pos_ff.CoreNet.3.weight"].shape == (12, 10)
    for name in ("original_state_legacy", "original_module_zip", "original_module_legacy"):
        found = state_dict(WEIGHTS / f"{name}.pt")
        assert found.keys() == expected.keys()
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])


@FORMATS
def test_a_module_is_a_record_of_its_attributes(form):
    found = torch_files.read(WEIGHTS / f"original_module_{form}.pt")
    assert isinstance(found, Record)
    assert found.path == "mem_transformer.MemTransformerLM"
    assert found.attributes["clamp_len"] == 9
    parts = torch_files.modules(found)
    assert parts["layers.1.dec_attn.dropatt"].attributes["p"] == 0.05
    assert "mem_transformer" not in sys.modules


def test_prefixes_of_wrappers_are_taken_off():
    weight = Tensor(np.ones(2))
    assert torch_files.state_dict({"module.module.a": weight}) == {"a": weight.array}
    assert torch_files.state_dict({"module.a": weight, "b": weight}) is not None
    assert list(torch_files.state_dict({"module.a": weight, "b": weight}) or ()) == [
        "module.a",
        "b",
    ]


@pytest.mark.parametrize("other", [3, [1], {"a": 1}, {}, None])
def test_what_is_no_state_dict_is_none(other):
    assert torch_files.state_dict(other) is None


def test_what_is_written_is_read(tmp_path):
    draw = np.random.default_rng(0)
    table = draw.standard_normal((5, 3)).astype(np.float32)
    tensors = {"a": table, "b": table, "c.0": draw.standard_normal((2, 3, 4)).astype(np.float32)}
    tensors |= {"transposed": table.T, "number": np.float32(3) * np.ones((), np.float32)}
    torch_files.write(tmp_path / "w.pt", tensors)
    found = state_dict(tmp_path / "w.pt")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert np.shares_memory(found["a"], found["b"])
    assert os.listdir(tmp_path) == ["w.pt"]
    # What torch.load accepts with weights_only, and nothing else.
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        ops = list(pickletools.genops(archive.read("weights/data.pkl")))
        assert archive.read("weights/version") == b"3\n"
        # No time of writing: the same weights are the same file.
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    names = {argument for op, argument, _ in ops if op.name == "GLOBAL"}
    assert names == {
        "collections OrderedDict",
        "torch FloatStorage",
        "torch._utils _rebuild_tensor_v2",
    }


class Module:
    """Pickled as a module is."""

    def __init__(self, **attributes: Any):
        self.__dict__.update(attributes)


class Called:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def wrapped(form: str, pickled: bytes, path: Path) -> Path:
    """A file in which `pickled` stands where PyTorch puts the pickle."""
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
    elif form == "legacy":
        facts = {"little_endian": True}
        path.write_bytes(
            b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, facts))
            + pickled
            + pickle.dumps([], 2)
        )
    else:
        path.write_bytes(pickled)
    return path


PLACES = {
    "alone": lambda evil: evil,
    "in a state dict": lambda evil: OrderedDict(weight=evil),
    "in a module": lambda evil: Module(_modules={"a": Module(_parameters={"w": evil})}),
    "as the state of a module": lambda evil: Module(_parameters=OrderedDict(), _hooks=[evil]),
    "as a key": lambda evil: {evil: 1},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_code_is_refused(form, protocol, place, tmp_path):
    mark = tmp_path / "mark"
    pickled = pickle.dumps(PLACES[place](Called(os.system, f"touch {mark}")), protocol)
    assert "posix.system" in refusal(wrapped(form, pickled, tmp_path / "w.pt"))
    assert not mark.exists()
    pickle.loads(pickled)
    assert mark.exists(), "the pickle does no harm where it is not refused either"


@pytest.mark.parametrize(
    "function, arguments",
    [
        (eval, ("1",)),
        (exec, ("1",)),
        (getattr, ("", "join")),
        (subprocess.Popen, (["true"],)),
        (io.open, ("/etc/hostname",)),
        (types.SimpleNamespace, ()),
        (str.join, ("", ())),
    ],
)
def test_any_other_call_is_refused(function, arguments, tmp_path):
    path = wrapped("pickle", pickle.dumps(Called(function, *arguments), 4), tmp_path / "w.pt")
    assert "wants to call" in refusal(path)


@pytest.mark.parametrize(
    "pickled",
    [
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x0bstr.__new__\x93)R.",
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R.",
        b"\x80\x02ccopyreg\n__reduce_ex__\n)R.",
        b"\x80\x02cos\nsystem\n)R.",
        b"cos\\n\nsy\\nstem\n)R.",
    ],
)
def test_every_way_to_call_is_refused(pickled, tmp_path):
    assert "wants to call" in refusal(wrapped("pickle", pickled, tmp_path / "w.pt"))


@pytest.mark.parametrize("pickled", [b"\x80\x02cos\nsystem\n)\x81.", b"\x80\x02cos\nsystem\n."])
def test_a_name_alone_stays_a_name(pickled, tmp_path):
    """Nothing is imported for it, and what comes of it has no more than the name."""
    found = torch_files.read(wrapped("pickle", pickled, tmp_path / "w.pt"))
    assert found.path == "os.system" and found is not os.system


@pytest.mark.parametrize(
    "name", ["original_state_zip", "original_state_legacy", "original_module_legacy", "types_zip"]
)
def test_a_file_that_is_cut_short_is_refused(name, tmp_path):
    whole = (WEIGHTS / f"{name}.pt").read_bytes()
    path = tmp_path / "w.pt"
    for length in {0, 1, 4, 5, len(whole) - 1, *range(0, len(whole), len(whole) // 40)}:
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize("name", ["original_state_zip", "original_module_legacy", "types_legacy"])
def test_a_damaged_file_is_refused_or_read(name, tmp_path):
    """Whatever bytes have changed, there is one line and no traceback."""
    whole = (WEIGHTS / f"{name}.pt").read_bytes()
    path, draw = tmp_path / "w.pt", random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 3, 20])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            torch_files.state_dict(torch_files.read(path))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 15


@pytest.mark.parametrize(
    "content", [b"", b"text\n", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x02K\x05."]
)
def test_another_file_is_refused(content, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    refusal(tmp_path / "w.pt")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "w.pt")
    assert "Is a directory" in refusal(tmp_path)


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    assert "no data.pkl" in refusal(tmp_path / "w.npz")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert "compressed" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/byteorder", "big")
    assert "big-endian" in refusal(path)


class Stand(pickle._Pickler):
    """Pickles tensors as PyTorch does: `Storage`s refer to parts outside the pickle."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Storage) else None


class Storage:
    def __init__(self, *pid: Any):
        self.pid = pid


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    "size, start, shape, strides",
    [
        (6, 0, (7,), (1,)),
        (6, 1, (6,), (1,)),
        (6, 0, (2, 3), (4, 1)),
        (6, -1, (3,), (1,)),
        (6, 0, (3,), (-1,)),
        (6, 0, (-3,), (1,)),
        (6, 0, (3,), (1, 1)),
        (6, 0, (1 << 62, 1 << 62), (1, 1)),
        (1 << 50, 0, (6,), (1,)),
        (-6, 0, (6,), (1,)),
        (6, 0, "abc", "abc"),
        (6, 0, (2.5,), (1,)),
    ],
)
def test_a_tensor_reaches_no_further_than_its_storage(
    form, size, start, shape, strides, tmp_path, monkeypatch
):
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def rebuild(*_: Any) -> None: ...

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    setattr(utils, "_rebuild_tensor_v2", rebuild)  # noqa: B010 (pyright)
    kind = type("FloatStorage", (), {"__module__": "torch"})
    setattr(torch, "FloatStorage", kind)  # noqa: B010 (pyright)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def content(size: int, *where: Any) -> Path:
        view = () if form == "zip" else (None,)
        storage = Storage("storage", kind, "0", "cpu", size, *view)
        stream = io.BytesIO()
        Stand(stream, 2).dump({"w": Called(rebuild, storage, *where, False, OrderedDict())})
        values, path = np.arange(6, dtype=np.float32).tobytes(), tmp_path / "w.pt"
        wrapped(form, stream.getvalue(), path)
        if form == "zip":
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("archive/data/0", values)
        else:
            keys, none = pickle.dumps(["0"], 2), pickle.dumps([], 2)
            path.write_bytes(
                path.read_bytes().removesuffix(none) + keys + struct.pack("<q", 6) + values
            )
        return path

    np.testing.assert_array_equal(state_dict(content(6, 1, (2, 2), (3, 1)))["w"], [[1, 2], [4, 5]])
    path = content(size, start, shape, strides)
    if (form, size) != ("zip", 1 << 50):  # there the length is that of the part
        assert "damaged" in refusal(path)
