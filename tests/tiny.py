"""A run small enough for tests: its text, the words of its command line, what it leaves behind.

Commands are real processes; they start in `Shell.home`. The fixtures are in `tests/tiny_runs.py`.
"""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from txl_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from txl_jax.prefetch import Prefetch
from txl_jax.trained import load_trained

ROOT = Path(__file__).resolve().parent.parent
LOGDIR = "runs/quickstart"
"""Where a run goes that names no folder."""

TGT_LEN, BATCH, STEPS, LOG_EVERY, EVAL_EVERY = 16, 4, 400, 7, 100
CONFIG = Config(
    model=ModelConfig(
        n_layer=2,
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=32,
        tgt_len=TGT_LEN,
        mem_len=16,
        dropout=0.1,
        dropatt=0.1,
    ),
    data=DataConfig(dataset="text", text_dir="text"),
    optim=OptimConfig(lr=1e-2, warmup_tokens=640),
    train=TrainConfig(
        batch=BATCH,
        max_tokens=STEPS * BATCH * TGT_LEN,
        eval_batch=4,
        log_every=LOG_EVERY,
        eval_every=EVAL_EVERY,
        sample_tokens=8,
    ),
)


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]


WORDS = ["--local"]
"""The command line of CONFIG: every field, so that nothing depends on what quickstart says."""
for section in dataclasses.asdict(CONFIG).values():
    for name, value in section.items():
        WORDS += _option(name.replace("_", "-"), value)


@dataclass(frozen=True)
class Shell:
    """Starts the project's commands as a user does."""

    home: Path
    """Working directory of the commands; the text lies in it."""
    cache: Path
    """Compiled programs. Processes would spend most of their time on compiling them otherwise."""
    optimized: bool = False
    """Compile as users do. It takes three times as long."""
    within: tuple[str, ...] = ()
    """Words before the command: a program that runs it in surroundings of its own."""

    def start(self, module: str, *words: str | bytes, **options: Any) -> subprocess.Popen[str]:
        """`python -m txl_jax.MODULE WORDS` in a session of its own, its output in pipes."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error",
            "PYTHONIOENCODING": "utf-8:strict",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not self.optimized),
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        settings: dict[str, Any] = {
            "cwd": self.home,
            "env": environment,
            "encoding": "utf-8",
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
        }
        command = [*self.within, sys.executable, "-m", f"txl_jax.{module}", *words]
        return subprocess.Popen(command, **settings | options)

    def start_two(
        self, *words: str, folders: list[Path], devices: tuple[int, int] = (1, 1)
    ) -> list[subprocess.Popen[str]]:
        """`train WORDS` as two processes of one run, in these working directories."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        words = tuple(word for word in words if word != "--local")
        words += ("--coordinator", coordinator, "--num-processes", "2", "--process-id")
        # No cache of compiled programs: JAX has one for process 0 only, which then waits for the
        # others to compile, and Gloo lets it wait for half a minute.
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return [
            self.start(
                "train",
                *(*words, str(number)),
                cwd=folders[number],
                env=environment | {"JAX_NUM_CPU_DEVICES": str(devices[number])},
                stderr=subprocess.STDOUT,
            )
            for number in range(2)
        ]

    def run(self, module: str, *words: str | bytes, **options: Any) -> tuple[int, str, str]:
        """Status, output and error output of a command that ends by itself."""
        process = self.start(module, *words, **options)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def refused(self, module: str, *words: str | bytes, **options: Any) -> str:
        """The one line with which a command refuses to start or to go on."""
        status, _, errors = self.run(module, *words, **options)
        return one_line(status, errors)


def one_line(status: int, errors: str) -> str:
    """What `errors` says is wrong, in the one line that it has to be."""
    assert status == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def write_text(folder: Path) -> None:
    """Text of some 4 kB in 120 files: 113 for training, 5 to validate, 2 to test."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(120):
        words = draw.choices(["naïve", "façade", "señor", "über", "met", "a"], k=6)
        (folder / f"{number:03d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")


def metrics(logdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def learned(logdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    kept = ("step", "tokens", "learning/", "sizes/")
    return [
        {tag: value for tag, value in line.items() if tag.startswith(kept)}
        for line in metrics(logdir)
    ]


def tensorboard(logdir: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard shows: for each tag (x, y)."""
    events = EventAccumulator(str(logdir), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def shown_in_metrics(logdir: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl, in the precision of TensorBoard's files."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(logdir):
        for tag, value in line.items():
            if "/" in tag:
                points.setdefault(tag, []).append((line["tokens"], float(np.float32(value))))
    return points


def one_device() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:1]), ("data",))


def parameters(logdir: Path) -> dict[str, bytes]:
    """The bits of the newest and the best parameters, by name, and the steps that made them."""
    bits = {}
    for which in ("latest", "best"):
        trained = load_trained(logdir, which, one_device())
        bits[f"{which} step"] = str(trained.step).encode()
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained.params):
            bits[which + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return bits


def same_run(here: Path, there: Path) -> None:
    """Fails unless two runs learned the same and made the same of it, bit for bit."""
    assert learned(here) == learned(there)
    assert parameters(here) == parameters(there)
    for name in ("samples.txt", "results.json"):
        assert (here / name).read_text("utf-8") == (there / name).read_text("utf-8")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; none if there is no such folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def everything(folder: Path) -> dict[str, int]:
    """Every file and folder below a folder and when it was last changed, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def wait_for_step(process: subprocess.Popen[str], logdir: Path, step: int) -> None:
    """Returns when the run in logdir has logged this step, or one after it."""
    path = logdir / "metrics.jsonl"
    while not path.exists() or not _reached(path.read_bytes(), step):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def _reached(lines: bytes, step: int) -> bool:
    whole = lines[: lines.rfind(b"\n") + 1].splitlines()
    return bool(whole) and json.loads(whole[-1])["step"] >= step


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a training in this process receive SIGTERM in the course of its `steps`-th step."""
    take, taken = Prefetch.take, []

    def take_one(batches: Prefetch[Any]) -> Any:
        taken.append(batches)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGTERM)
        return take(batches)

    monkeypatch.setattr(Prefetch, "take", take_one)
