"""What stops a host: the rules by exact times, and the keeper with a `shutdown` that records."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher.on_host import keeper
from launcher.on_host.keeper import StopRules, deadline
from tests.launcher.refused import refuse

ROOT = Path(__file__).resolve().parents[2]
MINUTE, HOUR = 60.0, 3600.0
BOOT = 1_700_000_000.0


class Folder:
    """`~/txl` of a host that started at BOOT; times are minutes after that."""

    def __init__(self, path: Path):
        self.path = path
        (path / keeper.HEARTBEATS).mkdir()
        self.file("booted", 0)

    def file(self, name: str, minute: float, text: str = "") -> None:
        path = self.path / name
        path.write_text(text)
        when = BOOT + minute * MINUTE
        os.utime(path, (when, when))

    def stops(self, **rules: float) -> tuple[float, str]:
        """Minutes after the start, and why."""
        due = deadline(StopRules(**rules), self.path)
        return (due.time - BOOT) / MINUTE, due.why


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_set_up_that_never_finishes(folder):
    assert folder.stops() == (30, "its set-up did not finish")
    assert folder.stops(setup_minutes=5)[0] == 5


def test_a_trainer_that_makes_no_first_step(folder):
    folder.file("pid", 20)
    assert folder.stops() == (80, "training makes no steps")


def test_steps_postpone_it_and_the_latest_counts(folder):
    folder.file("pid", 20)
    folder.file("heartbeats/0.json", 100)
    folder.file("heartbeats/1.json", 90)
    assert folder.stops() == (160, "training makes no steps")


@pytest.mark.parametrize("status, minutes", [("0\n", 10), ("1\n", 60), ("75", 60), ("", 60)])
def test_the_end_of_the_trainer(folder, status, minutes):
    folder.file("pid", 20)
    folder.file("heartbeats/0.json", 195)
    folder.file("status", 200, status)
    assert folder.stops()[0] == 200 + minutes
    assert folder.stops(after_success=1, after_error=2)[0] == 200 + (1 if minutes == 10 else 2)


def test_a_trainer_that_was_started_again(folder):
    folder.file("status", 50, "1")
    folder.file("pid", 60)
    assert folder.stops()[0] == 120


def test_nothing_postpones_it_beyond_the_longest_time(folder):
    folder.file("pid", 20)
    folder.file("heartbeats/0.json", 24 * 60 - 1)
    assert folder.stops() == (24 * 60, "24 hours are over")
    folder.file("status", 24 * 60 - 1, "1")
    assert folder.stops()[0] == 24 * 60
    assert folder.stops(max_hours=1.5) == (90, "1.5 hours are over")
    assert folder.stops(max_hours=0.25)[0] == 15


def test_a_host_that_is_kept_stops_after_the_longest_time(folder):
    folder.file("keep", 1)
    folder.file("pid", 2)
    folder.file("status", 3, "0")
    assert folder.stops() == (24 * 60, "24 hours are over")


def test_a_host_that_was_kept_before_it_was_started_again_is_once_a_trainer_is_at_work(folder):
    folder.file("keep", -500)
    folder.file("pid", -499)
    assert folder.stops() == (30, "its set-up did not finish")
    folder.file("pid", 5)
    assert folder.stops() == (24 * 60, "24 hours are over")


def test_what_happened_before_the_host_was_started_again_does_not_count(folder):
    for name in ("pid", "status", "heartbeats/0.json"):
        folder.file(name, -500, "0")
    assert folder.stops() == (30, "its set-up did not finish")


def test_a_set_up_long_after_the_start(folder):
    """A launch that is typed again, or `sync`: the trainer is not there in between."""
    folder.file("set-up", 300, str(int(BOOT + 290 * MINUTE)))
    assert folder.stops() == (330, "its set-up did not finish")
    folder.file("pid", 310)
    folder.file("status", 300, "0")
    assert folder.stops() == (370, "training makes no steps")


def test_each_phase_of_a_set_up_postpones_it_but_not_for_ever(folder):
    folder.file("set-up", 25)
    assert folder.stops() == (55, "its set-up did not finish")
    folder.file("set-up", 170)
    assert folder.stops()[0] == 180
    assert folder.stops(setup_hours=1)[0] == 60
    folder.file("set-up", 500, str(int(BOOT + 490 * MINUTE)))
    assert folder.stops()[0] == 530
    folder.file("set-up", 660, str(int(BOOT + 490 * MINUTE)))
    assert folder.stops()[0] == 670


def test_a_set_up_takes_no_time_from_a_trainer(folder):
    """Another host of its run is set up, or a person looks why it ended."""
    folder.file("pid", 20)
    folder.file("heartbeats/0.json", 295)
    folder.file("set-up", 300)
    assert folder.stops() == (355, "training makes no steps")
    folder.file("status", 299, "1")
    assert folder.stops() == (359, "training has ended with an error")
    folder.file("status", 299, "0")
    folder.file("set-up", 300, str(int(BOOT + 290 * MINUTE)))
    assert folder.stops() == (330, "its set-up did not finish")


class Keeper:
    """A keeper at work, and what it told `shutdown`."""

    def __init__(self, home: Path):
        self.folder = home / "txl"
        (self.folder / keeper.HEARTBEATS).mkdir(parents=True)
        (self.folder / "booted").touch()
        self.calls = home / "calls"
        self.fails = home / "fails"
        self.run = home / "run"
        self.run.mkdir()
        tools = home / "tools"
        tools.mkdir()
        refuse(tools)
        stand_in = tools / "shutdown"
        # One write for each call. A file `fails` makes it fail.
        stand_in.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$(date +%s.%N) $*" >>{self.calls}\n! [ -e {self.fails} ]\n'
        )
        stand_in.chmod(0o755)
        self.environ = {"PATH": f"{tools}:/usr/bin:/bin"}
        self.process: subprocess.Popen[bytes] | None = None
        self.trainer = subprocess.Popen(["sleep", "600"])

    def trains(self) -> None:
        """A trainer has started."""
        (self.folder / "pid").write_text(f"{self.trainer.pid}\n")

    def start(self, **rules: float) -> None:
        words = [sys.executable, "-I", keeper.__file__, json.dumps(asdict(StopRules(**rules)))]
        words += [str(self.folder), str(self.run)]
        self.process = subprocess.Popen(words, env=self.environ)

    def start_with(self, changes: str, **rules: float) -> None:
        """A keeper in which some of its own numbers are others, as Python's statements say."""
        code = (
            "import json, sys; from pathlib import Path; from launcher.on_host import keeper; "
            f"{changes}; "
            "keeper.keep(keeper.StopRules(**json.loads(sys.argv[1])), *map(Path, sys.argv[2:]))"
        )
        words = [sys.executable, "-c", code, json.dumps(rules), str(self.folder), str(self.run)]
        self.process = subprocess.Popen(words, env=self.environ, cwd=ROOT, start_new_session=True)

    def end(self, number: int) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait()

    def called(self) -> list[tuple[float, list[str]]]:
        """When `shutdown` was called, and with what."""
        if not self.calls.exists():
            return []
        lines = [line.split() for line in self.calls.read_text().splitlines()]
        return [(float(when), words) for when, *words in lines]

    def delays(self) -> list[str]:
        return [next(word for word in words if word[0] == "+") for _, words in self.called()]

    def until(self, done: Callable[[], object]) -> None:
        end = time.monotonic() + 300
        while not done():
            assert time.monotonic() < end, self.called()
            time.sleep(0.02)

    def off(self) -> bool:
        return "+0" in self.delays()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Keeper]:
    found = Keeper(tmp_path)
    yield found
    found.end(signal.SIGKILL)
    found.trainer.kill()
    found.trainer.wait()


pytestmark = [pytest.mark.processes, pytest.mark.cloud]


def test_a_shutdown_is_scheduled_at_once_and_stays_when_the_keeper_is_killed(kept):
    kept.start()
    kept.until(kept.called)
    for number in (signal.SIGTERM, signal.SIGKILL):
        kept.end(number)
    calls = [words for _, words in kept.called()]
    assert len(calls) == 1 and calls[0][:2] == ["-h", "+30"]
    assert not any("-c" in words for words in calls), "it took the shutdown back"


def test_a_new_keeper_goes_on_where_a_killed_one_was(kept):
    kept.start(after_success=0.05)
    kept.until(kept.called)
    kept.end(signal.SIGKILL)
    kept.trains()
    (kept.folder / "status").write_text("0")
    kept.start(after_success=0.05)
    kept.until(kept.off)


def test_a_failed_shutdown_is_tried_again(kept):
    kept.fails.touch()
    kept.start()
    kept.until(lambda: len(kept.called()) >= 2)
    kept.fails.unlink()
    count = len(kept.called())
    kept.until(lambda: len(kept.called()) > count)


def test_a_shutdown_that_somebody_took_back_is_scheduled_again(kept):
    kept.start_with("keeper._AGAIN_SECONDS = 0.5")
    kept.until(lambda: len(kept.called()) >= 3)
    assert set(kept.delays()) == {"+30"}


def test_a_set_up_that_begins_on_an_old_host_is_given_its_time(kept):
    five_hours_ago = time.time() - 5 * HOUR
    os.utime(kept.folder / "booted", (five_hours_ago, five_hours_ago))
    (kept.folder / "set-up").write_text(f"{int(time.time())}\n")
    kept.start()
    kept.until(kept.called)
    assert kept.delays() == ["+30"]


def test_a_postponed_shutdown_lets_people_log_in_again(kept):
    """systemd lets nobody in five minutes before a shutdown, and not again when that is put off."""
    kept.fails.touch()
    nologin = kept.run / "nologin"
    nologin.touch()
    kept.start(setup_minutes=3)
    kept.until(kept.called)
    kept.fails.unlink()
    count = len(kept.called())
    kept.until(lambda: len(kept.called()) > count)
    assert nologin.exists()
    kept.trains()
    kept.until(lambda: not nologin.exists())
    assert kept.delays()[-1] == "+60"


def test_a_shutdown_that_hangs_is_tried_again(kept):
    stand_in = Path(kept.environ["PATH"].split(":")[0], "shutdown")
    stand_in.write_text(stand_in.read_text() + "exec sleep 600\n")
    kept.start_with("keeper._SHUTDOWN_SECONDS = 0.5")
    kept.until(lambda: len(kept.called()) >= 2)
    assert kept.process
    os.killpg(kept.process.pid, signal.SIGKILL)


def test_progress_postpones_it(kept):
    idle = 0.05
    kept.start(idle=idle)
    kept.trains()
    beat = kept.folder / keeper.HEARTBEATS / "0.json"
    beats = []
    for _ in range(12):
        beat.write_text("{}")
        beats.append(beat.stat().st_mtime)
        time.sleep(0.5)
    kept.until(kept.off)
    delays = kept.delays()
    off = kept.called()[delays.index("+0")][0]
    last = max(when for when in beats if when <= off)
    assert off >= last + MINUTE * idle
    assert "training makes no steps" in " ".join(kept.called()[delays.index("+0")][1])


def test_it_tells_who_is_logged_in_when_the_reason_changes(kept):
    kept.start(setup_minutes=1 / 60)
    kept.until(kept.off)
    (_, first), *others = kept.called()
    assert "--no-wall" not in first
    assert " ".join(first).endswith("its set-up did not finish; touch ~/txl/keep holds this host")
    assert others and all("--no-wall" in words for _, words in others)


def test_before_the_longest_time_is_over_the_trainer_is_asked_to_save(kept):
    trap = "trap 'echo asked; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    trainer = subprocess.Popen(["sh", "-c", trap], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout and trainer.stdout.readline() == "ready\n"
        (kept.folder / "pid").write_text(f"{trainer.pid}\n")
        kept.start(max_hours=keeper._GRACE_SECONDS / HOUR + 0.001)
        assert trainer.communicate(timeout=300)[0] == "asked\n"
        assert not kept.off()
    finally:
        trainer.kill()


def test_a_trainer_that_has_ended_is_sent_nothing(kept):
    """Its process id may be another's by then."""
    kept.trains()
    (kept.folder / "status").write_text("0")
    kept.start(max_hours=0.001)
    kept.until(kept.off)
    assert kept.trainer.poll() is None
