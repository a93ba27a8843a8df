"""Signals sent to a real process."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A test runner started in the background passes on an ignored SIGINT; the child wants Python's own.
# The alarm ends a child that would never end.
CHILD = """
import signal, sys, time
from txl_jax.signals import caught_signals

signal.alarm(30)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with caught_signals() as received:
        print("ready", flush=True)
        for count in range(int(sys.argv[1])):
            while len(received) <= count:
                time.sleep(0.01)
            print("noted", received[count].name, flush=True)
    print("left", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


class Child:
    def __init__(self, awaited: int):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CHILD, str(awaited)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait()


@contextmanager
def child(awaited: int) -> Iterator[Child]:
    """A process that catches signals until it has noted `awaited` of them, and then sleeps."""
    started = Child(awaited)
    try:
        assert started.line() == "ready"
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


SIGNALS = pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_the_first_is_noted_and_a_second_sigterm_ends_the_process(first):
    with child(awaited=2) as process:
        process.send(first)
        assert process.line() == f"noted {first.name}"
        process.send(signal.SIGTERM)
        assert process.end() == -signal.SIGTERM
        assert process.line() == ""


@SIGNALS
def test_a_second_ctrl_c_interrupts(first):
    with child(awaited=2) as process:
        process.send(first)
        assert process.line() == f"noted {first.name}"
        process.send(signal.SIGINT)
        assert process.line() == "interrupted"
        assert process.end() == 0


@pytest.mark.parametrize("awaited", [0, 1])
def test_afterwards_signals_act_as_before(awaited):
    for last in (signal.SIGINT, signal.SIGTERM):
        with child(awaited) as process:
            if awaited:
                process.send(signal.SIGTERM)
                assert process.line() == "noted SIGTERM"
            assert process.line() == "left"
            process.send(last)
            if last == signal.SIGINT:
                assert process.line() == "interrupted"
                assert process.end() == 0
            else:
                assert process.end() == -signal.SIGTERM
