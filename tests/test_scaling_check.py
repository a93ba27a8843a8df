"""The table of errors: published figures as they were published, and fits that do not see all."""

import dataclasses
import json

import numpy as np
import pytest

from txl_jax import scaling, scaling_check
from txl_jax.errors import UserError
from txl_jax.published import FORK_SEQUENCES, SERIES
from txl_jax.scaling_check import checks, largest_error


def series(name: str, group: str = ""):
    (found,) = [one for one in SERIES if one.name == name and one.group.startswith(group)]
    return found


@pytest.mark.parametrize(
    "name, group, scaling",
    [
        ("DGX A100, base", "", (1, 1.889, 3.763, 7.503)),
        ("DGX A100, large", "", (1, 1.936, 3.827, 7.620)),
        ("DGX-1, base", "", (1, 1.796, 3.648, 7.049)),
        ("DGX-1, large", "", (1, 1.761, 3.559, 6.535)),
        ("DGX-2H, base", "", (1, 1.796, 3.467, 6.811, 12.623)),
        ("DGX-2H, large", "NVIDIA, within", (1, 1.874, 3.666, 7.241, 14.296)),
        ("DGX-2H, large", "NVIDIA, between", (1, 1.98, 3.91, 7.68)),
    ],
)
def test_steps_are_those_of_nvidias_columns_of_weak_scaling(name, group, scaling):
    points = series(name, group).points
    first = points[0].hosts * points[0].devices / points[0].ms
    found = [point.hosts * point.devices / point.ms / first for point in points]
    np.testing.assert_allclose(found, scaling, rtol=3e-3)  # the README rounds


def test_the_forks_steps_are_those_of_its_sequences():
    """768 sequences on each host, for which its README counts as on 96 a GPU."""
    for point in series("p3dn, LARGE").points:
        assert 1e3 * 768 * point.hosts / point.ms == pytest.approx(
            FORK_SEQUENCES[point.hosts], rel=2e-3
        )


def test_the_forks_errors_by_hand():
    """554 MB over 6.25 GB/s, 22 buckets of 25 MiB, 17 µs a turn."""
    found = [one for one in checks() if one.series == "p3dn, LARGE"]
    longer = {}
    for hosts in (2, 4, 8, 16):
        turns = 2 * (hosts - 1)
        longer[hosts] = 1e3 * turns * (554e6 / hosts / 6.25e9 + 22 * 17e-6)
    for one in found:
        assert one.predicted == pytest.approx(1720 + longer[one.point.hosts])
        assert one.error == pytest.approx(one.predicted / one.point.ms - 1)
    seen = [(longer[hosts] / ms, 1 - 1720 / ms) for hosts, ms in ((2, 1785), (4, 1769), (8, 2028))]
    (factor,), *_ = np.linalg.lstsq([[x] for x, _ in seen], [y for _, y in seen], rcond=None)
    assert found[-1].fitted == pytest.approx(1720 + factor * longer[16])
    assert [one.left_out for one in found] == [False, False, False, True]


def test_the_last_point_has_no_say_in_the_fit(monkeypatch):
    def fitted(place: int) -> float:
        one = series("p3dn, LARGE")
        points = list(one.points)
        points[place] = points[place]._replace(ms=2 * points[place].ms)
        changed = dataclasses.replace(one, points=tuple(points))
        monkeypatch.setattr(scaling_check, "SERIES", (changed,))
        return checks()[0].exposed

    as_it_is = next(one.exposed for one in checks() if one.series == "p3dn, LARGE")
    assert fitted(-1) == as_it_is
    assert fitted(-2) != as_it_is


def test_the_errors_that_are_promised():
    found = checks()
    assert {one.group for one in found if one.left_out} == {one.group for one in SERIES}
    assert largest_error(left_out=False) == max(abs(one.error) for one in found) < 0.15
    assert largest_error(left_out=True) < 0.09
    ours = [one.error for one in found if one.group.startswith("this project")]
    assert max(map(abs, ours)) < 0.025


def test_what_is_printed(capsys):
    scaling.main(["check"])
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1].split()[-7:]
        == ["2", "x", "8", "1785.0", "1809.4", "+1.4%", "1817.6", "+1.8%"][-7:]
    )
    assert sum(line.endswith("left out of the fit") for line in lines) == len(SERIES)
    scaling.main(["check", "--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == len(checks())
    assert told[3]["devices"] == 128 and told[3]["left_out"]
    assert told[3]["fitted_error"] == pytest.approx(told[3]["fitted"] / 2082 - 1)


def test_a_wrong_option_is_named():
    with pytest.raises(UserError, match="did you mean --json"):
        scaling.main(["check", "--jsn"])
