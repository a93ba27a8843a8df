"""Processes that save and restore: `python -m tests.checkpoint_processes PORT N I DEVICES FOLDER WORD…`.

Process I of N, with DEVICES devices each. Every word is a scenario below, a function of the same
name; the processes go through them together. What a process prints is what the tests look at.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txl_jax.checkpoint import Checkpoints
from txl_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
STEPS = (1, 2, 3)


def content(number: int) -> dict[str, Any]:
    """A state, on the host, all of whose values depend on `number`; 8 divides what is split."""
    words = np.arange(8 * 6, dtype=np.float32).reshape(8, 6) + 100 * number
    return {
        "params": {"w": words, "table": words.astype(jnp.bfloat16), "b": words[0].copy()},
        "memory": np.arange(2 * 3 * 8 * 2, dtype=np.float16).reshape(2, 3, 8, 2) + number,
        "empty": np.zeros((8, 0), np.float32),
        "step": np.int32(number),
    }


SPECS = {
    "zero": {
        "params": {"w": P("data"), "table": P("data"), "b": P()},
        "memory": P(None, None, "data"),
        "empty": P("data"),
        "step": P(),
        "key": P(),
        "keys": P("data"),
    },
    "plain": {
        "params": {"w": P(), "table": P(), "b": P()},
        "memory": P(None, None, "data"),
        "empty": P(),
        "step": P(),
        "key": P(),
        "keys": P(),
    },
}
"""How the state is split: as with zero, and as without."""
# Along another axis, which the devices divide unevenly nowhere: 6 columns on 2 or 1 devices.
SPECS["turned"] = SPECS["zero"] | {"params": {"w": P(None, "data"), "table": P(), "b": P("data")}}


def keys(number: int) -> dict[str, jax.Array]:
    return {
        "key": jax.random.key(number),
        "keys": jax.random.split(jax.random.key(number), 8),
    }


def shardings(kind: str, devices: int | None = None) -> Any:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS[kind])


def state_of(number: int, kind: str = "zero") -> Any:
    """The state on all devices of all processes."""
    where = shardings(kind)
    host = jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index]
        ),
        content(number),
        {name: where[name] for name in content(number)},
    )
    outs = {name: where[name] for name in ("key", "keys")}
    return host | jax.jit(keys, static_argnums=0, out_shardings=outs)(number)


def abstract(kind: str) -> Any:
    """What to restore, on all devices of all processes."""
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, content(0)) | keys(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(kind),
    )


def number_of(state: Any, kind: str) -> int:
    """The number of a `state_of`, each block of this process checked to the bit."""
    number = int(np.asarray(state["step"].addressable_shards[0].data))
    wanted = jax.tree.map(np.asarray, content(number))
    wanted |= {name: np.asarray(jax.random.key_data(key)) for name, key in keys(number).items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        whole: Any = wanted
        for part in path:
            whole = whole[part.key]
        sharding: Any = shardings(kind)
        for part in path:
            sharding = sharding[part.key]
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        assert (leaf.shape, leaf.dtype) == (whole.shape, whole.dtype), path
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes(), path
    return number


def everyone(ok: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(ok)).all())


class FolderStore:
    """A store for the tests; `cut` makes it unreachable, and `slow` its uploads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads: list[str] = []

    def _reached(self) -> None:
        if (self.folder.parent / "cut").exists():
            raise OSError("the store is away")

    def names(self, prefix: str = "") -> list[str]:
        self._reached()
        files = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*"))
        files = [name for name in files if not name.endswith(".tmp")]
        files += [
            p.relative_to(self.folder).as_posix()
            for p in self.folder.rglob("*")
            if p.is_file() and "." not in p.name
        ]
        return sorted(
            name for name in files if name.startswith(prefix) and (self.folder / name).is_file()
        )

    def read(self, name: str) -> bytes:
        self._reached()
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        self._reached()
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        draft.write_bytes(content)
        draft.replace(path)

    def upload(self, name: str, path: Path) -> None:
        self.write(name, path.read_bytes())

    def download(self, name: str, path: Path) -> None:
        content = self.read(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.downloads.append(name)

    def delete(self, names: Iterable[str]) -> None:
        self._reached()
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


class Jobs:
    """A mirror for the tests, whose jobs run when the test says so."""

    def __init__(self) -> None:
        self.newest: dict[str, int] = {}
        self.waiting: dict[str, tuple[int, Callable[[Callable[[], bool]], None]]] = {}

    def submit(self, key: str, what: str, job: Callable[[Callable[[], bool]], None]) -> None:
        self.newest[key] = self.newest.get(key, 0) + 1
        self.waiting[key] = (self.newest[key], job)

    def run(self, drop: bool = False) -> None:
        """Runs, or drops, what waits; a job that fails goes on waiting."""
        for key, (number, job) in list(self.waiting.items()):
            if not drop:
                job(lambda key=key, number=number: self.newest[key] != number)
            del self.waiting[key]


def found(checkpoints: Checkpoints, kind: str) -> int | str | None:
    """Number of the state that is restored, or the error."""
    try:
        restored = checkpoints.restore(abstract(kind))
    except UserError as error:
        return str(error)
    if restored is None:
        return None
    state, info = restored
    number = number_of(state, kind)
    assert info == {"number": number}
    twice = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree),
        donate_argnums=0,
        out_shardings={name: shardings(kind)[name] for name in ("params", "memory")},
    )
    places = pointers(state["params"])
    assert pointers(twice({name: state[name] for name in ("params", "memory")})["params"]) == places
    return number


def pointers(tree: Any) -> list[int]:
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    ]


def save(folder: Path) -> None:
    """Three steps, split as with zero and another series as without."""
    with Checkpoints(folder / "run", keep=3, attempt=5, everyone=everyone) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_of(step), {"number": step})
        checkpoints.save_best(9, state_of(9, "plain"), {"number": 9})
        checkpoints.wait()
        everyone(True)
        say(steps=checkpoints.steps(), now=found(checkpoints, "zero"))


def restore(folder: Path) -> None:
    """Every folder below `folder/damaged`, split in every way."""
    for path in sorted((folder / "damaged").iterdir()):
        with Checkpoints(path, attempt=6, everyone=everyone) as checkpoints:
            kinds = SPECS if path.name == "whole" else ["zero"]
            say(**{"-".join((path.name, kind)): found(checkpoints, kind) for kind in kinds})


def never_written(folder: Path) -> None:
    """The last process writes nothing of step 2: it cannot."""
    path = folder / "never"
    checkpoints = Checkpoints(path, attempt=0, everyone=everyone, patience=1)
    checkpoints.save(1, state_of(1), {"number": 1})
    checkpoints.wait()
    everyone(True)
    last = jax.process_index() == jax.process_count() - 1
    if last:
        # A file where its folder has to be: the write fails as on a full disk.
        (path / "2.0").mkdir(exist_ok=True)
        (path / "2.0" / "part-1").write_text("")
    everyone(True)
    checkpoints.save(2, state_of(2), {"number": 2})
    if last:
        try:
            checkpoints.wait()
        except UserError as error:
            say(error=str(error))
    everyone(True)
    if not last:
        try:
            checkpoints.wait()
        except UserError as error:
            say(error=str(error))
    say(found=found(checkpoints, "zero"))
    # The next step is committed all the same, and what is left of the incomplete one goes.
    checkpoints.save(3, state_of(3), {"number": 3})
    if not last:
        checkpoints.save(4, state_of(4), {"number": 4})
    else:
        checkpoints.save(4, state_of(4), {"number": 4})
    checkpoints.close()
    everyone(True)
    say(left=sorted(p.name for p in path.iterdir()))


def slow(folder: Path) -> None:
    """A process that writes late holds up neither the others nor what comes after."""
    path = folder / "slow"
    with Checkpoints(path, attempt=0, everyone=everyone) as checkpoints:
        for step in STEPS:
            if jax.process_index() == 1:
                time.sleep(0.3)
            checkpoints.save(step, state_of(step), {"number": step})
        checkpoints.wait()
        everyone(True)
        say(steps=checkpoints.steps())


def mirrored(folder: Path) -> None:
    """With a store: process 1 drops its upload of step 2, and the store is away for step 4."""
    index = jax.process_index()
    store, mirror = FolderStore(folder / "store"), Jobs()
    spool = folder / f"host-{index}" / "checkpoints"

    def opened(attempt: int) -> Checkpoints:
        return Checkpoints(spool, attempt=attempt, store=store, mirror=mirror, everyone=everyone)

    def stored() -> dict[str, Any]:
        return {
            step: sorted(
                name.split("/", 2)[2].replace("/manifest.json", "")
                for name in store.names(f"checkpoints/{step}/")
                if name.endswith((".json",)) 
            )
            for step in sorted({name.split("/")[1] for name in store.names("checkpoints/")})
        }

    def local() -> list[str]:
        return sorted(p.name for p in spool.iterdir() if p.name != "best")

    def upload_in_turn(drop: bool = False) -> None:
        """The last process first: process 0 waits for the others."""
        for process in reversed(range(jax.process_count())):
            if process == index:
                mirror.run(drop)
            everyone(True)

    checkpoints = opened(0)
    checkpoints.save(1, state_of(1), {"number": 1})
    checkpoints.wait()
    upload_in_turn()
    say(first=stored())
    # Process 1 drops step 2; process 0 has begun to wait for it when step 3 comes.
    checkpoints.save(2, state_of(2), {"number": 2})
    checkpoints.wait()
    waits = dict(mirror.waiting)
    if index == 1:
        mirror.run(drop=True)
    checkpoints.save(3, state_of(3), {"number": 3})
    checkpoints.wait()
    if index == 1:
        mirror.run()
    everyone(True)
    if index == 0:
        number, job = waits["latest"]
        job(lambda: mirror.newest["latest"] != number)  # it was under way already
        mirror.waiting["latest"], waits = mirror.waiting["latest"], {}
    say(dropped=stored())
    everyone(True)
    if index == 0:
        began = list(mirror.waiting)
        mirror.run()
        assert began
    everyone(True)
    say(newer=stored(), found=found(checkpoints, "zero"))
    everyone(True)
    if index == 0:
        (folder / "cut").write_text("")
    everyone(True)
    for step in (4, 5, 6, 7):
        checkpoints.save(step, state_of(step), {"number": step})
        checkpoints.wait()
        try:
            mirror.run()
        except OSError as error:
            say(away=str(error), local=local())
    everyone(True)
    if index == 0:
        (folder / "cut").unlink()
    everyone(True)
    upload_in_turn()
    say(back=stored())
    checkpoints.close()
    everyone(True)

    # New hosts: one has lost its disk, the other has a damaged file in its copy.
    if index == 0:
        shutil.rmtree(spool)
    else:
        file = largest(spool / "7.0" / f"part-{index}")
        flip(file)
    store.downloads.clear()
    checkpoints = opened(1)
    say(again=found(checkpoints, "zero"), downloads=sorted(store.downloads))
    store.downloads.clear()
    say(copies=found(checkpoints, "zero"), none=store.downloads)
    everyone(True)
    # A damaged file in the store and a lost disk: the step before is taken by all.
    if index == 0:
        flip(largest(store.folder / "checkpoints" / "7.0" / "part-0"))
        shutil.rmtree(spool / "7.0")
    everyone(True)
    say(before=found(checkpoints, "zero"))
    checkpoints.save(8, state_of(8), {"number": 8})
    checkpoints.wait()
    upload_in_turn()
    say(last=stored(), local=local())
    checkpoints.close()


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


SCENARIOS = (save, restore, never_written, slow, mirrored)


class Outcome(dict):
    """All that a process said; `errors` is its standard error."""

    errors: str


def run(folder: Path, processes: int, devices: int, *words: str) -> list[Outcome]:
    """What each process said. Raises AssertionError if one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-m", "tests.checkpoint_processes"),
                *(str(port), str(processes), str(index), str(devices), str(folder)),
                *words,
            ],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        ends = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    outcomes = []
    for process, (output, errors) in zip(started, ends, strict=True):
        assert process.returncode == 0, f"{output}\n{errors}"
        outcomes.append(Outcome())
        outcomes[-1].errors = errors
        for line in output.splitlines():
            if line.startswith("{"):  # Gloo, too, prints what it does
                outcomes[-1].update(json.loads(line))
    return outcomes


def main() -> None:
    port, processes, index, devices, folder, *words = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            int(processes),
            int(index),
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"127.0.0.1:{port}",
        )
    for scenario in SCENARIOS:
        if scenario.__name__ in words:
            scenario(Path(folder))


if __name__ == "__main__":
    main()
