"""The model of scaling beside what was published: `python -m txl_jax.scaling check`.

Each series is predicted from its first point, twice. As it is, the model knows nothing of the rest,
and hides no communication. Fitted, one number for a group of series says how much longer a step is
for every second of communication that the model reckons with: below 1, computing hides the rest;
above 1, the software makes less of the links than all-reduces alone do, as do the few NVLinks
between two of the V100s of a DGX-1. It is fitted to all points but the first and the last of each
series, so that the last tells what a fit is worth on more devices than it has seen.

The fork's authors saw the bytes that their NCCL sent grow fourfold with the number of hosts, which
no all-reduce needs ("Scaling Transformer-XL to 128 GPUs"). That is not in the model: its steps on 8
and 16 hosts are longer than predicted.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from txl_jax.published import SERIES, Point, Series
from txl_jax.scaling_arguments import CheckArguments
from txl_jax.scaling_model import all_reduce
from txl_jax.tables import aligned


@dataclass(frozen=True)
class Check:
    """A point beside what the model says."""

    group: str
    series: str
    point: Point
    predicted: float
    """ms, with nothing fitted."""
    fitted: float
    """ms."""
    exposed: float
    """What was fitted to the group."""
    left_out: bool
    """From the fit."""

    @property
    def error(self) -> float:
        """Of what was predicted with nothing fitted, as a fraction of what was measured."""
        return self.predicted / self.point.ms - 1

    @property
    def fitted_error(self) -> float:
        """As `error`, with what was fitted."""
        return self.fitted / self.point.ms - 1


def run(args: CheckArguments) -> None:
    """Prints the checks."""
    found = checks()
    if args.json:
        for one in numbers(found):
            print(json.dumps(one))
    else:
        print(show(found))


def checks() -> list[Check]:
    """All published points but those that predictions begin with."""
    found = []
    for group, members in groupby(SERIES, lambda series: series.group):
        series = list(members)
        exposed = _fit(series)
        for one in series:
            base, last = one.points[0].ms, one.points[-1]
            found += [
                Check(
                    group,
                    one.name,
                    point,
                    base + _communication(one, point),
                    base + exposed * _communication(one, point),
                    exposed,
                    point == last,
                )
                for point in one.points[1:]
            ]
    return found


def largest_error(left_out: bool) -> float:
    """The largest fraction by which the model is off: with nothing fitted, at any point; or, if
    `left_out`, with what was fitted, at points that were left out of the fit."""
    if left_out:
        return max(abs(one.fitted_error) for one in checks() if one.left_out)
    return max(abs(one.error) for one in checks())


def show(found: list[Check]) -> str:
    """The checks as a table."""
    rows = [("", "GPUs", "ms", "predicted", "error", "fitted", "error", "")]
    for one in found:
        point = one.point
        rows.append(
            (
                f"{one.group}: {one.series}",
                f"{point.hosts} x {point.devices}",
                f"{point.ms:.1f}",
                f"{one.predicted:.1f}",
                f"{one.error:+.1%}",
                f"{one.fitted:.1f}",
                f"{one.fitted_error:+.1%}",
                "left out of the fit" if one.left_out else "",
            )
        )
    exposed = {one.group: one.exposed for one in found}
    notes = [f"{group}: {factor:.2f}" for group, factor in exposed.items()]
    return "\n".join(
        [
            aligned(rows),
            "",
            "GPUs: hosts x GPUs of each. Predicted: nothing fitted, no communication hidden.",
            "Fitted: for each second of communication a step is so many seconds longer",
            *(f"  {note}" for note in notes),
            f"Largest error with nothing fitted: {largest_error(False):.1%}; fitted, of the points",
            f"that were left out: {largest_error(True):.1%}",
        ]
    )


def numbers(found: list[Check]) -> list[dict[str, Any]]:
    """The checks, ready for JSON: times in ms, errors as fractions."""
    return [
        {
            "group": one.group,
            "series": one.series,
            "hosts": one.point.hosts,
            "devices": one.point.hosts * one.point.devices,
            "ms_per_step": one.point.ms,
            "predicted": one.predicted,
            "error": one.error,
            "fitted": one.fitted,
            "fitted_error": one.fitted_error,
            "exposed": one.exposed,
            "left_out": one.left_out,
        }
        for one in found
    ]


def _fit(series: list[Series]) -> float:
    """The factor with the least sum of squared relative errors."""
    above = below = 0.0
    for one in series:
        base = one.points[0].ms
        for point in one.points[1:-1]:
            communication, longer = _communication(one, point) / point.ms, 1 - base / point.ms
            above += communication * longer
            below += communication**2
    return above / below


def _communication(series: Series, point: Point) -> float:
    """How much longer than at the first point of the series it takes, in ms."""
    first = series.points[0]
    here, there = (
        all_reduce(series.size, hosts, devices, series.over, series.pieces)
        for hosts, devices, _ in (point, first)
    )
    return 1e3 * (here - there)
