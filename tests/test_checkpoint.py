"""Checkpoints: bit-exact, whole or not at all, in the background, and safe with donated buffers."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from txl_jax import checkpoint_files, checkpoint_reader
from txl_jax.checkpoint import Checkpoints
from txl_jax.checkpoint_reader import next_attempt, restore_params
from txl_jax.errors import UserError
from txl_jax.mirror import Mirror
from txl_jax.store import Folder

ROOT = Path(__file__).resolve().parent.parent


class Moments(NamedTuple):
    count: Any
    mu: Any
    nothing: Any


@jax.tree_util.register_dataclass
@dataclass
class State:
    params: Any
    moments: Any
    memory: Any
    key: Any


def state_of(number: int) -> State:
    """A small state all of whose values are `number`."""
    weights = {
        "w": jnp.full((40, 30), number, jnp.float32),
        "b": jnp.full((3,), number, jnp.bfloat16),
    }
    moments = Moments(jnp.asarray(number, jnp.int32), dict(weights), ())
    return State(weights, (moments, ()), [jnp.full((2, 0, 3), number, jnp.float32)], jnp.uint32(7))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def value_of(state: State) -> int:
    """The number of a `state_of`, having checked that every leaf agrees."""
    number = int(state.moments[0].count)
    assert_same(state, state_of(number))
    return number


def assert_same(tree: Any, other: Any) -> None:
    """Same tree, shapes, types and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, twin in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert (leaf.shape, leaf.dtype) == (twin.shape, twin.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, twin = jax.random.key_data(leaf), jax.random.key_data(twin)
        assert np.asarray(leaf).tobytes() == np.asarray(twin).tobytes()


def restored(folder: Path, like: Any) -> Any:
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(abstract(like))
    assert found is not None
    return found


def run_python(code: str, *words: str, **options: Any) -> subprocess.Popen[str]:
    """A process that runs `code` in the project's root, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), {"step": step})
    return folder


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def nobodys_folder() -> Iterator[Path]:
    """A folder whose permissions count: tests that run as root step down to `nobody` for it."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    state = {
        dtype: jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)
        for dtype in ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8")
    } | {
        "special": jnp.asarray([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "bool": jnp.asarray([True, False]),
        "scalar": jnp.asarray(3.5, jnp.bfloat16),
        "flag": jnp.asarray(True),
        "empty": jnp.zeros((4, 0, 2), jnp.float32),
        "keys": [
            jax.random.key(3),
            jax.random.split(jax.random.key(4, impl="rbg"), 3),
            jax.random.key_data(jax.random.key(5)),
        ],
        "nested": state_of(9),
    }
    info = {"step": 5, "loss": 0.1 + 0.2, "name": "é", "list": [1, None, True]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, info)
        found = checkpoints.restore(abstract(state))
    assert found is not None
    assert_same(found[0], state)
    assert found[1] == info


def test_nothing_saved_nothing_restored(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore(abstract(state_of(0))) is None


def test_old_steps_go_and_the_best_stays(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (8, 9, 10, 11):
            checkpoints.save(step, state_of(step), {})
            if step < 11:
                checkpoints.save_best(step, state_of(-step), {"best": step})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.0", "11.0", "best"]
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["10.0", "9.0"]
    assert value_of(restored(tmp_path, state_of(0))[0]) == 11
    params, info = restore_params(tmp_path, abstract(state_of(0).params))
    assert_same(params, state_of(-10).params)
    assert info == {"best": 10}


def test_a_step_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state_of(1), {})
        checkpoints.wait()
        checkpoints.save(4, state_of(2), {})
        with pytest.raises(ValueError, match=r"4\.0 has been saved already"):
            checkpoints.wait()
    for start in (1, 2):
        with Checkpoints(tmp_path) as checkpoints:
            with files_up_to(2000), pytest.raises(UserError):
                checkpoints.save(4, state_of(9), {})
                checkpoints.wait()
            assert value_of(restored(tmp_path, state_of(0))[0]) == start
            checkpoints.save(4, state_of(start + 1), {})
            checkpoints.wait()
            assert checkpoints.steps() == [4]
            assert {path.name for path in tmp_path.iterdir()} == {f"4.{start}", "best"}
        assert value_of(restored(tmp_path, state_of(0))[0]) == start + 1


def test_full_disk_is_one_line_at_the_next_call(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    big = {f"w{n}": jnp.zeros((100, 200)) for n in range(30)}
    too_large = r"^cannot write checkpoint .*/2\.\d: File too large; earlier .* unharmed$"
    with files_up_to(2_000_000), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        checkpoints.save(2, big, {})
        with pytest.raises(UserError, match=too_large):
            checkpoints.wait()
        checkpoints.save(2, big, {})
        with pytest.raises(UserError, match=too_large):
            checkpoints.save(3, state_of(3), {})
        checkpoints.save_best(2, big, {})
        with pytest.raises(UserError, match=too_large):
            checkpoints.close()
    with (
        pytest.raises(ZeroDivisionError) as error,
        files_up_to(2_000_000),
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(2, big, {})
        _ = 1 // 0
    assert "File too large" in error.value.__notes__[0]
    # Room for the arrays, but not for what Orbax notes about them: it was taken meanwhile.
    monkeypatch.setattr(checkpoint_files, "_ROOM_BESIDES", 0)
    with files_up_to(300), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"w": jnp.arange(60.0)}, {})
        with pytest.raises(UserError, match=too_large):
            checkpoints.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"1.0", "best"}
    assert value_of(restored(tmp_path, state_of(0))[0]) == 1
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_unwritable_folder(nobodys_folder: Path) -> None:
    (nobodys_folder / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*: Not a directory"):
        Checkpoints(nobodys_folder / "file" / "run")
    (nobodys_folder / "best").mkdir()
    nobodys_folder.chmod(0o555)
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*: Permission denied"):
        Checkpoints(nobodys_folder)


def test_every_damage_is_found(
    three_steps: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    files = [path for path in (three_steps / "3.0").rglob("*") if path.is_file()]
    assert len(files) > 5
    for number, original in enumerate(files):
        for damage in ("flip", "cut", "delete", "swap"):
            folder = tmp_path / f"{number}{damage}"
            shutil.copytree(three_steps, folder)
            file = folder / original.relative_to(three_steps)
            data = bytearray(file.read_bytes())
            if damage == "flip":
                # In manifests and marker where they are still valid: step 3 becomes 2.
                noted = data.find(b'"step": 3')
                data[rng.randrange(len(data)) if noted < 0 else noted + 8] ^= 1
                file.write_bytes(data)
            elif damage == "cut":
                file.write_bytes(data[: rng.randrange(len(data))])
            elif damage == "delete":
                file.unlink()
            else:
                twin = folder / "2.0" / file.relative_to(folder / "3.0")
                if not twin.exists() or twin.read_bytes() == data:
                    continue
                shutil.copy(twin, file)
            state, info = restored(folder, state_of(0))
            assert (value_of(state), info) == (2, {"step": 2})
            message = capfd.readouterr().err
            if damage == "delete" and file.name == "commit.json":
                assert message == ""
                assert not file.parent.exists()
            else:
                name = "" if damage == "swap" else file.relative_to(folder / "3.0").as_posix()
                assert message.count("\n") == 1
                assert message.startswith(f"checkpoint {folder / '3.0'} is damaged ({name}")
                assert message.endswith("); going back to 2.0\n")
            shutil.rmtree(folder)


def test_training_goes_on_from_before_the_damage(three_steps: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(three_steps, folder)
    (folder / "2.0" / "whole" / "arrays" / "manifest.ocdbt").unlink()
    (folder / "3.0" / "commit.json").write_text("{")
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(abstract(state_of(0)))
        assert found is not None
        assert value_of(found[0]) == 1
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(2, state_of(20), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, state_of(30), {})
    assert value_of(restored(folder, state_of(0))[0]) == 30


def test_nothing_whole_is_an_error(three_steps: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(three_steps, folder)
    for step in (1, 2, 3):
        (folder / f"{step}.0" / "whole" / "arrays" / "_METADATA").write_text("{}")
    with pytest.raises(UserError, match=r"no whole checkpoint in .*delete the folder") as error:
        restored(folder, state_of(0))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is damaged"):
        restore_params(folder, abstract(state_of(0).params), 3)


def test_remains_of_cut_saves_go_and_other_files_stay(three_steps: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(three_steps, folder)
    (folder / "3.0" / "commit.json").rename(folder / "3.0" / "commit.json.tmp")
    (folder / "4.0" / "whole" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "4.7").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "5 old").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*; there are: 1, 2$"):
        restore_params(folder, abstract(state_of(0).params), 3)
    assert (folder / "4.0").exists()
    # What has this start's number, or a later one, another process may be writing.
    Checkpoints(folder, attempt=7).close()
    left = {path.name for path in folder.iterdir()}
    assert left == {"1.0", "2.0", "4.7", "5 old", "best", "notes.txt"}
    Checkpoints(folder).close()
    assert {path.name for path in folder.iterdir()} == left - {"4.7"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((40, 31))}, r"params/w is float32\[40, 30\] .* be float32\[40, 31\];"),
        ({"w": jnp.zeros((40, 30), jnp.float16)}, r"params/w is float32\[40, 30\] .* float16"),
        ({"new": jnp.zeros(3)}, r"params/new is absent in it and should be float32\[3\];"),
        ({"w": None}, r"params/w is float32\[40, 30\] in it and should be absent;"),
    ],
)
def test_another_model_is_named(three_steps: Path, change: dict, message: str) -> None:
    state = state_of(0)
    state.params = state.params | change
    with pytest.raises(UserError, match=rf"checkpoint .*/3.0 does not fit: {message}"):
        restored(three_steps, state)
    with pytest.raises(UserError, match=rf"checkpoint .*/3.0 does not fit: {message}"):
        restore_params(three_steps, abstract(state.params), "latest")


def test_what_may_differ_is_left_out_as_a_whole(tmp_path: Path) -> None:
    def state(number: int, streams: int) -> dict[str, Any]:
        memory = {"hidden": jnp.full((2, streams, 3), number), "filled": jnp.int32(number)}
        return {"memory": memory, "memory_of_it": jnp.int32(number), "w": jnp.full(5, number)}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1, 4), {"step": 1})
        same, _ = checkpoints.restore(state(2, 4), may_differ="memory/") or ({}, {})
        assert_same(same, state(1, 4))
        given = state(2, 6)
        other, info = checkpoints.restore(given, may_differ="memory/") or ({}, {})
        assert_same(other, state(1, 4) | {"memory": given["memory"]})
        assert other["memory"]["filled"] is given["memory"]["filled"]
        assert info == {"step": 1}
        misfit = r"does not fit: memory/hidden is int32\[2, 4, 3\] in it and should be"
        with pytest.raises(UserError, match=misfit):
            checkpoints.restore(given)
        with pytest.raises(UserError, match="does not fit: w is"):
            checkpoints.restore(given | {"w": jnp.zeros(5)}, may_differ="memory/")


def test_params_alone(three_steps: Path) -> None:
    like = abstract(state_of(0).params)
    for (params, info), step in (
        (restore_params(three_steps, like, "latest"), 3),
        (restore_params(three_steps, like, 2), 2),
    ):
        assert_same(params, state_of(step).params)
        assert info == {"step": step}
    with pytest.raises(UserError, match=r"no checkpoint in .*best"):
        restore_params(three_steps, like, "best")
    with pytest.raises(UserError, match=r"no checkpoint in"):
        restore_params(three_steps / "none", like, "latest")


# Reads that Orbax gives up end after the event loop they were to report to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_params_while_training_replaces_them(tmp_path: Path) -> None:
    like = abstract(state_of(0).params)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_best(0, state_of(0), {"step": 0})
        checkpoints.wait()
        seen = 0
        for step in range(1, 20):
            checkpoints.save_best(step, state_of(step), {"step": step})
            while seen < step:
                params, info = restore_params(tmp_path, like)
                assert info["step"] >= seen
                seen = info["step"]
                assert int(params["w"][0, 0]) == seen


def test_saving_is_safe_from_donation(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    sizes = (1, 3, 1000, 300_000)
    for trial in range(5):
        state = {f"w{size}": jax.random.normal(jax.random.key(size), (size,)) for size in sizes}
        host = {"host": np.arange(1000, dtype=np.float32)}
        before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state | host)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(trial, state | host, {})
            host["host"] += 1
            for _ in range(100):
                state = step(state)
        assert_same(restored(tmp_path, before)[0], jax.tree.map(jnp.asarray, before))


def test_what_is_restored_can_be_donated(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {f"w{number}": jnp.ones(5000) for number in range(40)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    found, _ = restored(tmp_path, state)
    places = jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), found)
    for _ in range(20):
        found = step(found)
    assert jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), found) == places
    assert_same(found, {name: np.full(5000, 21, np.float32) for name in state})


def test_several_devices(tmp_path: Path) -> None:
    """Saved from four devices, restored onto four, two and one."""
    state = {
        "params": {"w": jnp.arange(600, dtype=jnp.float32).reshape(20, 30)},
        "memory": jnp.arange(3 * 8 * 5, dtype=jnp.bfloat16).reshape(3, 8, 5),
        "empty": jnp.zeros((8, 0)),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(2), 4),
    }
    specs = {"params": {"w": P()}, "memory": P(None, "data"), "empty": P("data"), "key": P()}
    specs |= {"keys": P("data")}

    def abstract_on(devices: int) -> Any:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
            ),
            state,
            specs,
        )

    step = jax.jit(lambda tree: tree | {"memory": tree["memory"] + 1}, donate_argnums=0)
    # The copies take the place of what is donated.
    split = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf.copy(), like.sharding), state, abstract_on(4)
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, split, {})
        for _ in range(50):
            split = step(split)
        for devices in (4, 2, 1):
            wanted = abstract_on(devices)
            found, _ = checkpoints.restore(wanted) or (None, None)
            assert_same(found, state)
            for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
            for _ in range(20):
                found = step(found)
            assert_same(found, state | {"memory": state["memory"] + jnp.bfloat16(20)})
    params, _ = restore_params(tmp_path, abstract_on(4)["params"], "latest")
    assert_same(params, state["params"])


def test_a_killed_run_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """A process that saves without pause is killed at random moments and started again."""
    code = """
        import sys
        from pathlib import Path
        import jax, numpy as np
        from txl_jax.checkpoint import Checkpoints

        def state_of(step):
            return jax.device_put(
                {f"w{n}": np.full((50_000, n), step, np.float32) for n in range(1, 5)})

        state_of(0)
        sys.stdin.readline()
        with Checkpoints(Path(sys.argv[1])) as checkpoints:
            found = checkpoints.restore(state_of(0))
            step = 0
            if found:
                state, info = found
                step = info["step"]
                assert all(np.all(np.asarray(leaf) == step) for leaf in jax.tree.leaves(state))
            print("restored", step, flush=True)
            while True:
                step += 1
                checkpoints.save(step, state_of(step), {"step": step})
                print("committed", step - 1, flush=True)
    """
    rng = random.Random(0)
    committed = 0
    # The next process gets ready while the one before it runs; a line on its input lets it begin.
    processes = [run_python(code, str(tmp_path), stdin=subprocess.PIPE)]
    for life in range(6):
        processes.append(run_python(code, str(tmp_path), stdin=subprocess.PIPE))
        process = processes[life]
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("begin\n")
        process.stdin.flush()
        word, step = process.stdout.readline().split() or ("", process.stderr.read())
        assert word == "restored", step
        assert int(step) >= committed, "a committed checkpoint was lost"
        for _ in range(rng.randrange(2, 5)):
            committed = int(process.stdout.readline().split()[1])
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        output, errors = process.communicate()
        assert errors == ""
        committed = int([f"committed {committed}", *output.splitlines()][-1].split()[1])
    processes[-1].kill()
    processes[-1].communicate()
    names = [path.name for path in tmp_path.iterdir() if path.name != "best"]
    whole = [name for name in names if (tmp_path / name / "commit.json").exists()]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == sorted(int(float(name)) for name in whole)
        assert checkpoints.steps()[-1] >= committed
    assert len(list(tmp_path.iterdir())) == len(whole) + 1


def test_manifests_and_marker_are_for_reading(three_steps: Path) -> None:
    """Other tools (an upload, a comparison) find every file and leaf in them."""
    folder = three_steps / "3.0" / "whole"
    content = json.loads((folder / "manifest.json").read_text())["content"]
    listed = {folder / name: size for name, (size, _) in content["files"].items()}
    found = {p: p.stat().st_size for p in (folder / "arrays").rglob("*") if p.is_file()}
    assert listed == found
    assert (content["step"], content["attempt"]) == (3, 0)
    content = json.loads((three_steps / "3.0" / "commit.json").read_text())["content"]
    assert content["info"] == {"step": 3}
    assert content["leaves"]["params/w"] == "float32[40, 30]"
    assert content["leaves"]["moments/0/count"] == "int32[]"
    assert list(content["units"]) == ["whole"]


def test_a_copy_that_is_superseded_while_it_is_uploaded(tmp_path: Path, capsys: Any) -> None:
    begun, superseded = threading.Event(), threading.Event()

    class Slow(Folder):
        def upload(self, name: str, path: Path) -> None:
            if "/1.0/" in name:
                begun.set()
                assert superseded.wait(100)
                path.unlink(missing_ok=True)  # so far the removal of the copy has come
            super().upload(name, path)

    spool, store = tmp_path / "spool", Slow(tmp_path / "store")
    with (
        Mirror(store, spool) as mirror,
        Checkpoints(spool / "checkpoints", attempt=0, store=store, mirror=mirror) as checkpoints,
    ):
        checkpoints.save(1, state_of(1), {})
        assert begun.wait(100)
        checkpoints.save(2, state_of(2), {})
        checkpoints.wait()
        superseded.set()
        assert mirror.close(100) == []
        assert checkpoints.steps() == [2]
    assert capsys.readouterr().err == ""


def test_the_next_attempt_is_higher_than_all_before(tmp_path: Path) -> None:
    store = Folder(tmp_path / "store")
    spool = tmp_path / "checkpoints"
    assert next_attempt(spool) == next_attempt(spool, store) == 0
    store.write("checkpoints/5.3/part-1/manifest.json", b"another host has saved a part")
    assert next_attempt(spool) == 0
    assert next_attempt(spool, store) == 4
    with Checkpoints(spool, attempt=7) as checkpoints:
        checkpoints.save_best(2, state_of(2), {})
    assert next_attempt(spool) == next_attempt(spool, store) == 8


def test_an_earlier_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "120" / "arrays").mkdir(parents=True)
    (tmp_path / "120" / "manifest.json").write_text("{}")
    for use in (
        lambda: Checkpoints(tmp_path),
        lambda: checkpoint_reader.exists(tmp_path),
        lambda: restore_params(tmp_path, abstract(state_of(0).params), "latest"),
    ):
        with pytest.raises(UserError, match="has checkpoints of an earlier version"):
            use()
