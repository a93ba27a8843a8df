"""The command line: commands, launches, and what is neither."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import __main__, commands
from tests import tiny
from txl_jax.errors import UserError

NAMES = sorted(path.stem for path in Path(commands.__file__).parent.glob("[!_]*.py"))


def test_without_words_it_says_what_can_be_typed(capsys):
    for words in ([], ["help"]):
        assert __main__.main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + len(NAMES)
        for name, line in zip(NAMES, lines[2:], strict=True):
            about = line.removeprefix(f"python -m launcher {name}").strip()
            assert about.endswith("."), line
            assert len(line) < 140


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main([name, "--help"])
    assert not ended.value.code
    assert f"usage: python -m launcher {name} " in capsys.readouterr().out


def test_what_is_no_command_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no command 'lss' \(did you mean ls\?\); see python -m"):
        __main__.main(["lss"])
    with pytest.raises(UserError, match="no command '__init__'"):
        __main__.main(["__init__"])
    with pytest.raises(UserError, match="unknown option --al"):
        __main__.main(["ls", "--al"])


def test_anything_else_is_a_launch(capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--config=eight_machines", "--help"])
    assert not ended.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "WikiText-103 on eight machines" in text and "--max-hours" in text
    with pytest.raises(UserError, match="batch is 0"):
        __main__.main(["--config=quickstart", "--batch=0"])


def test_an_error_is_one_line_and_status_2():
    words = [sys.executable, "-m", "launcher", "--config=quickstart", "--batch=0"]
    done = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True)
    assert tiny.one_line(done.returncode, done.stderr).startswith("batch is 0")
    assert done.stdout == ""


INTERRUPTED = """
import time
from launcher import __main__

class Object:
    def __del__(self):
        {raised}

def main(words):
    Object()
    time.sleep(60)

__main__.main = main
__main__._run()
"""


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "SystemError"])
def test_ctrl_c_is_not_lost_in_what_python_runs_on_its_own(raised):
    code = INTERRUPTED.format(raised=f"raise {raised}")
    if raised != "KeyboardInterrupt":
        code = code.replace("time.sleep(60)", "raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    assert ("Traceback" in done.stderr) == (raised != "KeyboardInterrupt"), (
        "of what else went wrong"
    )


def test_ctrl_c_within_a_lock_is_ctrl_c(monkeypatch):
    def broken(words: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(__main__, "main", broken)
    with pytest.raises(KeyboardInterrupt):
        __main__._interruptible([])
