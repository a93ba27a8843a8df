"""What keeps a trainer's output on its host and in S3, with real processes and a real S3 server."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["tests.buckets"]

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
HEADING = r"--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\n"


class Host:
    """A host's home, and the program at work in it."""

    def __init__(self, home: Path):
        self.folder = home / "txl"
        self.folder.mkdir()
        self.home = home
        self.process: subprocess.Popen[str] | None = None

    def start(self, script: str, url: str = "", every: float = 20.0, **environ: str) -> None:
        """Runs a shell script; `every`: seconds between uploads."""
        code = (
            "import sys; from launcher.on_host import output; from txl_jax.errors import "
            f"run_command; output._EVERY_SECONDS = {every}; output._PATIENCE = 3.0; "
            "run_command(output.main)"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "3", url, "sh", "-c", script],
            cwd=ROOT,
            env=os.environ | {"HOME": str(self.home)} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        assert self.process
        output, errors = self.process.communicate(timeout=300)
        return self.process.returncode, output, errors

    def run(self, *words: Any, **options: Any) -> tuple[int, str, str]:
        self.start(*words, **options)
        return self.end()

    def kept(self) -> str:
        return (self.folder / "output.txt").read_text()

    def pid(self) -> int:
        until((self.folder / "pid").exists)
        return int((self.folder / "pid").read_text())


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path)
    yield found
    if found.process and found.process.poll() is None:
        os.kill(found.pid(), signal.SIGKILL)  # the command, which would go on
        found.process.kill()
        found.process.communicate()


@pytest.mark.parametrize("does, status", [("exit 0", 0), ("exit 75", 75), ("kill -9 $$", 137)])
def test_output_is_shown_and_kept_and_the_status_is_the_commands(host, does, status):
    assert host.run(f"echo out; echo err >&2; {does}") == (status, "out\nerr\n", "")
    assert re.fullmatch(HEADING + "out\nerr\n", host.kept())
    assert os.readlink(host.folder / "output.txt") == "output-3.txt"


def test_a_restart_goes_on_in_the_same_file(host):
    host.run("echo one")
    host.run("echo two")
    assert re.fullmatch(HEADING + "one\n" + HEADING + "two\n", host.kept())


def test_the_process_id_is_that_of_the_command(host):
    host.start("echo $$; exec sleep 60")
    pid = host.pid()
    until(lambda: f"{pid}\n" in host.kept())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_command_once_and_it_may_end_in_its_own_way(host, number):
    name = number.name.removeprefix("SIG")
    trap = f"trap 'echo got {name}; sleep 0.3; exit 75' {name}"
    host.start(f"{trap}; echo ready; while :; do sleep 0.05; done")
    until(lambda: (host.folder / "output.txt").exists() and "ready" in host.kept())
    assert host.process
    host.process.send_signal(number)
    status, output, _ = host.end()
    assert (status, output) == (75, f"ready\ngot {name}\n")


def test_the_command_does_not_ignore_what_a_background_job_ignores(host):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        host.start("trap 'exit 75' INT; echo ready; while :; do sleep 0.05; done")
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: (host.folder / "output.txt").exists() and "ready" in host.kept())
    assert host.process
    host.process.send_signal(signal.SIGINT)
    assert host.end()[0] == 75


def test_it_is_uploaded_while_it_grows_and_at_the_end(host, s3):
    host.start("echo one; read line </dev/null; sleep 2; echo two", url=s3.url, every=0.1)
    until(lambda: b"one\n" in s3.contents().get("output-3.txt", b""))
    assert b"two" not in s3.contents()["output-3.txt"]
    assert host.end()[0] == 0
    assert s3.contents()["output-3.txt"].decode() == host.kept()
    assert host.kept().endswith("one\ntwo\n")


def test_what_does_not_change_is_not_uploaded_again(host, s3):
    host.start("echo one; sleep 2", url=s3.url, every=0.05)
    host.end()
    sent = [one for one in s3.proxy.requests if one.startswith("PUT")]
    assert 1 <= len(sent) <= 3


def test_a_new_host_goes_on_from_what_the_old_one_printed(host, s3, tmp_path):
    host.run("echo one", url=s3.url)
    (host.folder / "output-3.txt").unlink()
    host.run("echo two", url=s3.url)
    text = s3.contents()["output-3.txt"].decode()
    assert re.fullmatch(HEADING + "one\n" + HEADING + "two\n", text)


def test_without_s3_the_command_runs_all_the_same_and_its_output_stays_here(host, s3):
    status, output, errors = host.run("echo one", url=s3.url, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert (status, output) == (0, "one\n")
    assert re.fullmatch(HEADING + "one\n", host.kept())
    assert errors == "S3 did not take output-3.txt: it is only on this host\n"


def test_s3_that_is_away_for_a_while_gets_all_of_it(host, s3):
    s3.proxy.mode = "503"
    host.start("echo one; sleep 1; echo two", url=s3.url, every=0.1)
    until(lambda: s3.proxy.requests)
    s3.proxy.mode = "ok"
    assert host.end()[0] == 0
    assert s3.contents()["output-3.txt"].decode() == host.kept()


def test_a_url_that_cannot_be(host):
    status, _, errors = host.run("echo one", url="ftp://x/y")
    assert status == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1
