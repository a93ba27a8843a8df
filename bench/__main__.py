"""Times this project on this machine, or compares two such runs.

    python -m bench [--shapes tiny small] [--parts train evaluate generate data compile]
    python -m bench --compare OLD NEW

Every shape and part is timed in a process of its own, one after another, and gives one line of
JSON on standard output; a machine that does something else gives other numbers. OLD and NEW are
files of such lines.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import shapes, timings
from txl_jax.config import nearest, parse_words
from txl_jax.errors import UserError, run_command

_PROG = "python -m bench"
_BUSY = 0.5
"""Load, of all cores, above which a machine is not quiet."""
_FIGURES = {
    "train": ("ms",),
    "evaluate": ("ms",),
    "generate": ("ms", "first_third_ms", "last_third_ms"),
    "data": ("ms",),
    "compile": ("trace_s", "compile_s"),
}


@dataclass(frozen=True)
class Arguments:
    """What to time, or to compare."""

    shapes: tuple[str, ...] = ()
    """Of bench/shapes.py; none: those for this machine's devices."""
    parts: tuple[str, ...] = tuple(timings.PARTS)
    """What of each."""
    compare: tuple[str, ...] = ()
    """Two files of an earlier and a later run: show the later one's times beside the earlier's."""


def main(words: list[str]) -> int:
    """Raises UserError: a shape or part that there is not, a file that holds no such lines."""
    arguments = parse_words(Arguments, None, _PROG, __doc__ or "", words)
    if arguments.compare:
        if len(arguments.compare) != 2:
            raise UserError(f"--compare takes two files: {_PROG} --compare OLD NEW")
        print(table(*(read(Path(path)) for path in arguments.compare)))
        return 0
    named = arguments.shapes or shapes.here()
    check_known("shape", named, [*shapes.CPU, *shapes.GPU])
    check_known("part", arguments.parts, list(timings.PARTS))
    warn_if_busy()
    for shape in named:
        for part in arguments.parts:
            command = [sys.executable, "-m", "bench.timings", shape, part]
            if status := subprocess.run(command).returncode:
                raise UserError(f"timing {part} of {shape} ended with status {status}, see above")
    return 0


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of a run, by shape and part; of several of the same the last."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line[:1] == "{"]
        found = {(line["shape"], line["part"]): line for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} as lines of `{_PROG}`: {error}") from error
    if not found:
        raise UserError(f"{path} has no line of JSON: save what `{_PROG}` prints")
    return found


def table(
    old: dict[tuple[str, str], dict[str, Any]], new: dict[tuple[str, str], dict[str, Any]]
) -> str:
    """Times that both runs have, in a Markdown table; above 1: the new one is faster."""
    lines = ["| shape | what | old | new | old / new |", "| --- | --- | --- | --- | --- |"]
    for key in (key for key in old if key in new):
        for figure in _FIGURES[key[1]]:
            before, after = (_median(run[key][figure]) for run in (old, new))
            what = f"{key[1]}, {figure.replace('_', ' ')}"
            lines.append(
                f"| {key[0]} | {what} | {before:.4g} | {after:.4g} | {before / after:.2f} |"
            )
    return "\n".join(lines)


def _median(figure: Any) -> float:
    return figure["median"] if isinstance(figure, dict) else figure


def warn_if_busy() -> None:
    """Says so if this machine does something else."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > _BUSY:
        print(f"this machine is busy (load {load:.1f} a core): times will be off", file=sys.stderr)


def check_known(what: str, named: tuple[str, ...], known: list[str]) -> None:
    """Raises UserError if one that was named is not known."""
    for name in named:
        if name not in known:
            raise UserError(
                f"there is no {what} {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )


if __name__ == "__main__":
    run_command(main)
