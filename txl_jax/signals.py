"""Ctrl-C and SIGTERM as something to look at between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """What is under way is given up, because of SIGTERM."""


@contextmanager
def given_up(received: list[signal.Signals]) -> Iterator[None]:
    """Where `Stopped` ends the block, nothing is raised, and SIGTERM is noted."""
    try:
        yield
    except Stopped:
        received.append(signal.SIGTERM)


@contextmanager
def caught_signals(several: bool = False) -> Iterator[list[signal.Signals]]:
    """A list that receives SIGINT and SIGTERM; the second one acts as if it were not caught.

    With `several` processes, SIGTERM is JAX's, which lets all of them agree on a step, and the
    first SIGINT becomes SIGTERM; the list stays empty.
    """
    received: list[signal.Signals] = []
    caught = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in caught}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, _: object) -> None:
        restore()
        if several:
            signal.raise_signal(signal.SIGTERM)
        else:
            received.append(signal.Signals(number))

    for number in handlers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
