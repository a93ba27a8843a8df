"""Runs on different numbers of devices beside one another: `python -m txl_jax.scaling RUN …`.

What was observed comes from lines of JSON as --throughput prints them, one run each, or from the
folder of a run: medians of metrics.jsonl over the log lines since its last start, without the
first, during which the devices warm up. A folder does not tell how many processes a run had, only
how many devices (run.json); the column of hosts is empty there.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from txl_jax import run_folder, scaling_picture
from txl_jax.errors import UserError
from txl_jax.logs import METRICS
from txl_jax.published import FORK_GPUS, FORK_SEQUENCES
from txl_jax.scaling_arguments import Arguments
from txl_jax.store import Store, is_remote, open_store, patiently
from txl_jax.tables import aligned

_PATIENCE = 30.0
"""Seconds for which a person who wants to read waits for a store that is away."""
_ALIKE = {
    "parameters": "parameters",
    "tgt_len": "tgt_len",
    "mem_len": "mem_len",
    "each": "sequences on each device",
    "device_kind": "kind of device",
    "dtype": "dtype",
    "remat": "remat",
    "accumulate": "accumulate",
    "zero": "zero",
    "fsdp": "fsdp",
}
"""What runs have to have in common, and how it is said."""


@dataclass(frozen=True)
class Observation:
    """The speed of a run, over all its devices."""

    run: str
    hosts: int | None
    """Processes; None: not known."""
    devices: int
    ms_per_step: float
    sequences_per_s: float
    tokens_per_s: float
    alike: dict[str, Any]
    """What it has in common with runs that it can be compared with, by `_ALIKE`."""


@dataclass(frozen=True)
class Fork:
    """What the fork has published."""

    hosts: int
    devices: int
    sequences_per_s: float
    efficiency: float
    """Against as many times one host, as a fraction."""


def run(args: Arguments) -> None:
    """Prints the comparison that `args` ask for, and draws it.

    Raises UserError: a run that cannot be read, or cannot be compared with the others.
    """
    found = sorted(
        (one for run in args.runs for one in read(run)), key=lambda observed: observed.devices
    )
    check_comparable(found)
    print(json.dumps(numbers(found)) if args.json else show(found))
    scaling_picture.draw(
        Path(args.out),
        [(one.devices, one.tokens_per_s, ideal(found, one)) for one in found],
        [
            (one.hosts, one.sequences_per_s, one.hosts * FORK_SEQUENCES[1])
            for one in fork_published()
        ],
    )
    if not args.json:
        print(f"\nPicture: {args.out}")


def read(run: str) -> list[Observation]:
    """What was observed in a RUN of the command line.

    Raises UserError: there is nothing of this name, it cannot be read, or it tells no speed.
    """
    if run == "-":
        return _of_lines("standard input", sys.stdin.buffer.read())
    if not is_remote(run) and not Path(run).exists():
        raise UserError(f"there is no file or folder {run}")
    store = open_store(run)
    if is_remote(run):
        is_folder = run_folder.CONFIG in _patiently_named(store)
    else:
        is_folder = Path(run).is_dir()
    if is_folder:
        return [_of_folder(run, store)]
    parent, _, name = run.rpartition("/")
    within = open_store(parent or ("/" if run.startswith("/") else "."))
    return _of_lines(run, _read(within, name, run))


def fork_published() -> list[Fork]:
    """The fork's figures, by hosts."""
    return [
        Fork(hosts, FORK_GPUS * hosts, rate, rate / (hosts * FORK_SEQUENCES[1]))
        for hosts, rate in FORK_SEQUENCES.items()
    ]


def check_comparable(found: list[Observation]) -> None:
    """Raises UserError, in one line, for the first run that differs in more than its devices."""
    first = found[0]
    for other in found[1:]:
        differ = [
            f"{said} {first.alike[name]} and {other.alike[name]}"
            for name, said in _ALIKE.items()
            if first.alike[name] != other.alike[name]
        ]
        if differ:
            raise UserError(
                f"{first.run} and {other.run} cannot be compared: {'; '.join(differ)}; only the "
                "number of devices may differ"
            )


def ideal(found: list[Observation], observed: Observation) -> float:
    """Tokens/s of as many devices if each made what one of the smallest run makes.

    Of several runs on the fewest devices it is the median.
    """
    fewest = min(one.devices for one in found)
    rates = [one.tokens_per_s for one in found if one.devices == fewest]
    return statistics.median(rates) * observed.devices / fewest


def show(found: list[Observation]) -> str:
    """The table, the fork's figures beside runs on as many devices."""
    fork = {one.devices: one for one in fork_published()}
    rows = [
        (
            *("run", "hosts", "devices", "tokens/s", "sequences/s", "ms/step", "efficiency"),
            *("fork: hosts", "sequences/s", "efficiency"),
        )
    ]
    for one in found:
        rows.append(
            (
                one.run,
                "" if one.hosts is None else f"{one.hosts}",
                f"{one.devices}",
                f"{one.tokens_per_s:,.0f}",
                f"{one.sequences_per_s:,.1f}",
                f"{one.ms_per_step:.1f}",
                f"{one.tokens_per_s / ideal(found, one):.1%}",
                *_beside(fork.get(one.devices)),
            )
        )
    observed = {one.devices for one in found}
    for other in fork.values():
        if other.devices not in observed:
            rows.append(("", "", f"{other.devices}", "", "", "", "", *_beside(other)))
    alike = found[0].alike
    return "\n".join(
        [
            f"{alike['device_kind']}, {alike['dtype']}, {alike['parameters']:,} parameters, "
            f"{alike['each']:g} x {alike['tgt_len']} tokens on each device",
            "",
            aligned(rows),
            "",
            f"Efficiency: against {min(observed)} device{'s' * (min(observed) > 1)}, scaled "
            f"linearly; the fork's against one p3dn of {FORK_GPUS} V100.",
            "The fork's sequences/s are as it published them, six times what its logs come to",
            "(configs/_fork.py says why); its efficiency is not touched by that.",
        ]
    )


def numbers(found: list[Observation]) -> dict[str, Any]:
    """The same, ready for JSON."""
    return {
        "runs": [
            asdict(one) | {"efficiency": one.tokens_per_s / ideal(found, one)} for one in found
        ],
        "fork": [asdict(one) for one in fork_published()],
    }


def _beside(fork: Fork | None) -> tuple[str, str, str]:
    if fork is None:
        return "", "", ""
    return f"{fork.hosts}", f"{fork.sequences_per_s:,}", f"{fork.efficiency:.1%}"


def _of_lines(run: str, content: bytes) -> list[Observation]:
    """One for each line of --throughput; others are passed over."""
    found = [observed for line in content.splitlines() for observed in _of_line(run, line)]
    if not found:
        raise UserError(
            f"{run} has no line of JSON as python -m txl_jax.train … --throughput prints it"
        )
    return found


def _of_line(run: str, line: bytes) -> Iterator[Observation]:
    try:
        told = json.loads(line)
        alike = {name: told[name] for name in _ALIKE if name != "each"}
        observed = Observation(
            f"{told['config']} in {run}",
            int(told["processes"]),
            int(told["devices"]),
            float(told["ms_per_step"]["median"]),
            float(told["sequences_per_s"]["median"]),
            float(told["tokens_per_s"]["median"]),
            alike | {"each": told["batch"] / told["devices"]},
        )
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return  # a line of other things
    if 0 < observed.tokens_per_s < math.inf and observed.ms_per_step > 0:
        yield observed


def _of_folder(run: str, store: Store) -> Observation:
    cfg = run_folder.parse_config(
        _parsed(store, run_folder.CONFIG, run), f"{run}/{run_folder.CONFIG}"
    )
    started, devices, device_kind = _last_start(store, run)
    lines = [_object(line) for line in _read(store, METRICS, run).splitlines()]
    parameters = next((line["sizes/params"] for line in lines if "sizes/params" in line), None)
    timed = [line for line in lines if line.get("time", 0) >= started and _is_timed(line)]
    if parameters is None or not timed:
        raise UserError(f"{run} tells no speed yet: {METRICS} has no log line since the last start")
    timed = timed[1:] or timed
    step, sequences, tokens = (
        statistics.median(line[tag] for line in timed)
        for tag in ("times/step", "times/samples_per_sec", "times/tokens_per_sec")
    )
    alike = {
        "parameters": int(parameters),
        "tgt_len": cfg.model.tgt_len,
        "mem_len": cfg.model.mem_len,
        "each": cfg.train.batch / devices,
        "device_kind": device_kind,
        "dtype": cfg.model.dtype,
        "remat": cfg.model.remat,
        "accumulate": cfg.train.accumulate,
        "zero": cfg.cluster.zero,
        "fsdp": cfg.cluster.fsdp,
    }
    return Observation(run, None, devices, step, sequences, tokens, alike)


def _last_start(store: Store, run: str) -> tuple[float, int, str]:
    """When the run was started last, in seconds since 1970, on how many devices and which."""
    told = _parsed(store, run_folder.STARTS, run)
    try:
        start = told["starts"][-1]
        devices, device_kind = start["devices"].split(" x ", 1)
        return datetime.fromisoformat(start["time"]).timestamp(), int(devices), device_kind
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError(
            f"{run}/{run_folder.STARTS} does not tell on which devices the run was"
        ) from None


def _is_timed(line: dict[str, Any]) -> bool:
    tags = ("times/step", "times/samples_per_sec", "times/tokens_per_sec")
    return all(isinstance(line.get(tag), float) for tag in tags)


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; an empty one where there is none."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _parsed(store: Store, name: str, run: str) -> Any:
    content = _read(store, name, run)
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{run}/{name} is damaged ({error})") from None


def _read(store: Store, name: str, run: str) -> bytes:
    try:
        return patiently(lambda: store.read(name), _PATIENCE)
    except FileNotFoundError:
        raise UserError(f"{run} is no run with log lines: there is no {name}") from None


def _patiently_named(store: Store) -> list[str]:
    return patiently(lambda: store.names(run_folder.CONFIG), _PATIENCE)
