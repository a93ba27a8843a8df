"""The steps of a launch and the time that each takes: a live table on a terminal, else lines."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_HOSTS_SHOWN = 16
"""More do not fit beside one another."""


@dataclass
class _Step:
    name: str
    began: float
    limit: float
    """Seconds that it may take; 0: there is no limit."""
    before: list[float]
    """Seconds of each host when the step began."""
    ended: float | None = None
    on_hosts: list[float] = field(default_factory=list)
    """Seconds that it took on each host."""


class Progress:
    """Shows steps, one after another; a context manager. The last one is under way within it.

    If an error ends the block, the step that it came in is shown as failed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: list[_Step] = []
        self._failed = False
        self._names: Sequence[str] = ()
        self._seconds: Callable[[], list[float]] = list
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._failed = error is not None
        self._end_step()
        if self._console.is_terminal:
            self._live.stop()

    def watch(self, names: Sequence[str], seconds: Callable[[], list[float]]) -> None:
        """From now on steps happen on hosts; `seconds` tells how long each has worked so far."""
        self._names, self._seconds = names, seconds

    def begin(self, name: str, limit: float = 0.0) -> None:
        """Ends the step under way, and begins another that may take `limit` seconds."""
        self._end_step()
        self._steps.append(_Step(name, time.monotonic(), limit, self._seconds()))

    def say(self, text: str) -> None:
        """Shows a line, above the table."""
        self._console.print(Text(text), soft_wrap=True)

    def _end_step(self) -> None:
        if not self._steps or self._steps[-1].ended is not None:
            return
        step = self._steps[-1]
        step.on_hosts = _difference(self._seconds(), step.before)
        step.ended = time.monotonic()
        if not self._console.is_terminal:
            took = f"{step.ended - step.began:.1f} s"
            hosts = ", ".join(f"{seconds:.0f}" for seconds in step.on_hosts)
            failed = "failed after " if self._failed else ""
            self.say(f"{step.name}: {failed}{took}{f' (by host: {hosts} s)' if hosts else ''}")

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1), header_style="dim", expand=False)
        table.add_column("step", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("at most", justify="right", no_wrap=True, style="dim")
        numbered = len(self._names) <= _HOSTS_SHOWN
        for number in range(len(self._names) if numbered else 0):
            table.add_column(f"{number}", justify="right", no_wrap=True)
        if not numbered:
            table.add_column("slowest host", no_wrap=True)
        for step in self._steps:
            table.add_row(*self._cells(step, numbered))
        return table

    def _cells(self, step: _Step, numbered: bool) -> list[Text]:
        style = "" if step.ended is not None else "bold"
        if self._failed and step is self._steps[-1]:
            style = "red"
        took = (step.ended or time.monotonic()) - step.began
        limit = f"{step.limit:.0f} s" if step.limit else ""
        on_hosts = step.on_hosts
        if step.ended is None:
            on_hosts = _difference(self._seconds(), step.before)
        cells = [Text(step.name, style), Text(f"{took:.1f} s", style), Text(limit)]
        if numbered:
            return [*cells, *(Text(f"{seconds:.0f}") for seconds in on_hosts)]
        if not on_hosts:
            return cells
        slowest = max(range(len(on_hosts)), key=on_hosts.__getitem__)
        return [*cells, Text(f"{self._names[slowest]} {on_hosts[slowest]:.0f} s")]


def _difference(now: list[float], before: list[float]) -> list[float]:
    return [after - first for after, first in zip(now, before, strict=False)]
