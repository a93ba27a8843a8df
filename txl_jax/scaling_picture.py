"""Observed beside ideal throughput, as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from txl_jax import storage
from txl_jax.errors import UserError

_WIDTH = 0.4
"""Of a bar; two of them stand beside each other at every 1."""


def draw(
    path: Path,
    observed: Sequence[tuple[int, float, float]],
    fork: Sequence[tuple[int, float, float]],
) -> None:
    """Writes a PNG of two charts of bars, what was observed and what would be ideal.

    Args:
      observed: devices, tokens/s and ideal tokens/s of each run.
      fork: hosts, sequences/s and ideal sequences/s as the fork published them.

    Raises UserError where it cannot be written.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    ours, theirs = figure.subplots(1, 2)
    _bars(ours, observed)
    ours.set(title="these runs", xlabel="devices", ylabel="tokens/s")
    _bars(theirs, fork)
    theirs.set(title="the fork, as published", xlabel="p3dn hosts of 8 V100", ylabel="sequences/s")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    try:
        storage.write_bytes(path, picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another --out") from None


def _bars(axes: Axes, points: Sequence[tuple[int, float, float]]) -> None:
    numbers, seen, ideal = zip(*points, strict=True)
    places = range(len(points))
    left, right = ([place + side * _WIDTH / 2 for place in places] for side in (-1, 1))
    bars = axes.bar(left, seen, _WIDTH, label="observed")
    axes.bar(right, ideal, _WIDTH, label="ideal")
    shares = [f"{rate / best:.0%}" for rate, best in zip(seen, ideal, strict=True)]
    axes.bar_label(bars, shares, padding=2, fontsize="small")
    axes.set_xticks(places, [f"{number}" for number in numbers])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left")
