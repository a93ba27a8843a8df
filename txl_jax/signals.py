"""Ctrl-C and SIGTERM as something to look at between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def caught_signals() -> Iterator[list[signal.Signals]]:
    """A list that receives SIGINT and SIGTERM; the second one acts as if it were not caught."""
    received: list[signal.Signals] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        restore()

    for number in handlers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
