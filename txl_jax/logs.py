"""What a run says while it goes on: TensorBoard, metrics.jsonl, samples.txt, and the progress line.

    events.out.tfevents.*   TensorBoard; its x-axis is tokens
    metrics.jsonl           the same scalars: {"step": 50, "tokens": 51200, "time": …, TAG: …}
    samples.txt             the same texts, each below a line that names its step

Importing this module imports tensorboardX, which takes about a third of a second.
"""

import json
import math
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, SupportsFloat

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c

from txl_jax.errors import UserError
from txl_jax.measure import Measure

METRICS = "metrics.jsonl"
SAMPLES = "samples.txt"
EVENTS = "events.out.tfevents."
"""How the names of TensorBoard's files begin; then come ten digits, the second of the start."""
EVENTS_SECOND = re.compile(re.escape(EVENTS) + r"(\d+)\.")
_HEADING = re.compile(rb"step \d+, (\d+) tokens, ")
_INDENT = "    "


class Logs:
    """The log files of a run; a context manager that closes them.

    `resume_tokens` is the number of tokens that the restored state has seen, None when the run
    starts from the beginning. What an earlier process logged beyond it is cut off (in TensorBoard:
    hidden), since it will be logged again.

    `earlier`: names of the run's files that are kept elsewhere. TensorBoard reads files by name, so
    the new file's sorts after all earlier ones, whatever the clock says.

    What is logged has left the process when a call returns, so that a killed one loses none of it.
    A machine that goes down may lose what was not flushed. So: log a step, `flush`, then save it.

    tensorboardX makes the events, but its SummaryWriter is not used: it hands them to a thread
    through a short queue, and on a full disk the thread dies and the queue blocks its caller for
    ever.

    Every method raises UserError when a file cannot be written.
    """

    def __init__(self, logdir: Path, resume_tokens: int | None, earlier: Iterable[str] = ()):
        self._logdir = logdir
        keep = -1 if resume_tokens is None else resume_tokens
        with self._writing(), ExitStack() as files:
            _cut(logdir / METRICS, keep, _tokens_of_metrics)
            _cut(logdir / SAMPLES, keep, _tokens_of_heading)
            name = _after([*earlier, *(path.name for path in logdir.glob(EVENTS + "*"))])
            self._metrics = files.enter_context((logdir / METRICS).open("ab"))
            self._samples = files.enter_context((logdir / SAMPLES).open("ab"))
            self._events = files.enter_context((logdir / name).open("xb"))
            restart = SessionLog(status=SessionLog.START)
            self._events.write(_record(Event(file_version="brain.Event:2")))
            self._events.write(_record(Event(step=keep + 1, session_log=restart)))
            self.flush()
            self._files = files.pop_all()

    def scalars(self, step: int, tokens: int, values: Mapping[str, SupportsFloat]) -> None:
        """Logs numbers after `step` optimizer steps and `tokens` tokens.

        In metrics.jsonl equal numbers have equal text, and nan and infinities are null.
        """
        numbers = {tag: float(value) for tag, value in values.items()}
        line = {"step": step, "tokens": tokens, "time": time.time()} | {
            tag: value if math.isfinite(value) else None for tag, value in numbers.items()
        }
        events = [
            Event(step=tokens, summary=summary.scalar(tag, value)) for tag, value in numbers.items()
        ]
        self._write(self._metrics, json.dumps(line, allow_nan=False).encode() + b"\n")
        self._write(self._events, b"".join(map(_record, events)))

    def text(self, step: int, tokens: int, tag: str, text: str) -> None:
        """Logs a text, shown as it is, every line indented."""
        text = text.encode("utf-8", "replace").decode()  # UTF-8 holds no lone surrogates
        indented = "".join(_INDENT + line + "\n" for line in text.split("\n"))
        event = Event(step=tokens, summary=summary.text(tag, indented))
        self._write(self._samples, f"step {step}, {tokens} tokens, {tag}\n{indented}\n".encode())
        self._write(self._events, _record(event))

    def flush(self) -> None:
        """Brings everything that was logged to the disk."""
        with self._writing():
            for file in (self._metrics, self._samples, self._events):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        with self._writing():
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, file: BinaryIO, content: bytes) -> None:
        with self._writing():
            file.write(content)
            file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the logs in {self._logdir}: {error.strerror or error}; mend that "
                f"and give the same command again: the run goes on from its last checkpoint"
            ) from error


def _after(names: Iterable[str]) -> str:
    """Name of an events file that sorts after those among `names`: by the clock, or later."""
    seconds = [int(match[1]) for name in names if (match := EVENTS_SECOND.match(name))]
    second = max([round(time.time()), *(second + 1 for second in seconds)])
    return f"{EVENTS}{second:010d}.{socket.gethostname()}"


def _record(event: Event) -> bytes:
    """The event as it stands in a file: length, its checksum, content, its checksum (TFRecord)."""
    event.wall_time = time.time()
    content = event.SerializeToString()
    return _checked(struct.pack("<Q", len(content))) + _checked(content)


def _checked(part: bytes) -> bytes:
    return part + struct.pack("<I", masked_crc32c(part))


def _cut(path: Path, keep: int, tokens_of: Callable[[bytes], int | None]) -> None:
    """Cuts `path` before the first line that was logged after `keep` tokens or never ended."""
    if not path.exists():
        return
    length = 0
    with path.open("rb") as file:
        for line in file:
            tokens = tokens_of(line)
            if not line.endswith(b"\n") or (tokens is not None and tokens > keep):
                break
            length += len(line)
    os.truncate(path, length)  # one step, and it needs no space on a full disk


def _tokens_of_metrics(line: bytes) -> int | None:
    try:
        return json.loads(line)["tokens"]
    except (ValueError, TypeError, KeyError):
        return None  # damaged: left for people to judge


def _tokens_of_heading(line: bytes) -> int | None:
    match = _HEADING.match(line)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Progress:
    """What a progress line shows."""

    step: int
    """Optimizer steps made."""
    steps: int
    """Optimizer steps that the run will make."""
    tokens: int
    """Tokens seen."""
    loss: float
    """Nats for each token."""
    measure: Measure
    """What the loss is shown in besides."""
    lr: float
    """Learning rate."""
    step_seconds: float
    """Seconds for a step."""
    tokens_per_sec: float
    """Tokens trained on in a second."""
    mfu: float | None
    """Fraction of the device's peak FLOP/s that the model uses; None: not known."""
    seconds_left: float
    """Seconds until the end of the run."""


def progress_line(at: Progress) -> str:
    """One line for the terminal, as `step 500/2400 | 512k tokens | loss 1.5432 | bpb 2.226 | …`."""
    milliseconds = at.step_seconds * 1000
    parts = [
        f"step {at.step}/{at.steps}",
        f"{_short(at.tokens)} tokens",
        f"loss {at.loss:.4f}",
        at.measure.progress(at.loss),
        f"lr {at.lr:.1e}",
        f"{milliseconds:.0f} ms/step" if milliseconds >= 10 else f"{milliseconds:.1f} ms/step",
        f"{_short(at.tokens_per_sec)} tokens/s",
    ]
    if at.mfu is not None:
        parts.append(f"MFU {at.mfu:.1%}")
    return " | ".join([*parts, f"{_duration(at.seconds_left)} left"])


def _short(number: float) -> str:
    """Three digits and a unit: 950, 10.4k, 1.25M, 103M, 2.4B."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B" if number < 999.5 else f"{number:.0f}B"


def _duration(seconds: float) -> str:
    """The two largest units: 42s, 3m02s, 2h05m, 3d04h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{rest:02d}s"
    return f"{rest}s"
