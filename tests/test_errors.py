"""How a command ends: its exit status, and what it leaves on standard error."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import signal, sys
from txl_jax.errors import UserError, run_command

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs

def main(words):
    print("begun", *words, flush=True)
    sys.stdin.readline()
    match words[0]:
        case "wrong":
            raise UserError("lr is 0; it has to be above 0")
        case "bug":
            raise ZeroDivisionError
        case "much":
            print("x" * 100_000)
        case "little":
            print("x")  # stays in Python's buffer until the end
        case "status":
            return 143

run_command(main)
"""


def start(*words: str) -> subprocess.Popen[str]:
    """A command that has begun and waits for a line."""
    pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, "-W", "error", "-c", CHILD, *words]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(command, text=True, cwd=root, env=environment, **pipes)
    assert process.stdout and process.stdout.readline() == f"begun {' '.join(words)}\n"
    return process


@pytest.mark.parametrize(
    "word, status, says",
    [
        ("fine", 0, ""),
        ("status", 143, ""),
        ("wrong", 2, "error: lr is 0; it has to be above 0\n"),
    ],
)
def test_the_status_is_what_main_returns_or_2(word, status, says):
    process = start(word)
    assert process.communicate("\n") == ("", says)
    assert process.returncode == status


def test_a_bug_keeps_its_traceback():
    process = start("bug")
    _, errors = process.communicate("\n")
    assert process.returncode == 1
    assert errors.startswith("Traceback") and errors.endswith("ZeroDivisionError\n")


def test_ctrl_c_ends_a_command_without_a_traceback():
    process = start("fine")
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "\n")
    assert process.returncode == 130


@pytest.mark.parametrize("word", ["much", "little"])
def test_a_reader_that_has_gone_is_no_error(word):
    process = start(word)
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()
