"""The axis of time: work at its full length, pauses at a twentieth of it at most."""

import pytest

from txl_jax.timeline import Timeline


def test_a_run_without_pauses_is_shown_as_it_was():
    found = Timeline.of([1000.0], [1060.0, 1600.0])
    assert (found.unit, found.at_work, found.shortened) == ("minutes", 600.0, False)
    assert found.at([1000.0, 1300.0, 1600.0]) == pytest.approx([0, 5, 10])
    assert found.at([0.0, 9999.0]) == pytest.approx([0, 10])


def test_a_long_pause_is_cut_short_and_a_short_one_is_not():
    starts, logged = [0.0, 5100.0, 900_000.0], [5000.0, 10_100.0, 910_000.0]
    found = Timeline.of(starts, logged)
    assert (found.unit, found.at_work, found.shortened) == ("hours", 20_000.0, True)
    hours = [place * 3600 for place in found.at([5000.0, 5100.0, 10_100.0, 900_000.0, 910_000.0])]
    assert hours == pytest.approx([5000, 5100, 10_100, 11_100, 21_100])


@pytest.mark.parametrize(
    ("seconds", "unit"), [(100, "seconds"), (7000, "minutes"), (86_400, "hours"), (400_000, "days")]
)
def test_the_unit_suits_the_length(seconds, unit):
    assert Timeline.of([5.0], [5.0 + seconds]).unit == unit


def test_there_may_be_no_starts_or_no_lines():
    assert Timeline.of([], []).at([5.0]) == [0.0]
    assert Timeline.of([7.0, 9.0], []).at_work == 0
    found = Timeline.of([], [100.0, 160.0])
    assert (found.at_work, found.at([130.0])) == (60.0, pytest.approx([30]))
    # A clock that was set back: what was logged before the first start belongs to it.
    assert Timeline.of([50.0], [20.0, 60.0]).at_work == 40.0
