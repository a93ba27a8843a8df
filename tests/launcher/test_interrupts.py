"""Signals that end a command, sent to this process."""

import os
import signal

import pytest

from launcher.interrupts import signals_as_interrupts


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_they_do_as_ctrl_c_does(number):
    with pytest.raises(KeyboardInterrupt), signals_as_interrupts():
        send(number)


def test_a_second_hangup_does_not_cut_short_what_undoes():
    undone = []
    with pytest.raises(KeyboardInterrupt), signals_as_interrupts():
        try:
            send(signal.SIGHUP)
        finally:
            send(signal.SIGHUP)
            undone.append(True)
    assert undone == [True]


def test_afterwards_they_are_what_they_were():
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in signals]
    with signals_as_interrupts():
        assert [signal.getsignal(number) for number in signals] != before
    assert [signal.getsignal(number) for number in signals] == before
    with pytest.raises(KeyboardInterrupt), signals_as_interrupts():
        send(signal.SIGHUP)
    assert [signal.getsignal(number) for number in signals] == before


def test_under_nohup_a_closed_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
