"""Stops the host that it runs on: a shutdown is always scheduled, and only progress postpones it.

    python3 keeper.py RULES FOLDER RUN

RULES: `StopRules` in JSON. RUN: /run, where systemd marks that nobody may log in any more. FOLDER:
`~/txl` of the login, where these files tell how things stand:

    booted             made when the host started
    set-up             touched by every phase of a set-up; when that began, in seconds since 1970
    pid                process id of what holds the trainer; made when that starts
    heartbeats/*.json  written by the trainer while it makes steps
    status             exit status of the trainer, written when it has ended
    keep               made by a person: only max_hours stops the host

Standard library only: it travels in the user data and runs before anything is installed. If it is
killed, the shutdown that it scheduled last goes on.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BOOTED, SET_UP, PID, STATUS, KEEP = "booted", "set-up", "pid", "status", "keep"
HEARTBEATS = "heartbeats"
UNIT = "txl-keeper"
"""systemd's name of this program."""
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 60.0
"""The shutdown is scheduled anew after so long, in case somebody took it back."""
_GRACE_SECONDS = 120.0
"""Before max_hours, for the trainer to save; as long as the notice for a spot host."""
_NOLOGIN_MINUTES = 5
"""Before a shutdown, when systemd lets nobody log in any more."""
_SHUTDOWN_SECONDS = 30.0
"""For which `shutdown` may take."""


@dataclass(frozen=True)
class StopRules:
    """When a host stops."""

    max_hours: float = 24.0
    """Hours after its start, whatever it does."""
    setup_minutes: float = 30.0
    """Minutes after its start and each phase of its set-up, unless a trainer has started since."""
    setup_hours: float = 3.0
    """Hours after its start, or the set-up's, in which a set-up has to end."""
    after_success: float = 10.0
    """Minutes after a trainer that ended with status 0."""
    after_error: float = 60.0
    """Minutes after a trainer that ended otherwise: time to look."""
    idle: float = 60.0
    """Minutes after the last step, or the trainer's start."""


class Deadline(NamedTuple):
    """When the host stops if nothing changes."""

    time: float
    """Seconds since 1970."""
    why: str


def deadline(rules: StopRules, folder: Path) -> Deadline:
    """What the files in `folder` say by the rules."""
    booted = _changed(folder / BOOTED)
    last = Deadline(booted + 3600 * rules.max_hours, f"{rules.max_hours:g} hours are over")
    # One that is left from before the host's start holds it only when a trainer is at work again.
    if (folder / KEEP).exists() and max(map(_changed, (folder / KEEP, folder / PID))) >= booted:
        return last
    return min(last, _by_trainer(rules, folder, booted))


def _by_trainer(rules: StopRules, folder: Path, booted: float) -> Deadline:
    began, set_up = _changed(folder / PID), _changed(folder / SET_UP)
    found: list[Deadline] = []
    if began < max(booted, set_up):
        first = max(booted, _number(folder / SET_UP) or 0)
        due = min(max(booted, set_up) + 60 * rules.setup_minutes, first + 3600 * rules.setup_hours)
        found.append(Deadline(due, "its set-up did not finish"))
    if began >= booted:  # not by an earlier start of the host
        found.append(_of_trainer(rules, folder, began))
    return max(found)


def _of_trainer(rules: StopRules, folder: Path, began: float) -> Deadline:
    ended = _changed(folder / STATUS)
    if ended >= began:
        if _number(folder / STATUS) == 0:
            return Deadline(ended + 60 * rules.after_success, "training has ended")
        return Deadline(ended + 60 * rules.after_error, "training has ended with an error")
    beats = map(_changed, (folder / HEARTBEATS).glob("*.json"))
    return Deadline(max(began, *beats, 0.0) + 60 * rules.idle, "training makes no steps")


def keep(rules: StopRules, folder: Path, run: Path) -> None:
    """Looks for ever, and has the host stop when its deadline is there."""
    why, called, told = "", -math.inf, False
    while True:
        due, now = deadline(rules, folder), time.time()
        reached = now >= due.time and called < due.time
        if (reached or due.why != why or abs(now - called) >= _AGAIN_SECONDS) and _schedule(
            due, now, run, loud=due.why != why
        ):
            why, called = due.why, now
        over = _changed(folder / BOOTED) + 3600 * rules.max_hours - _GRACE_SECONDS
        if not told and now >= over:
            told = True
            _end_trainer(folder)
        time.sleep(_LOOK_SECONDS)


def _schedule(due: Deadline, now: float, run: Path, loud: bool) -> bool:
    """Replaces the scheduled shutdown; False if that failed. `loud` tells who is logged in."""
    minutes = max(0, math.ceil((due.time - now) / 60))
    message = f"txl: {due.why}; touch ~/txl/{KEEP} holds this host"
    words = ["shutdown", *([] if loud else ["--no-wall"]), "-h", f"+{minutes}", message]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, timeout=_SHUTDOWN_SECONDS)
        status = done.returncode
    except subprocess.TimeoutExpired:
        status = -1
    if status == 0 and minutes > _NOLOGIN_MINUTES:
        # Left from a shutdown that was near before.
        with contextlib.suppress(OSError):
            (run / "nologin").unlink(missing_ok=True)
    if loud or status:
        print(f"stops in {minutes} minutes: {due.why}; status {status}", flush=True)
    return status == 0


def _end_trainer(folder: Path) -> None:
    """Asks a trainer that still runs to save and end."""
    began, pid = _changed(folder / PID), _number(folder / PID)
    if pid and began >= _changed(folder / BOOTED) and _changed(folder / STATUS) < began:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _changed(path: Path) -> float:
    """When the file was last written, in seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    keep(StopRules(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
