"""Several that save and restore: `python -m tests.checkpoint_processes PORT N I DEVICES FOLDER …`.

Process I of N, with DEVICES devices each. Every further word is a scenario below, a function of
that name; the processes go through them together. What they print the tests look at.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txl_jax.checkpoint import Checkpoints
from txl_jax.checkpoint_reader import restore_params
from txl_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
STEPS = (1, 2, 3)


def content(number: int) -> dict[str, Any]:
    """A state, on the host, all of whose values depend on `number`; 4 divides its axes."""
    words = np.arange(8 * 12, dtype=np.float32).reshape(8, 12) + 100 * number
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


def abstract(kind: str, devices: int | None = None) -> Any:
    """What to restore, on all devices of all processes, or so many."""
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, content(0)) | keys(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(kind, devices),
    )


def number_of(state: Any, like: Any) -> int:
    """The number of a `state_of`, laid out as `like`; all of this process is checked to the bit."""
    number = int(np.asarray(state["step"].addressable_shards[0].data))
    words = {name: np.asarray(jax.random.key_data(key)) for name, key in keys(number).items()}
    wanted = jax.tree.map(np.asarray, content(number)) | words

    def check(leaf: Any, like: Any, whole: np.ndarray) -> None:
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes()

    jax.tree.map(check, state, like, wanted)
    return number


def gather(name: str, value: str) -> list[str]:
    rows = multihost_utils.process_allgather(np.frombuffer(value.encode().ljust(16), np.uint8))
    return [bytes(row).decode().strip() for row in np.asarray(rows)]


def everyone(ok: bool) -> bool:
    return all(gather("everyone", "ok" * ok))


class FolderStore:
    """A store that is away while there is a file `cut` beside its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.downloads: list[str] = []

    def path(self, name: str) -> Path:
        if (self._folder.parent / "cut").exists():
            raise OSError("the store is away")
        return self._folder / name

    def names(self, prefix: str = "") -> list[str]:
        files = (path for path in self.path("").rglob("*") if path.suffix != ".tmp")
        names = (path.relative_to(self._folder).as_posix() for path in files if path.is_file())
        return sorted(name for name in names if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.tmp")
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
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def stop(self) -> None:
        """Nothing is ever under way."""


class Jobs:
    """A mirror for one series, whose job is begun, or dropped, when the test says so."""

    def __init__(self) -> None:
        self.number = 0
        self.job: Callable[[Callable[[], bool]], None] = lambda cancelled: None

    def submit(self, key: str, what: str, job: Callable[[Callable[[], bool]], None]) -> None:
        self.number += 1
        self.job = job

    def run(self) -> None:
        """Runs the newest job; it raises what the job does."""
        number = self.number
        self.job(lambda: self.number != number)


def found(checkpoints: Checkpoints, kind: str, devices: int | None = None) -> int | str | None:
    """Number of the state that is restored, or the error. Its buffers can be donated."""
    like = abstract(kind, devices)
    try:
        restored = checkpoints.restore(like)
    except UserError as error:
        return str(error)
    if restored is None:
        return None
    state, info = restored
    number = number_of(state, like)
    assert info == {"number": number}
    some = {name: state[name] for name in ("params", "memory")}
    places = pointers(some)
    where = jax.tree.map(lambda leaf: leaf.sharding, some)
    twice = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree),
        donate_argnums=0,
        out_shardings=where,
    )
    assert pointers(twice(some)) == places
    return number


def pointers(tree: Any) -> list[int]:
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    ]


def save(folder: Path) -> None:
    """Three steps, split as with zero, and a best one, split as without."""
    with Checkpoints(folder / "run", keep=3, attempt=5, gather=gather) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_of(step), {"number": step})
        checkpoints.save_best(9, state_of(9, "plain"), {"number": 9})
        checkpoints.wait()
        everyone(True)
        say(steps=checkpoints.steps(), now=found(checkpoints, "zero"))


DAMAGES = {
    "flip": ("whole/arrays", "part-0/arrays", "part-1/arrays", "part-1/manifest.json"),
    "cut": ("whole/arrays", "part-1/arrays", "whole/manifest.json", "commit.json"),
    "delete": ("part-1", "part-1/manifest.json", "commit.json"),
    "exchange": ("part-1", "whole", "commit.json"),
}
"""What is done to the newest of three steps."""


def damage(folder: Path) -> None:
    """Copies of what `save` has left, each with one damage."""
    if jax.process_index() == 0:
        shutil.copytree(folder / "run", folder / "damaged" / "whole")
        for kind, names in DAMAGES.items():
            for name in names:
                run = folder / "damaged" / f"{kind} {name.replace('/', ' ')}"
                shutil.copytree(folder / "run", run)
                path = run / "3.5" / name
                if kind == "exchange":
                    path.rename(run / "aside")
                    (run / "2.5" / name).rename(path)
                    (run / "aside").rename(run / "2.5" / name)
                elif kind == "delete":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                elif kind == "cut":
                    file = largest(path)
                    os.truncate(file, file.stat().st_size // 2)
                else:
                    flip(largest(path))
    everyone(True)


def restore(folder: Path) -> None:
    """Every copy that `damage` has made; the whole one split in every way."""
    for path in sorted((folder / "damaged").iterdir()):
        with Checkpoints(path, attempt=6, gather=gather) as checkpoints:
            for kind in SPECS if path.name == "whole" else ["zero"]:
                say(**{f"{path.name} {kind}": found(checkpoints, kind)})


def agree(folder: Path) -> None:
    """Each process has a copy of its own: in that of process 1 the newest step is damaged.

    Or one of the processes does not see it, as where folders are cached.
    """
    with Checkpoints(folder / "shared", attempt=0, gather=gather) as checkpoints:
        for step in (1, 2):
            checkpoints.save_best(step, state_of(step, "plain"), {"number": step})
    everyone(True)
    path = folder / f"own-{jax.process_index()}"
    shutil.copytree(folder / "shared", path)
    if jax.process_index() == 1:
        flip(largest(path / "best" / "2.0" / "whole" / "arrays"))
    like = abstract("plain")["params"]
    say(agreed=restore_params(path, like, gather=gather)[1]["number"])
    for missing in (0, 1):
        path = folder / f"cached-{missing}-{jax.process_index()}"
        shutil.copytree(folder / "shared", path)
        if jax.process_index() == missing:
            (path / "best" / "2.0" / "commit.json").unlink()
        restored = restore_params(path, like, gather=gather)[1]["number"]
        say(**{f"agreed, not seen by {missing}": restored})


def never_written(folder: Path) -> None:
    """Process 1 cannot write its part of step 2."""
    path, index = folder / "never", jax.process_index()
    checkpoints = Checkpoints(path, attempt=0, gather=gather, patience=1)
    checkpoints.save(1, state_of(1), {"number": 1})
    checkpoints.wait()
    everyone(True)
    if index == 1:
        # A file where its folder has to be: the write fails as on a full disk.
        (path / "2.0").mkdir()
        (path / "2.0" / "part-1").write_text("")
    everyone(True)
    checkpoints.save(2, state_of(2), {"number": 2})
    say(refusal=found(checkpoints, "zero"))
    # As if it had not noticed: what comes is committed, and the remains of step 2 go.
    for step in (3, 4):
        checkpoints.save(step, state_of(step), {"number": step})
    checkpoints.close()
    everyone(True)
    say(left=sorted(other.name for other in path.iterdir()))


def slow(folder: Path) -> None:
    """A process that writes late: process 0 waits for it in the background."""
    with Checkpoints(folder / "slow", attempt=0, gather=gather) as checkpoints:
        for step in STEPS:
            if jax.process_index() == 1:
                time.sleep(0.3)
            checkpoints.save(step, state_of(step), {"number": step})
        checkpoints.wait()
        everyone(True)
        say(slow=checkpoints.steps())


def late(folder: Path) -> None:
    """Process 1 saves when process 0 has said that it waits."""
    index, errors = jax.process_index(), io.StringIO()
    with Checkpoints(folder / "late", attempt=0, gather=gather, patience=0.1) as checkpoints:
        if index == 1:
            everyone(True)
        checkpoints.save(1, state_of(1), {"number": 1})
        with contextlib.redirect_stderr(errors):
            while index == 0 and not errors.getvalue():
                time.sleep(0.01)
        if index == 0:
            everyone(True)
        while not checkpoints.steps():
            time.sleep(0.01)
        everyone(True)
    say(late=errors.getvalue())


def mirrored(folder: Path) -> None:
    """Two machines and a store, until one of them has lost its disk and all are started again."""
    index, jobs, store = jax.process_index(), Jobs(), FolderStore(folder / "store")
    spool = folder / f"host-{index}" / "checkpoints"
    options: Any = {"store": store, "mirror": jobs, "gather": gather, "patience": 30}

    def only(process: int, action: Callable[[], Any]) -> None:
        """One process does something while the others wait."""
        if process == index:
            action()
        everyone(True)

    def save(step: int) -> None:
        checkpoints.save(step, state_of(step), {"number": step})
        checkpoints.wait()
        everyone(True)

    def upload() -> None:
        only(1, jobs.run)
        only(0, jobs.run)

    def stored() -> list[str]:
        """Steps in the store; with a + if they are committed."""
        names = [name.split("/", 2) for name in store.names("checkpoints/")]
        done = {step for _, step, file in names if file == "commit.json"}
        everyone(True)
        return sorted({step + "+" * (step in done) for _, step, _ in names})

    def local() -> list[str]:
        return sorted(path.name for path in spool.iterdir() if path.name != "best")

    checkpoints = Checkpoints(spool, attempt=0, **options)
    save(1)
    upload()
    say(first=stored())

    # Process 0 waits for part-1 of step 2, but process 1 begins with its upload after step 3.
    save(2)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(jobs.run) if index == 0 else None
        while index == 0 and "checkpoints/2.0/part-0/manifest.json" not in store.names():
            time.sleep(0.01)
        everyone(True)
        say(waiting=stored())
        save(3)
        only(1, jobs.run)
        only(0, waiting.result if waiting else time.time)
    only(0, jobs.run)
    say(newer=stored(), found=found(checkpoints, "zero"))

    only(0, lambda: (folder / "cut").write_text(""))
    for step in (4, 5, 6, 7):
        save(step)
        try:
            jobs.run()
        except OSError as error:
            say(away=str(error), spool=local())
        everyone(True)
    only(0, lambda: (folder / "cut").unlink())
    upload()
    say(back=stored())
    checkpoints.close()

    if index == 0:
        shutil.rmtree(spool)
    else:
        flip(largest(spool / "7.0" / "part-1" / "arrays"))
    store.downloads.clear()
    checkpoints = Checkpoints(spool, attempt=1, **options)
    say(again=found(checkpoints, "zero"), downloads=store.downloads)
    store.downloads.clear()
    say(twice=found(checkpoints, "zero"), nothing=store.downloads)
    only(0, lambda: shutil.rmtree(spool / "7.0"))
    only(0, lambda: flip(largest(store.path("checkpoints/7.0/part-0/arrays"))))
    say(damaged=found(checkpoints, "zero"))
    save(5)
    upload()
    say(last=stored(), copies=local())
    checkpoints.close()


def largest(path: Path) -> Path:
    """The largest file of a folder; or `path` if it is none."""
    files = (file for file in (path, *path.rglob("*")) if file.is_file())
    return max(files, key=lambda file: file.stat().st_size)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


SCENARIOS = (save, damage, restore, agree, never_written, slow, late, mirrored)


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
