"""The pictures of a report: what a run logged, over tokens and over time, as PNGs.

No text of the run is drawn, but for numbers: what a library for plots makes of foreign text is
another's to say.
"""

import io
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from txl_jax.story import INTERRUPTIONS, Line, Start, Story
from txl_jax.timeline import Timeline

_Axis = Literal["tokens", "time"]
_X: tuple[_Axis, ...] = ("tokens", "time")
_SIZE = (5.2, 3.2)
"""In inches of 10 pt text, so that it is read at a phone's width."""
_DPI = 200
"""As sharp as a phone's screen."""
_TRAIN, _VALID, _OTHER = "#2563eb", "#ea580c", "#7c3aed"
_MARKS = {"restart": "0.4", "interruption": "#dc2626", "budget": "#ca8a04"}
_NO_LOSS_SCALE = "only float16 has a loss scale, which a step may overflow"
_DECADE = 10.0
_IN_FULL = 1e12
_MOST_BARS = 64


@dataclass(frozen=True)
class Picture:
    """A picture, or why there is none."""

    name: str
    """Of its file, without .png."""
    title: str
    about: str
    """What it shows, for those who cannot see it; or why there is nothing to see."""
    png: bytes | None


@dataclass(frozen=True)
class _Curve:
    tag: str
    label: str
    color: str
    style: str = "-"
    """As matplotlib's `fmt`."""
    scale: float = 1.0
    """Of the values, for the unit of the axis."""


@dataclass(frozen=True)
class _Plot:
    """Curves over one axis."""

    name: str
    title: str
    x: _Axis
    y: str
    """What the vertical axis is called."""
    curves: tuple[_Curve, ...]
    from_zero: bool = False
    """Of amounts. Otherwise what falls or rises by decades has an axis of decades."""
    whole: bool = False
    """Of whole numbers."""
    absent: str = "nothing was logged yet"


@dataclass(frozen=True)
class _Mark:
    """A thin vertical line."""

    label: str
    time: float
    tokens: int


def draw(story: Story) -> list[Picture]:
    """All pictures, in the order in which they are looked at."""
    timeline, marks = timeline_of(story), _marks(story)
    pictures = [_picture(story, plot, timeline, marks) for plot in _plots(story)]
    return [*pictures[:5], _bars(story), *pictures[5:]]


def _plots(story: Story) -> list[_Plot]:
    measure = story.measure
    losses = (
        _Curve("learning/loss", "training", _TRAIN),
        _Curve("learning/val_loss", "validation", _VALID, "o-"),
    )
    measured = (
        _Curve(f"learning/{measure.tag}", "training", _TRAIN),
        _Curve(f"learning/val_{measure.tag}", "validation", _VALID, "o-"),
    )
    speed = _Curve("times/tokens_per_sec", "the whole run", _TRAIN)
    rate = _Curve("learning/lr", "learning rate", _TRAIN)
    norm = _Curve("learning/grad_norm", "gradient norm", _TRAIN)
    overflows = _Curve("learning/overflows", "overflows so far", _VALID)
    memory = (
        _Curve("memory/device_peak", "device, at most so far", _OTHER, scale=1e-9),
        _Curve("memory/host_peak", "host, at most so far", _TRAIN, scale=1e-9),
    )
    unscaled = {"absent": _NO_LOSS_SCALE} if story.lines else {}
    title = measure.name.capitalize()
    return [
        *(_Plot(f"loss-{x}", f"Loss over {x}", x, "nats per token", losses) for x in _X),
        *(_Plot(f"{measure.tag}-{x}", f"{title} over {x}", x, measure.name, measured) for x in _X),
        _Plot("throughput", "Throughput over time", "time", "tokens/s", (speed,), from_zero=True),
        _Plot("learning-rate", "Learning rate", "tokens", "", (rate,), from_zero=True),
        _Plot("gradient-norm", "Gradient norm, before clipping", "tokens", "", (norm,)),
        _Plot(
            "overflows", "Overflows", "tokens", "steps", (overflows,), True, whole=True, **unscaled
        ),
        _Plot("memory", "Memory of process 0", "time", "GB", memory, from_zero=True),
    ]


def timeline_of(story: Story) -> Timeline:
    """The time of a run, as its pictures show it."""
    return Timeline.of(
        [start.time.timestamp() for start in story.starts], [line.time for line in story.lines]
    )


def _marks(story: Story) -> list[_Mark]:
    """Restarts, and what a watcher saw."""
    times = [(restart.start.time.timestamp(), "restart") for restart in story.restarts()]
    for event in story.watched.events if story.watched else ():
        if event.kind in INTERRUPTIONS:
            times.append((event.time.timestamp(), "interruption"))
        elif event.kind == "budget":
            times.append((event.time.timestamp(), "budget"))
    return [_Mark(label, time, story.tokens_at(time)) for time, label in times]


def _picture(story: Story, plot: _Plot, timeline: Timeline, marks: Sequence[_Mark]) -> Picture:
    drawn = [(curve, points) for curve in plot.curves if (points := story.series(curve.tag))]
    if not drawn:
        return Picture(plot.name, plot.title, plot.absent, None)
    figure, axes = _axes()
    for curve, points in drawn:
        values = [curve.scale * value for _, value in points]
        if plot.x == "tokens":
            places = [line.tokens for line, _ in points]
        else:
            times, values = _broken([line.time for line, _ in points], values, story.starts)
            places = timeline.at(times)
        axes.plot(
            places,
            values,
            "o" if len(points) == 1 else curve.style,  # a line of one point would not be seen
            color=curve.color,
            label=curve.label,
            linewidth=1.3,
            markersize=3.5,
        )
    for mark, place in zip(marks, timeline.at([mark.time for mark in marks]), strict=True):
        axes.axvline(
            mark.tokens if plot.x == "tokens" else place,
            color=_MARKS[mark.label],
            label=mark.label,
            linewidth=1,
            linestyle=":",
            zorder=1,
        )
    axes.set_xlabel("tokens" if plot.x == "tokens" else timeline.unit)
    axes.set_ylabel(plot.y)
    if plot.x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    _set_scale(axes, plot, [curve.scale * value for curve, found in drawn for _, value in found])
    handles, labels = axes.get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))  # each kind of mark once
    if len(legend) > 1:
        axes.legend(legend.values(), legend.keys(), frameon=False, fontsize="small")
    about = f"{plot.title}: {'; '.join(_told(curve, points) for curve, points in drawn)}."
    return Picture(plot.name, plot.title, about, _png(figure))


def _broken(
    times: list[float], values: list[float], starts: Sequence[Start]
) -> tuple[list[float], list[float]]:
    """A curve over time with a gap at each start, as nothing was done just before it."""
    times, values = [*times], [*values]
    for start in starts:
        time = start.time.timestamp()
        place = bisect_left(times, time)
        times.insert(place, time)
        values.insert(place, math.nan)
    return times, values


def _set_scale(axes: Axes, plot: _Plot, values: Sequence[float]) -> None:
    if plot.from_zero:
        axes.set_ylim(0, 1.05 * max(values) or 1)
        if plot.whole:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    elif min(values) > 0 and max(values) > _DECADE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _bars(story: Story) -> Picture:
    """The speed of the run that each process has timed last."""
    name, title = "processes", "Throughput, as each process last saw it"
    shown: Callable[[float], str] = EngFormatter(sep="", places=1)
    rates = [(sign.process, sign.tokens_per_s) for sign in story.signs]
    told = [(process, rate) for process, rate in rates if rate is not None][:_MOST_BARS]
    if not told:
        return Picture(name, title, "no process has left a sign of its speed", None)
    figure, axes = _axes(0.9 + 0.25 * len(told))
    places = range(len(told))
    bars = axes.barh(places, [rate for _, rate in told], color=_TRAIN, height=0.6)
    axes.bar_label(bars, [shown(rate) for _, rate in told], padding=3, fontsize="small")
    axes.set_yticks(places, [f"process {process}" for process, _ in told])
    axes.set_ylim(len(told) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(rate for _, rate in told) or 1)
    axes.set_xlabel("tokens/s of the whole run")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    about = "; ".join(f"process {process}: {rate:,.0f} tokens/s" for process, rate in told)
    return Picture(name, title, f"{title}: {about}.", _png(figure))


def _told(curve: _Curve, points: Sequence[tuple[Line, float]]) -> str:
    """A curve in words."""
    values = [curve.scale * value for _, value in points]
    first, last, lowest, highest = (
        f"{value:,.0f}" if 1000 <= abs(value) < _IN_FULL else f"{value:.4g}"
        for value in (values[0], values[-1], min(values), max(values))
    )
    return f"{curve.label} from {first} to {last}, lowest {lowest}, highest {highest}"


def _axes(height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, format="png", metadata={"Software": None})
    return file.getvalue()
