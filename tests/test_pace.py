"""Laps of steps, by a clock that the test sets."""

import pytest

from txl_jax import pace, sharding
from txl_jax.config import Config
from txl_jax.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


def made() -> Pace:
    return Pace(Config(), sharding.make_mesh())


def test_a_lap_has_the_mean_of_its_steps_without_pauses(clock):
    laps = made()
    for seconds in (1.0, 3.0):
        with laps.input():
            clock.now += 0.5
        clock.now += seconds - 0.5
        laps.step()
    with laps.paused():
        clock.now += 60.0
    speed = laps.lap()
    assert (speed.step_seconds, speed.input_seconds) == (2.0, 0.5)
    assert speed.tokens_per_sec == Config().train.batch * Config().model.tgt_len / 2.0
    clock.now += 5.0
    laps.step()
    assert laps.lap().step_seconds == 5.0


def test_what_came_before_a_restart_does_not_count(clock):
    laps = made()
    clock.now += 30.0
    laps.step()
    laps.restart()
    clock.now += 2.0
    laps.step()
    assert laps.lap().step_seconds == 2.0


def test_but_where_no_step_follows_it_is_all_that_is_known(clock):
    """The first step of a start may be one that is logged."""
    laps = made()
    with laps.input():
        clock.now += 10.0
    clock.now += 20.0
    laps.step()
    laps.restart()
    clock.now += 0.001
    speed = laps.lap()
    assert (speed.step_seconds, speed.input_seconds) == (30.0, 10.0)
