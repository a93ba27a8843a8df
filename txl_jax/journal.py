"""What a run tells while it goes on: lines on the terminal, a progress bar, and its log files.

Of several processes the first one tells; the others only show that they live.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self, SupportsFloat

import jax
from tqdm import tqdm

from txl_jax.course import Course
from txl_jax.heartbeat import Heartbeat
from txl_jax.logs import Logs


def say(text: str) -> None:
    """Prints a line above the progress bar, in the first process."""
    if jax.process_index() != 0:
        return
    with tqdm.external_write_mode():
        print(text, flush=True)


class Journal:
    """The log files and the progress bar of one process; a context manager that closes them.

    Args:
      logdir: the run's folder.
      step: optimizer steps made before; what an earlier process logged beyond them is cut off.
      steps: optimizer steps that the run will make.
      course: how many tokens have been seen after a step.
      earlier: names of TensorBoard files of the run that are elsewhere.

    Every method raises UserError when a file cannot be written.
    """

    def __init__(
        self, logdir: Path, step: int, steps: int, course: Course, earlier: Sequence[str] = ()
    ):
        self._course, self._primary = course, jax.process_index() == 0
        self._heartbeat = Heartbeat(logdir, jax.process_index(), step)
        with ExitStack() as opened:
            self._bar = tqdm(
                total=steps,
                initial=step,
                unit="step",
                delay=2,
                leave=False,
                disable=None if self._primary else True,
            )
            opened.callback(self._bar.close)
            if self._primary:
                seen = course.tokens(step) if step else None
                self._logs = opened.enter_context(Logs(logdir, seen, earlier))
            self._opened = opened.pop_all()

    def advance(self) -> None:
        """Moves the bar by a step."""
        self._bar.update()
        self._heartbeat.advance()

    def work_on(self) -> None:
        """Tells that something long goes on that is no step."""
        self._heartbeat.work_on()

    def scalars(self, step: int, values: Mapping[str, SupportsFloat], line: str = "") -> None:
        """Logs numbers after `step` optimizer steps, and prints a line if there is one."""
        if "times/tokens_per_sec" in values:
            loss = float(values["learning/loss"]) if self._primary else None
            own = float(values["times/own"]) if "times/own" in values else None
            self._heartbeat.measured(loss, float(values["times/tokens_per_sec"]), own)
        if self._primary:
            self._logs.scalars(step, self._course.tokens(step), values)
        if line:
            say(line)

    def text(self, step: int, tag: str, text: str) -> None:
        """Logs a text after `step` optimizer steps."""
        if self._primary:
            self._logs.text(step, self._course.tokens(step), tag, text)

    def flush(self) -> None:
        """Brings everything that was logged to the disk."""
        if self._primary:
            self._logs.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._opened.close()
        if kind is None:
            self._heartbeat.show()
