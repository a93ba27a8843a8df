"""Times the original PyTorch implementation and this one, in turns, on this machine.

    python -m bench.compare_torch --reference PATH [--python PYTHON]
        [--shapes tiny enwik8 small] [--parts train evaluate generate] [--pairs 7]
        [--dtype bfloat16] [--compiled]

PATH is a checkout of github.com/kimiyoung/transformer-xl, PYTHON an interpreter that has PyTorch;
neither is part of this project. Both train with dropout 0.1 and clipping. On CPUs both have Adam,
float32 and 2 threads. On a GPU the shapes are `base`, `large` and `fork_small`, the original has
Adam and this project the LAMB of these configs; 16 bits are autocast there, and products of float32
are made in TF32 on both sides. Evaluation reads segments with the batch of training, generation
draws tokens one by one with batch 1, but not from an adaptive softmax, from which the original
cannot. While one works, the other waits; a machine that does something else between the turns
changes a pair's times, not the medians of many. Prints a line of JSON for each shape and part, and
a table at the end.
"""

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax

from bench import shapes
from bench.__main__ import check_known, warn_if_busy
from txl_jax.adaptive import tied_projections
from txl_jax.config import Config, parse_words
from txl_jax.errors import UserError, run_command

THREADS = 2
_FOLDER = Path(__file__).parent
_SECONDS = 2.0
"""How long a turn takes, about."""


@dataclass(frozen=True)
class Arguments:
    """What to compare with, and in what."""

    reference: str
    """Checkout of the original."""
    python: str = sys.executable
    """Interpreter that has PyTorch."""
    shapes: tuple[str, ...] = ()
    """Of bench/shapes.py; none: those for this machine's devices."""
    parts: tuple[str, ...] = ("train", "evaluate", "generate")
    """What of each."""
    pairs: int = 7
    """Turns of each."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """To compute in, where it is not the shape's own."""
    compiled: bool = False
    """The original through `torch.compile`."""


class Worker:
    """A process that makes steps when it is asked to: see `original_worker`."""

    def __init__(self, who: str, command: list[str]):
        self._who = who
        self._process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
        )

    def wait_until_ready(self) -> None:
        while self._line() != "ready\n":
            pass

    def seconds(self, what: str, number: int) -> float:
        """The median time of `number` steps, segments or tokens."""
        assert self._process.stdin
        self._process.stdin.write(f"{what} {number}\n")
        self._process.stdin.flush()
        return statistics.median(json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return line
        raise UserError(f"{self._who} ended with status {self._process.wait()}, see above")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()


def in_turns(theirs: Worker, ours: Worker, what: str, pairs: int) -> list[tuple[float, float]]:
    """Seconds of a step of both, pair by pair, after both have warmed up."""
    both = theirs, ours
    for worker in both:
        worker.seconds(what, 3)
    numbers = [max(3, round(_SECONDS / worker.seconds(what, 3))) for worker in both]
    found = []
    for i in range(pairs):
        # Whoever begins is not always the same.
        order = (0, 1) if i % 2 == 0 else (1, 0)
        times = {j: both[j].seconds(what, numbers[j]) for j in order}
        found.append((times[0], times[1]))
    return found


def summary(shape: str, part: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians in milliseconds, and how many times as fast ours is: median, least and most."""
    ratios = [theirs / ours for theirs, ours in pairs]
    theirs, ours = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "shape": shape,
        "part": part,
        "original_ms": theirs,
        "ms": ours,
        "times_as_fast": {
            "least": min(ratios),
            "median": statistics.median(ratios),
            "most": max(ratios),
        },
        "pairs": len(pairs),
    }


def table(found: list[dict[str, Any]]) -> str:
    """The summaries in Markdown."""
    lines = [
        "| shape | part | original, ms | ours, ms | times as fast | least to most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        times = one["times_as_fast"]
        lines.append(
            f"| {one['shape']} | {one['part']} | {one['original_ms']:.4g} | {one['ms']:.4g} | "
            f"{times['median']:.2f} | {times['least']:.2f} to {times['most']:.2f} |"
        )
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Raises UserError: no checkout, no PyTorch, a shape or part that there is not."""
    arguments = parse_words(Arguments, None, "python -m bench.compare_torch", __doc__ or "", words)
    # Three processes share a GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    named = arguments.shapes or shapes.here()
    check_known("shape", named, [*shapes.CPU, *shapes.GPU])
    check_known("part", arguments.parts, list(Arguments.parts))
    if arguments.pairs < 1:
        raise UserError(f"--pairs is {arguments.pairs}; it has to be at least 1")
    reference = original(Path(arguments.reference))
    check_torch(arguments.python)
    warn_if_busy()
    found = []
    for name in named:
        cfg = shapes.shape(name, arguments.dtype)
        theirs_command = [arguments.python, str(_FOLDER / "original_worker.py"), str(reference)]
        ours_command = [sys.executable, "-m", "bench.our_worker", name, cfg.model.dtype]
        with ExitStack() as running:
            shape = json.dumps(as_original(cfg, arguments.compiled))
            theirs = running.enter_context(Worker("the original", [*theirs_command, shape]))
            ours = running.enter_context(Worker("this project", ours_command))
            theirs.wait_until_ready()
            ours.wait_until_ready()
            for part in arguments.parts:
                if part == "generate" and cfg.model.cutoffs:
                    continue
                pairs = in_turns(theirs, ours, part, arguments.pairs)
                found.append(summary(name, part, pairs))
                print(json.dumps(found[-1]), flush=True)
    print(table(found))
    return 0


def original(path: Path) -> Path:
    """The folder of the original's modules in a checkout; raises UserError if it has none."""
    for folder in (path / "pytorch", path):
        if (folder / "mem_transformer.py").is_file():
            return folder.resolve()
    raise UserError(
        f"{path} has no pytorch/mem_transformer.py: --reference is a checkout of "
        "github.com/kimiyoung/transformer-xl"
    )


def check_torch(python: str) -> None:
    """Raises UserError if `python` is not an interpreter that has PyTorch."""
    try:
        done = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
        said = done.stderr.strip().rpartition("\n")[2]
    except OSError as error:
        said = str(error)
    if said:
        raise UserError(f"{python} cannot import torch ({said}): name one that can, with --python")


def as_original(cfg: Config, compiled: bool) -> dict[str, Any]:
    """What `original_worker` wants to know of a shape."""
    model = cfg.model
    shape = "n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "tgt_len", "mem_len"
    rates = "dropout", "dropatt", "d_embed", "div_val"
    return {
        "model": {field: getattr(model, field) for field in (*shape, *rates)}
        | {"cutoffs": list(model.cutoffs), "tie_projs": list(tied_projections(model))},
        "batch": cfg.train.batch,
        "lr": cfg.optim.lr,
        "clip": cfg.optim.clip,
        "threads": THREADS,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "dtype": model.dtype,
        "compiled": compiled,
    }


if __name__ == "__main__":
    run_command(main)
