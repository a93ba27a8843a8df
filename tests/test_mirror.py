import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from txl_jax import mirror as mirror_module
from txl_jax.errors import UserError
from txl_jax.logs import EVENTS, METRICS, SAMPLES, Logs
from txl_jax.mirror import Job, Mirror, pull
from txl_jax.signals import caught_signals
from txl_jax.store import Folder, Store, StoreAway, StoreRefused, open_store

pytest_plugins = ["tests.buckets"]

pytestmark = pytest.mark.processes

LOSS = "learning/loss"
OFTEN = 0.05
NEVER = 1e6


@pytest.fixture
def spool(tmp_path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def writes(store: Store, name: str, content: bytes = b"1") -> Job:
    return lambda cancelled: store.write(name, content)


def assert_no_threads() -> None:
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("mirror-", "ThreadPool"))]


def test_logs_follow_their_files(s3, spool):
    with Mirror(open_store(s3.url), spool, OFTEN) as mirror:
        mirror.watch("log", "a.*")
        (spool / "log").write_bytes(b"1")
        (spool / "a.1").write_bytes(b"2")
        (spool / "a.2.tmp").write_bytes(b"a draft")
        (spool / "other").write_bytes(b"not watched")
        eventually(lambda: s3.contents() == {"log": b"1", "a.1": b"2"})
        append(spool / "log", b"11")
        (spool / "a.1").unlink()
        (spool / "a.3").write_bytes(b"3")
        eventually(lambda: s3.contents() == {"log": b"111", "a.1": b"2", "a.3": b"3"})
        assert len(s3.proxy.requests) == 4  # what has not changed is not uploaded again
        assert mirror.pending() == []
        (spool / "log").write_bytes(b"last")
        assert mirror.close(60) == []
    assert s3.contents()["log"] == b"last"
    assert_no_threads()


def test_a_growing_file(s3, spool):
    """What is uploaded while a file grows is a beginning of it."""
    line = b"x" * 99 + b"\n"
    with Mirror(open_store(s3.url), spool, 0.001) as mirror, (spool / "log").open("ab") as log:
        mirror.watch("log")
        for _ in range(2000):
            log.write(line)
            log.flush()
        seen = s3.contents().get("log", b"")
        assert seen == line * (len(seen) // 100)
        assert mirror.close(60) == []
    assert s3.contents()["log"] == line * 2000


@pytest.mark.parametrize(
    "mode",
    ["refuse", pytest.param("hang", marks=pytest.mark.slow), "cut", "slow-down", "error", "denied"],
)
def test_an_outage(s3, spool, mode, capsys):
    """Work goes on during it, all arrives after it, and it is said twice."""
    begins, ends = ("refuses", "takes files again") if mode == "denied" else ("is away", "is back")
    store = open_store(s3.url)
    superseded: list[bool] = []

    def first(cancelled: Callable[[], bool]) -> None:
        superseded.append(cancelled())
        store.write("first", b"1")

    with Mirror(store, spool, OFTEN) as mirror:
        mirror.watch("log")
        s3.proxy.mode = mode
        (spool / "log").write_bytes(b"1")
        mirror.submit("latest", "step 1", first)
        eventually(lambda: f"S3 {begins} (s3://{s3.bucket}/some/run/" in capsys.readouterr().err)
        mirror.submit("latest", "step 2", writes(store, "second"))
        mirror.submit("best", "best step 1", writes(store, "best"))
        append(spool / "log", b"2")
        assert mirror.pending() == ["step 2", "best step 1", "log"]
        s3.proxy.mode = "ok"
        eventually(lambda: not mirror.pending())
        assert s3.contents() == {"log": b"12", "second": b"1", "best": b"1"}
        assert superseded == []  # the logs before it could not be uploaded
        eventually(lambda: f"S3 {ends} after " in capsys.readouterr().err)
        assert mirror.close(0) == []
    assert_no_threads()


def test_an_outage_is_said_once(s3, spool, capsys):
    store = open_store(s3.url)
    failures: list[OSError] = []

    def job(cancelled: Callable[[], bool]) -> None:
        try:
            store.write("a", b"1")
        except OSError as error:
            failures.append(error)
            raise

    with Mirror(store, spool, OFTEN) as mirror:
        mirror.watch("log")
        s3.proxy.mode = "refuse"
        mirror.submit("latest", "step 1", job)
        eventually(lambda: len(failures) >= 3)
        (spool / "log").write_bytes(b"1")
        s3.proxy.mode = "ok"
        assert mirror.close(60) == []
    away, back = capsys.readouterr().err.splitlines()
    assert away.startswith(f"S3 is away (s3://{s3.bucket}/some/run/a: ")
    assert away.endswith(f"): training goes on, files wait in {spool}")
    assert back.startswith("S3 is back after ")


def test_each_kind_of_failure_is_said_once(spool, tmp_path, capsys):
    errors = [StoreAway("1"), StoreRefused("2"), StoreAway("3"), StoreRefused("4")]

    def job(cancelled: Callable[[], bool]) -> None:
        if errors:
            raise errors.pop(0)

    def lines() -> list[str]:
        return re.sub(r"\d+ s", "N s", capsys.readouterr().err).splitlines()

    where = f"training goes on, files wait in {spool}"
    with Mirror(Folder(tmp_path / "store"), spool, OFTEN) as mirror:
        mirror.submit("latest", "step 1", job)
        assert mirror.close(60) == []
    assert lines() == [
        f"S3 is away (1): {where}",
        f"S3 refuses (2): {where}",
        "S3 takes files again after N s",
    ]
    errors.append(PermissionError("a file of this machine"))
    with Mirror(Folder(tmp_path / "store"), spool, OFTEN) as mirror:
        mirror.submit("latest", "step 2", job)
        assert mirror.close(60) == []
    assert lines() == [
        f"cannot upload (a file of this machine): {where}",
        "uploads go on after N s",
    ]


def test_nothing_waits_for_the_store(spool, tmp_path):
    gate, inside = threading.Event(), threading.Event()

    class Slow(Folder):
        def upload(self, name: str, path: Path) -> None:
            inside.set()
            assert gate.wait(100)
            super().upload(name, path)

    store = Slow(tmp_path / "store")
    (spool / "log").write_bytes(b"1")
    with Mirror(store, spool, OFTEN) as mirror:
        mirror.watch("log")
        assert inside.wait(100)
        for step in range(5):
            mirror.watch(f"log.{step}")
            mirror.submit("latest", f"step {step}", writes(store, "a"))
        assert mirror.pending() == ["step 4", "log"]
        gate.set()
        assert mirror.close(60) == []


def test_what_is_under_way_in_the_end_is_stopped(spool, tmp_path):
    stopped, inside = threading.Event(), threading.Event()

    class Endless(Folder):
        def upload(self, name: str, path: Path) -> None:
            inside.set()
            assert stopped.wait(100)
            raise OSError("stopped")

        def stop(self) -> None:
            stopped.set()

    (spool / "log").write_bytes(b"1")
    with Mirror(Endless(tmp_path / "store"), spool) as mirror:
        mirror.watch("log")
        assert inside.wait(100)
        assert mirror.close(0) == ["log"]
        assert_no_threads()


def test_an_unfinished_job_is_superseded(spool, tmp_path):
    store = Folder(tmp_path / "store")
    begun, ended = threading.Event(), threading.Event()

    def waits_for_a_lost_host(cancelled: Callable[[], bool]) -> None:
        begun.set()
        while not cancelled():
            time.sleep(0.01)
        ended.set()

    with Mirror(store, spool) as mirror:
        mirror.submit("latest", "step 1", waits_for_a_lost_host)
        assert begun.wait(100)
        mirror.submit("latest", "step 2", writes(store, "second"))
        assert mirror.close(60) == []
    assert ended.is_set()
    assert store.names() == ["second"]


def test_a_job_that_was_superseded_before_it_began_never_begins(spool, tmp_path):
    gate, inside = threading.Event(), threading.Event()
    begun: list[int] = []

    class Slow(Folder):
        def upload(self, name: str, path: Path) -> None:
            if name == "log.2":
                inside.set()
                assert gate.wait(100)
            super().upload(name, path)

    store = Slow(tmp_path / "store")
    (spool / "log.1").write_bytes(b"1")
    with Mirror(store, spool, NEVER) as mirror:
        mirror.watch("log.*")
        eventually(lambda: not mirror.pending())
        (spool / "log.2").write_bytes(b"2")
        mirror.submit("latest", "step 1", lambda _: begun.append(1))
        assert inside.wait(100)
        mirror.submit("latest", "step 2", lambda _: begun.append(2))
        gate.set()
        assert mirror.close(60) == []
    assert begun == [2]


def test_jobs_of_different_keys_do_not_wait_for_one_another(spool, tmp_path):
    store = Folder(tmp_path / "store")
    begun = threading.Event()

    def waits_for_another_host(cancelled: Callable[[], bool]) -> None:
        begun.set()
        while not store.names("part-1"):
            time.sleep(0.01)

    with Mirror(store, spool) as mirror:
        mirror.submit("latest", "step 1", waits_for_another_host)
        assert begun.wait(100)
        mirror.submit("best", "step 1 as best", writes(store, "best"))
        eventually(lambda: mirror.pending() == ["step 1"])
        store.write("part-1", b"")
        assert mirror.close(60) == []


def test_logs_arrive_before_the_jobs_that_follow_them(s3, spool):
    store = open_store(s3.url)
    seen: list[bytes] = []
    with Mirror(store, spool, NEVER) as mirror:
        mirror.watch("log")
        for step in range(3):
            append(spool / "log", b"x")
            mirror.submit("latest", f"step {step}", lambda _: seen.append(store.read("log")))
            eventually(lambda: not mirror.pending())
    assert seen == [b"x", b"xx", b"xxx"]


def test_hosts_wait_for_each_others_parts(s3, tmp_path):
    def host(i: int) -> tuple[Mirror, Store]:
        store = open_store(s3.url)
        return Mirror(store, tmp_path / f"host{i}"), store

    def save(store: Store, i: int) -> Job:
        def job(cancelled: Callable[[], bool]) -> None:
            store.write(f"7/{i}", b"part")
            while i == 0 and not cancelled():
                if store.names("7/") == ["7/0", "7/1"]:
                    return store.write("7.done", b"")
                time.sleep(0.01)

        return job

    (one, store_one), (two, store_two) = host(0), host(1)
    with one, two:
        one.submit("latest", "step 7", save(store_one, 0))
        eventually(lambda: store_one.names() == ["7/0"])
        assert one.close(0) == ["step 7"]
        two.submit("latest", "step 7", save(store_two, 1))
        assert two.close(60) == []
    assert store_two.names() == ["7/0", "7/1"]
    again, store = host(0)
    with again:
        again.submit("latest", "step 7", save(store, 0))
        assert again.close(60) == []
    assert store_two.names() == ["7.done", "7/0", "7/1"]


def test_an_end_before_its_time_does_not_wait_for_long(s3, spool, monkeypatch):
    monkeypatch.setattr(mirror_module, "_LITTLE_PATIENCE", 0.2)
    (spool / "log").write_bytes(b"1")
    s3.proxy.mode = "hang"
    with Mirror(open_store(s3.url), spool, OFTEN) as mirror, caught_signals() as stopped:
        mirror.watch("*")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begun = time.monotonic()
        assert mirror.close(300, stopped) == ["log"]
        assert time.monotonic() - begun < 200
    assert stopped == [signal.SIGTERM]
    assert_no_threads()


def test_a_step_that_is_going_up_is_waited_for_also_at_an_early_end(
    spool, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mirror_module, "_LITTLE_PATIENCE", 0.2)
    said, store = threading.Event(), Folder(tmp_path / "store")

    def slow(cancelled: Callable[[], bool]) -> None:
        assert said.wait(100)
        store.write("a", b"1")

    with Mirror(store, spool, OFTEN) as mirror:
        monkeypatch.setattr(mirror_module, "_say", lambda line: (print(line), said.set()))
        mirror.submit("latest", "checkpoint 7.0", slow)
        assert mirror.close(300, [signal.SIGTERM]) == []
    assert store.names() == ["a"]
    line = r"checkpoint 7\.0: still going up; waiting for at most (\d+) s more\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_a_step_that_cannot_go_up_is_not_waited_for_then(spool, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_module, "_LITTLE_PATIENCE", 0.2)

    def fails(cancelled: Callable[[], bool]) -> None:
        raise StoreAway("1")

    with Mirror(Folder(tmp_path / "store"), spool, OFTEN) as mirror:
        mirror.submit("latest", "checkpoint 7.0", fails)
        begun = time.monotonic()
        assert mirror.close(300, [signal.SIGTERM]) == ["checkpoint 7.0"]
        assert time.monotonic() - begun < mirror_module._NOTICE_PATIENCE


def test_an_end_at_once_brings_the_logs_and_says_what_is_left(spool, tmp_path, capsys):
    store, gate = Folder(tmp_path / "store"), threading.Event()

    def waits(cancelled: Callable[[], bool]) -> None:
        assert gate.wait(100)

    with Mirror(store, spool, NEVER) as mirror:
        mirror.watch("log")
        eventually(lambda: not mirror.pending())
        (spool / "log").write_bytes(b"1")
        mirror.submit("latest", "checkpoint 7.0", waits)
        mirror.leave()
        assert store.names() == ["log"]
        assert capsys.readouterr().err == f"only in {spool}: checkpoint 7.0\n"
        gate.set()
        assert mirror.close(60) == []
        mirror.leave()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", ["refuse", "hang"])
def test_what_is_only_local_in_the_end(s3, spool, mode, capsys):
    store = open_store(s3.url)
    (spool / "done").write_bytes(b"1")
    with Mirror(store, spool, OFTEN) as mirror:
        mirror.watch("*")
        eventually(lambda: not mirror.pending() and s3.contents())
        s3.proxy.mode = mode
        (spool / "log").write_bytes(b"1")
        mirror.submit("latest", "step 1", writes(store, "a"))
        assert mirror.close(1) == ["step 1", "log"]
        assert_no_threads()
        assert mirror.close(60) == ["step 1", "log"]
    assert s3.contents().keys() == {"done"}
    assert "given up" not in capsys.readouterr().err


def test_an_error_of_the_caller_leaves_with_the_logs(s3, spool, capsys):
    with pytest.raises(UserError), Mirror(open_store(s3.url), spool, NEVER) as mirror:
        mirror.watch("log")
        (spool / "log").write_bytes(b"1")
        raise UserError("not finite")
    assert s3.contents() == {"log": b"1"}
    assert_no_threads()
    assert capsys.readouterr().err == ""


def test_a_bug_in_a_job_is_raised(spool, tmp_path):
    store = Folder(tmp_path / "store")
    mirror = Mirror(store, spool)
    mirror.submit("latest", "step 1", lambda _: {}["bug"])
    eventually(lambda: not mirror.pending())
    with pytest.raises(KeyError, match="bug"):
        mirror.submit("latest", "step 2", writes(store, "a"))
    mirror.submit("latest", "step 3", writes(store, "a"))
    mirror.submit("best", "step 3", lambda _: {}["another"])
    with pytest.raises(KeyError, match="another"):
        mirror.close(60)
    assert store.names() == ["a"]
    assert_no_threads()
    with pytest.raises(ValueError, match="first") as caught, Mirror(store, spool) as mirror:
        mirror.submit("latest", "step 4", lambda _: {}["bug"])
        raise ValueError("first")
    assert caught.value.__notes__ == ["besides, KeyError('bug')"]


def test_a_job_that_fails_for_ever_holds_up_no_other(spool, tmp_path):
    store = Folder(tmp_path / "store")
    with Mirror(store, spool) as mirror:
        mirror.submit("latest", "step 1", lambda _: store.upload("a", spool / "vanished"))
        mirror.submit("best", "step 1 as best", writes(store, "best"))
        eventually(lambda: mirror.pending() == ["step 1"])
        assert mirror.close(0) == ["step 1"]


def test_a_log_that_vanishes_while_it_is_uploaded(spool, tmp_path, capsys):
    class Vanishing(Folder):
        def upload(self, name: str, path: Path) -> None:
            if name == "a":
                path.unlink()
            super().upload(name, path)

    for name in "abc":
        (spool / name).write_bytes(b"1")
    store = Vanishing(tmp_path / "store")
    with Mirror(store, spool, NEVER) as mirror:
        mirror.watch("*")
        assert mirror.close(60) == []
    assert store.names() == ["b", "c"]
    assert capsys.readouterr().err == ""


def test_pull(s3, spool):
    store = open_store(s3.url)
    names = ["metrics.jsonl", "vocab.json", "samples.txt", "absent"]
    (spool / "metrics.jsonl").write_bytes(b"1\n2\n")
    pull(store, spool, names)  # no run is there
    assert (spool / "metrics.jsonl").read_bytes() == b"1\n2\n"
    store.write("metrics.jsonl", b"others\n")
    pull(store, spool, names)  # nor is this one
    assert (spool / "metrics.jsonl").read_bytes() == b"1\n2\n"

    store.write("config.json", b"{}")
    store.write("metrics.jsonl", b"1\n")
    store.write("vocab.json", b"[]")
    store.write("samples.txt", b"text")
    (spool / "samples.txt").write_bytes(b"te")
    (spool / "config.json").write_bytes(b"old")
    pull(store, spool, names)
    assert {path.name: path.read_bytes() for path in spool.iterdir()} == {
        "config.json": b"{}",
        "metrics.jsonl": b"1\n2\n",  # it has more than the store, not other things
        "vocab.json": b"[]",
        "samples.txt": b"text",
    }
    store.write("metrics.jsonl", b"1\n3\n")
    new = spool / "new" / "machine"
    for folder in (spool, new):
        pull(store, folder, names)
        assert (folder / "metrics.jsonl").read_bytes() == b"1\n3\n"


def test_pull_waits_for_a_store_that_is_away(s3, spool, capsys):
    store = open_store(s3.url)
    store.write("config.json", b"{}")
    s3.proxy.mode = "refuse"
    with pytest.raises(UserError, match=f"S3 is away .s3://{s3.bucket}/some/run/config.json"):
        pull(store, spool, [], patience=0)
    assert capsys.readouterr().err == ""
    assert list(spool.iterdir()) == []

    def end_outage() -> None:
        eventually(lambda: "trying again" in capsys.readouterr().err)
        s3.proxy.mode = "ok"

    thread = threading.Thread(target=end_outage)
    thread.start()
    pull(store, spool, [])
    thread.join()
    assert (spool / "config.json").read_bytes() == b"{}"


def log_steps(logs: Logs, first: int, last: int, shift: float = 0.0) -> None:
    for step in range(first, last + 1):
        logs.scalars(step, 100 * step, {LOSS: step + shift})


class TensorBoard:
    """A process of `tensorboard --logdir URL`, asked over HTTP."""

    def __init__(self, url: str, endpoint: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        words = ["--logdir", url, "--host", "127.0.0.1", "--port", str(self._port)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *words, "--reload_interval", "1"],
            env=os.environ | {"S3_ENDPOINT": endpoint},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def scalars(self, tag: str) -> list[tuple[int, float]] | None:
        """Step and value of what it shows; None: nothing yet."""
        url = f"http://127.0.0.1:{self._port}/data/plugin/scalars/scalars?tag={tag}&run=."
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                events: list[Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            return None
        except urllib.error.URLError:
            assert self._process.poll() is None
            return None
        return [(step, value) for _, step, value in events]

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


def test_tensorboard_reads_the_bucket(s3, tmp_path):
    store = open_store(s3.url)

    def start(machine: str) -> Mirror:
        spool = tmp_path / machine
        spool.mkdir()
        pull(store, spool, [METRICS, SAMPLES])
        mirror = Mirror(open_store(s3.url), spool, OFTEN)
        mirror.watch("config.json", METRICS, SAMPLES, EVENTS + "*")
        (spool / "config.json").write_text("{}")
        return mirror

    with TensorBoard(s3.url, s3.proxy.url) as board:
        with start("first") as mirror, Logs(tmp_path / "first", None) as logs:
            log_steps(logs, 1, 5)
            assert mirror.close(60) == []
        # Another machine goes on after step 3, and knows only what is in the bucket.
        with start("second") as mirror:
            earlier = store.names(EVENTS)
            with Logs(tmp_path / "second", 300, earlier) as logs:
                log_steps(logs, 4, 6, shift=0.5)
                points = [*((100 * n, float(n)) for n in (1, 2, 3)), (400, 4.5), (500, 5.5)]
                points.append((600, 6.5))
                eventually(lambda: board.scalars(LOSS) == points)
                log_steps(logs, 7, 7)
                eventually(lambda: board.scalars(LOSS) == [*points, (700, 7.0)])
            assert mirror.close(60) == []
    assert len(store.names(EVENTS)) == 2
    lines = [json.loads(line) for line in store.read(METRICS).splitlines()]
    assert [line[LOSS] for line in lines] == [1.0, 2.0, 3.0, 4.5, 5.5, 6.5, 7.0]
