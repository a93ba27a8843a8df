"""Signals sent to a real process."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A test runner started in the background passes on an ignored SIGINT; the child wants Python's own.
# The alarm ends a child that would never end.
CHILD = """
import signal, time
from txl_jax.signals import caught_signals

signal.alarm(60)
signal.signal(signal.SIGINT, signal.default_int_handler)
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
try:
    with caught_signals() as received:
        print("ready", flush=True)
        while not received:
            time.sleep(0.01)
        print("noted", received[0].name, flush=True)
        if LEAVE:
            received = []
        else:
            while len(received) < 2:
                time.sleep(0.01)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    print("left", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


class Child:
    def __init__(self, leave: bool):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CHILD.replace("LEAVE", str(leave))],
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


@pytest.fixture
def staying() -> Iterator[Child]:
    """A child that stays where signals are caught until it has noted two."""
    yield from until_killed(Child(leave=False))


@pytest.fixture
def leaving() -> Iterator[Child]:
    """A child that leaves that place after the first."""
    yield from until_killed(Child(leave=True))


def until_killed(child: Child) -> Iterator[Child]:
    try:
        assert child.line() == "ready"
        yield child
    finally:
        child.process.kill()
        child.process.communicate()


SIGNALS = pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_the_first_is_noted_and_a_second_sigterm_ends_the_process(staying, first):
    staying.send(first)
    assert staying.line() == f"noted {first.name}"
    staying.send(signal.SIGTERM)
    assert staying.end() == -signal.SIGTERM
    assert staying.line() == ""


@SIGNALS
def test_a_second_ctrl_c_interrupts(staying, first):
    staying.send(first)
    assert staying.line() == f"noted {first.name}"
    staying.send(signal.SIGINT)
    assert staying.line() == "interrupted"
    assert staying.end() == 0


@SIGNALS
def test_afterwards_signals_act_as_before(leaving, first):
    leaving.send(first)
    assert leaving.line() == f"noted {first.name}"
    assert leaving.line() == "left"
    leaving.send(signal.SIGINT)
    assert leaving.line() == "interrupted"
    assert leaving.end() == 0
