"""What a launch shows of its steps, on a terminal and elsewhere."""

import io
import itertools
import re

import pytest
from rich.console import Console

from launcher.progress import Progress

WARNING = "warning: " + "a-long-line " * 20 + "ends"


def shown(terminal: bool, hosts: int = 2, failing: bool = False) -> str:
    """What three steps show; the second takes host I of the hosts I + 1 seconds."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
    seconds = [0.0] * hosts
    try:
        with Progress(console) as progress:
            progress.begin("account")
            progress.watch([f"a-{index}" for index in range(hosts)], lambda: list(seconds))
            progress.begin("source", 300)
            seconds[:] = [index + 1.0 for index in range(hosts)]
            progress.say(WARNING)
            if failing:
                raise KeyboardInterrupt
            progress.begin("trainer")
    except KeyboardInterrupt:
        pass
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_elsewhere_each_step_is_a_line_when_it_has_ended():
    warning, *lines = sorted(shown(terminal=False).splitlines(), key=lambda line: line[0] != "w")
    assert warning == WARNING
    assert re.fullmatch(r"account: \d+\.\d s", lines[0])
    assert re.fullmatch(r"source: \d+\.\d s \(by host: 1, 2 s\)", lines[1])
    assert re.fullmatch(r"trainer: \d+\.\d s \(by host: 0, 0 s\)", lines[2])


def last_table(text: str) -> list[list[str]]:
    """The words of each row of the table as it stands in the end."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    heads = [number for number, words in enumerate(lines) if words[:2] == ["step", "time"]]
    return lines[heads[-1] :]


def test_a_terminal_shows_a_table_with_a_column_for_each_host():
    head, account, source, trainer = last_table(shown(terminal=True))
    assert head == ["step", "time", "at", "most", "0", "1"]
    assert account[0] == "account" and len(account) == 3
    assert source[0] == "source" and source[3:] == ["300", "s", "1", "2"]
    assert trainer[0] == "trainer" and trainer[3:] == ["0", "0"]


def test_of_many_hosts_the_slowest_is_named():
    head, _, source, _ = last_table(shown(terminal=True, hosts=20))
    assert head[-2:] == ["slowest", "host"]
    assert source[3:] == ["300", "s", "a-19", "20", "s"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_that_fails_is_shown(terminal):
    text = shown(terminal, failing=True)
    if terminal:
        assert [row[0] for row in last_table(text)] == ["step", "account", "source"]
    else:
        assert re.search(r"^source: failed after \d", text, re.MULTILINE)
    names = itertools.chain.from_iterable(line.split()[:1] for line in text.splitlines())
    assert "trainer" not in names
