"""The time of a run as plots show it: from its first start on, long pauses cut short."""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PAUSE = 0.05
"""Of the time at work: as long as a pause is shown at most."""
_UNITS = (("days", 86400.0, 4.0), ("hours", 3600.0, 2.0), ("minutes", 60.0, 2.0))
"""Name, seconds, and how many of them a run takes at least to be shown in this unit."""


@dataclass(frozen=True)
class Timeline:
    """Where a time stands on the axis of a plot."""

    unit: str
    at_work: float
    """Seconds from each start to the last that was logged before the next, together."""
    shortened: bool
    """Whether a pause is shown shorter than it was."""
    _clock: tuple[float, ...]
    _shown: tuple[float, ...]

    @classmethod
    def of(cls, starts: Sequence[float], logged: Sequence[float]) -> "Timeline":
        """The timeline of a run.

        Args:
          starts: when it was started, seconds since 1970, ascending.
          logged: when something was logged, ascending.
        """
        stretches = _stretches(starts, logged)
        at_work = sum(end - begin for begin, end in stretches)
        clock, shown, shortened = [0.0], [0.0], False
        for number, (begin, end) in enumerate(stretches):
            pause = 0.0
            if number:
                pause = min(begin - clock[-1], _PAUSE * at_work)
                shortened = shortened or pause < begin - clock[-1]
            clock += [begin, end]
            shown += [shown[-1] + pause, shown[-1] + pause + end - begin]
        unit, length = next(
            ((name, seconds) for name, seconds, least in _UNITS if shown[-1] >= least * seconds),
            ("seconds", 1.0),
        )
        scaled = tuple(seconds / length for seconds in shown)
        return cls(unit, at_work, shortened, tuple(clock), scaled)

    def at(self, times: Sequence[float]) -> list[float]:
        """Where these times are, in `unit`; what was before or after the run, at its ends."""
        return np.interp(times, self._clock, self._shown).tolist()


def _stretches(starts: Sequence[float], logged: Sequence[float]) -> list[tuple[float, float]]:
    """From each start, the time up to the last line before the next one."""
    starts = [*starts] or [*logged[:1]]
    if starts and logged:
        starts[0] = min(starts[0], logged[0])
    found = []
    for begin, following in itertools.pairwise([*starts, np.inf]):
        until = bisect_left(logged, following)
        found.append((begin, max(begin, logged[until - 1]) if until else begin))
    return found
