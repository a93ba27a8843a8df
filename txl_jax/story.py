"""What the folder of a run tells of it afterwards.

    config.json          its settings
    run.json             its starts
    metrics.jsonl        the numbers that it logged
    samples.txt          the texts that it logged
    results.json         its final evaluation, when it has finished
    heartbeats/P.json    the last sign of life of process P

A folder may be young, or the files damaged: what is not of the right form is left out, and said
where it matters. Imports no JAX.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from txl_jax import heartbeat, run_folder
from txl_jax.errors import UserError
from txl_jax.json_values import count, listed, mapping, moment, number, parse, seconds, text
from txl_jax.measure import BITS_PER_BYTE, PERPLEXITY, TOKEN_PERPLEXITY, Measure

METRICS, SAMPLES, RESULTS = "metrics.jsonl", "samples.txt", "results.json"
"""As `logs` and `results` write them, which import what takes long."""
INTERRUPTIONS = ("preempted", "failed", "stalled")
"""Kinds of events that interrupt training."""
KINDS = (*INTERRUPTIONS, "moved", "restarted", "budget", "finished")
_MEASURES = {"bytes": BITS_PER_BYTE, "words": PERPLEXITY, "bpe": TOKEN_PERPLEXITY}
_HEADING = re.compile(rb"step (\d{1,18}), (\d{1,18}) tokens, .*")
_INDENT = b"    "
_SIGN = re.compile(r"(\d{1,6})\.json")


@dataclass(frozen=True)
class Line:
    """What was logged at one time."""

    step: int
    """Optimizer steps made."""
    tokens: int
    """Tokens seen."""
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float]
    """By tag, as `metrics` names them; only what is finite."""


@dataclass(frozen=True)
class Start:
    """One start of the trainer."""

    time: datetime
    command: str
    devices: str
    source: str
    """Commit, with `-dirty` where files were changed; empty: not known."""
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote while it was trained."""

    step: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Evaluation:
    """The final evaluation."""

    step: int
    """Optimizer steps that made the parameters."""
    bits: Mapping[str, Mapping[str, float]]
    """Bits for each token, by split and, as text, length of memory."""
    tokens: Mapping[str, int]
    """Tokens of each split."""
    sample: str


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a process."""

    process: int
    host: str
    step: int | None
    tokens_per_s: float | None
    """Speed of the whole run, as this process has timed it."""
    own_ms: float | None
    """Milliseconds of a small computation that is the same on all hosts; None: not timed."""
    time: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Event:
    """What a watcher saw or did."""

    time: datetime
    kind: str
    """One of KINDS."""
    text: str
    hosts: tuple[int, ...]
    step: int | None
    lost_seconds: float | None
    cost: float | None
    """US dollars so far."""


@dataclass(frozen=True)
class Watched:
    """What watchers have written down of a run."""

    events: tuple[Event, ...]
    """The oldest first."""
    damaged: int
    """Events that could not be read."""
    cost: float | None
    """US dollars of all hosts that the run ever had; None: not known."""


@dataclass(frozen=True)
class RentedHost:
    """A host that the launcher rented for a run."""

    number: int
    instance: str
    kind: str
    zone: str
    spot: bool
    state: str
    price: float | None
    """US dollars an hour."""
    hours: float


@dataclass(frozen=True)
class Launch:
    """What the launcher knows of a run."""

    command: str
    """What to type to launch it again; empty: not known."""
    revision: str
    """The source's commit, as `Start.source`."""
    own_corpus: bool
    """Whether its hosts were brought a corpus from the machine where the command was typed."""
    hosts: tuple[RentedHost, ...]
    """Those that EC2 remembers."""
    cost: float | None
    """US dollars of these hosts; None: not known."""


@dataclass(frozen=True)
class Restart:
    """A start after the first one."""

    start: Start
    step: int
    """The last step before it that is still in the log."""
    lost_seconds: float | None
    """From the last line before it to the first one after it, but for the time that the steps
    between them take. Where nothing was logged between two starts, the time before the second is
    lost to it. None: nothing was logged after it, or before."""
    causes: tuple[Event, ...]
    """What a watcher saw that interrupted training since the start before."""


@dataclass(frozen=True)
class Story:
    """A run, as it is told."""

    name: str
    config: Mapping[str, Mapping[str, Any]]
    """Settings by section and name."""
    lines: tuple[Line, ...]
    starts: tuple[Start, ...]
    """The oldest first."""
    samples: tuple[Sample, ...]
    evaluation: Evaluation | None
    """None: there is none yet."""
    signs: tuple[Sign, ...]
    """By process."""
    watched: Watched | None
    """None: no watcher looked on."""
    launch: Launch | None
    """None: it was not asked for, or the launcher does not know the run."""
    damage: tuple[str, ...]
    """What could not be read, each a sentence."""

    @property
    def measure(self) -> Measure:
        """What losses are shown in besides nats."""
        return _MEASURES.get(text(self.setting("data", "vocab")), TOKEN_PERPLEXITY)

    @property
    def last_seen(self) -> float | None:
        """When it last logged or showed a sign of life, seconds since 1970."""
        return max((told.time for told in (*self.lines, *self.signs)), default=None)

    def setting(self, section: str, name: str) -> Any:
        """A setting; None if the config does not have it."""
        return self.config.get(section, {}).get(name)

    def series(self, tag: str) -> list[tuple[Line, float]]:
        """The lines that have the tag, each with its value."""
        return [(line, line.values[tag]) for line in self.lines if tag in line.values]

    def tokens_at(self, time: float) -> int:
        """Tokens seen by the last line before a time, in seconds since 1970; 0: there is none."""
        before = bisect_left(self.lines, time, key=lambda line: line.time)
        return self.lines[before - 1].tokens if before else 0

    def restarts(self) -> list[Restart]:
        """The starts after the first one, and what is known of them."""
        events = self.watched.events if self.watched else ()
        found = []
        for index, (before, start) in enumerate(itertools.pairwise(self.starts), 1):
            last, lost = self._before(index)
            found.append(
                Restart(
                    start=start,
                    step=last.step if last else 0,
                    lost_seconds=lost,
                    causes=tuple(
                        event
                        for event in events
                        if event.kind in INTERRUPTIONS and before.time <= event.time <= start.time
                    ),
                )
            )
        return found

    def _before(self, index: int) -> tuple[Line | None, float | None]:
        """The last line before a start, and the seconds that were lost to it."""
        times = [start.time.timestamp() for start in self.starts]
        at, *following = (
            bisect_left(self.lines, time, key=lambda line: line.time)
            for time in times[index : index + 2]
        )
        if not at:
            return None, None
        last, later = self.lines[at - 1], self.lines[at : following[0] if following else None]
        since = max(last.time, times[index - 1])
        if following and not later:
            return last, times[index] - since
        return last, _lost(last, since, later)


def read(folder: Path, watched: Any = None, launch: Launch | None = None) -> Story:
    """The story of the run in a folder.

    Args:
      watched: what watchers have written down, as JSON says it; None: nothing.

    Raises UserError when there is no run in that folder, or what it says cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no run in {folder}: there is no such folder")
    content = _content(folder / run_folder.CONFIG)
    if content is None:
        raise UserError(f"no run in {folder}: {run_folder.CONFIG} is missing from it")
    config = parse(content)
    if not isinstance(config, dict) or not all(isinstance(part, dict) for part in config.values()):
        raise UserError(f"{folder / run_folder.CONFIG} is damaged: it holds no config of a run")
    damage: list[str] = []
    return Story(
        name=folder.resolve().name,
        config=config,
        lines=tuple(_lines(_content(folder / METRICS) or b"", damage)),
        starts=tuple(_starts(_content(folder / run_folder.STARTS), damage)),
        samples=tuple(_samples(_content(folder / SAMPLES) or b"")),
        evaluation=_evaluation(_content(folder / RESULTS), damage),
        signs=tuple(_signs(folder / heartbeat.FOLDER)),
        watched=None if watched is None else _watched(watched),
        launch=launch,
        damage=tuple(damage),
    )


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _lines(content: bytes, damage: list[str]) -> Iterator[Line]:
    damaged = 0
    for row in content.splitlines():
        told = mapping(parse(row))
        step, tokens = count(told.pop("step", None)), count(told.pop("tokens", None))
        time = seconds(told.pop("time", None))
        if step is None or tokens is None or time is None:
            damaged += 1
            continue
        values = {tag: value for tag, found in told.items() if (value := number(found)) is not None}
        yield Line(step, tokens, time, values)
    if damaged:
        damage.append(f"{damaged} damaged line{'s' * (damaged > 1)} of {METRICS} passed over.")


def _starts(content: bytes | None, damage: list[str]) -> list[Start]:
    told = listed(mapping(parse(content)).get("starts"))
    found = []
    for start in map(mapping, told):
        if time := moment(start.get("time")):
            versions = mapping(start.get("versions"))
            found.append(
                Start(
                    time=time,
                    command=text(start.get("command")),
                    devices=text(start.get("devices")),
                    source=text(start.get("source")),
                    versions={name: text(version) for name, version in versions.items()},
                )
            )
    if not found or len(found) < len(told):
        damage.append(f"{run_folder.STARTS} is missing or damaged: not all starts are known.")
    return sorted(found, key=lambda start: start.time)


def _samples(content: bytes) -> Iterator[Sample]:
    """As `Logs.text` writes them: a heading, then the text with every line indented."""
    heading, rows = None, []
    for row in [*content.split(b"\n"), b""]:
        if heading and row.startswith(_INDENT):
            rows.append(row.removeprefix(_INDENT))
            continue
        if heading and rows:
            told = b"\n".join(rows).decode(errors="replace")
            yield Sample(int(heading[1]), int(heading[2]), told)
        heading, rows = _HEADING.fullmatch(row), []


def _evaluation(content: bytes | None, damage: list[str]) -> Evaluation | None:
    if content is None:
        return None
    told = mapping(parse(content))
    bits = {
        split: {
            length: value
            for length, found in mapping(lengths).items()
            if (value := number(found)) is not None
        }
        for split, lengths in mapping(told.get("bits")).items()
    }
    sizes = mapping(told.get("tokens"))
    step = count(told.get("step"))
    if step is None or not any(bits.values()):
        damage.append(f"{RESULTS} is damaged: the final evaluation is not known.")
        return None
    tokens = {split: size for split in bits if (size := count(sizes.get(split))) is not None}
    return Evaluation(step, bits, tokens, text(told.get("sample")))


def _signs(folder: Path) -> list[Sign]:
    found = []
    for path in folder.glob("*.json"):
        name = _SIGN.fullmatch(path.name)
        told = mapping(parse(_content(path)))
        if name and (time := seconds(told.get("time"))) is not None:
            found.append(
                Sign(
                    process=int(name[1]),
                    host=text(told.get("host")),
                    step=count(told.get("step")),
                    tokens_per_s=number(told.get("tokens_per_s")),
                    own_ms=number(told.get("own_ms")),
                    time=time,
                )
            )
    return sorted(found, key=lambda sign: sign.process)


def _watched(content: Any) -> Watched:
    told = listed(mapping(content).get("events"))
    events = [event for found in told if (event := _event(mapping(found)))]
    return Watched(
        events=tuple(sorted(events, key=lambda event: event.time)),
        damaged=len(told) - len(events),
        cost=number(mapping(content).get("cost")),
    )


def _event(told: Mapping[str, Any]) -> Event | None:
    time, kind = moment(told.get("time")), text(told.get("kind"))
    if time is None or kind not in KINDS:
        return None
    return Event(
        time=time,
        kind=kind,
        text=text(told.get("text")),
        hosts=tuple(
            host for found in listed(told.get("hosts")) if (host := count(found)) is not None
        ),
        step=count(told.get("step")),
        lost_seconds=seconds(told.get("lost_seconds")),
        cost=number(told.get("cost")),
    )


def _lost(last: Line, since: float, later: Sequence[Line]) -> float | None:
    """Seconds from `since` to the lines after a start in which no step after `last` was made."""
    for line in later:
        if (milliseconds := line.values.get("times/step")) is not None:
            steps = (line.step - last.step) * milliseconds / 1000
            return max(0.0, line.time - since - steps)
    return None
