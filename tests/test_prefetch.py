"""Batches made ahead: their order, what goes wrong in the thread, and how it ends."""

import threading
import time

import pytest

from txl_jax.config import Config
from txl_jax.pace import Pace
from txl_jax.prefetch import Prefetch
from txl_jax.sharding import make_mesh

LONG = 30.0
"""Seconds after which a test that waits fails."""


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [2, 3, 8, 100])
def test_items_come_in_their_order_and_all_of_them(ahead):
    with Prefetch(lambda n: n * n, range(5, 40), ahead) as items:
        assert [items.take() for _ in range(35)] == [n * n for n in range(5, 40)]
    assert threads() == []


def test_items_are_made_before_they_are_taken_but_not_all():
    made, enough = [], threading.Event()

    def make(n: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        made.append(n)
        if len(made) == 4:
            enough.set()
        return n

    with Prefetch(make, range(100), ahead=4) as items:
        assert enough.wait(LONG)
        assert made == [0, 1, 2, 3]
        assert [items.take() for _ in range(50)] == list(range(50))
    assert len(made) <= 54


def test_who_takes_an_item_waits_for_no_other():
    taken = threading.Event()

    def make(n: int) -> int:
        assert n == 0 or taken.wait(LONG)
        return n

    with Prefetch(make, range(3)) as items:
        assert items.take() == 0
        taken.set()
        assert [items.take(), items.take()] == [1, 2]


def test_an_error_is_raised_where_the_item_would_be_taken():
    def make(n: int) -> int:
        if n == 2:
            raise OSError("the disk is gone")
        return n

    with pytest.raises(OSError, match="the disk is gone"), Prefetch(make, range(9)) as items:
        assert [items.take(), items.take()] == [0, 1]
        items.take()
    assert threads() == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError, None])
def test_the_thread_ends_however_the_block_does(kind):
    made = []
    try:
        with Prefetch(made.append, range(1_000_000)) as items:
            items.take()
            if kind:
                raise kind
    except (KeyboardInterrupt, ZeroDivisionError):
        pass
    assert threads() == []
    assert len(made) < 100


def test_time_for_input_is_the_waiting_only():
    cfg, mesh, begun = Config(), make_mesh(), threading.Event()

    def make(n: int) -> int:
        if n == 5:
            assert begun.wait(LONG)
            time.sleep(0.5)  # all of it after the waiting has begun
        return n

    class Begun(Prefetch[int]):
        def take(self) -> int:
            if len(taken) == 5:
                begun.set()
            return super().take()

    taken: list[int] = []
    pace = Pace(cfg, mesh)
    with Begun(make, range(6)) as items:
        for _ in range(6):
            with pace.input():
                taken.append(items.take())
            pace.step()
    speed = pace.lap()
    assert 0.5 / 6 <= speed.input_seconds <= speed.step_seconds
