import signal
import socket
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from txl_jax import home as home_module
from txl_jax.errors import UserError
from txl_jax.home import Home

pytest_plugins = ["tests.buckets"]

pytestmark = pytest.mark.processes


@pytest.fixture
def home(s3, tmp_path, monkeypatch) -> Home:
    monkeypatch.chdir(tmp_path)
    home = Home(s3.url)
    home.bring()
    home.folder.mkdir(parents=True)
    return home


def check_shared(*logdirs: Path) -> list[str]:
    """What processes say whose logdirs are these folders."""
    met, values = threading.Barrier(len(logdirs)), [""] * len(logdirs)

    def check(number: int) -> str:
        def gather(name: str, value: str) -> list[str]:
            values[number] = value
            met.wait()
            found = list(values)
            met.wait()
            return found

        try:
            Home(str(logdirs[number])).check_shared(gather, number == 0, patience=0.5)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(logdirs)) as threads:
        return list(threads.map(check, range(len(logdirs))))


def test_a_folder_that_all_see_is_left_as_it_was(tmp_path):
    run = tmp_path / "run"
    assert check_shared(run, run, run) == ["", "", ""]
    assert list(tmp_path.iterdir()) == []
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert check_shared(run, run) == ["", ""]
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_who_does_not_see_the_folder_of_process_0_is_named_to_all(tmp_path):
    (tmp_path / "two").mkdir()
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    here = socket.gethostname()
    expected = [
        f"--logdir {logdir} is not the same folder on all hosts: process 1 (host {here}), process "
        f"3 (host {here}) cannot see what process 0 writes there; use a shared disk or "
        "s3://BUCKET/FOLDER"
        for logdir in (one, two, one, three)
    ]
    assert check_shared(one, two, one, three) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_the_files_of_a_run_are_in_s3_at_its_end(s3, home, capsys):
    with home.mirrored(0, [signal.SIGTERM]):
        (home.folder / "metrics.jsonl").write_bytes(b"1\n")
        (home.folder / "other").write_bytes(b"not the run's")
    assert s3.contents() == {"metrics.jsonl": b"1\n"}
    assert capsys.readouterr().err == ""
    with home.mirrored(1):
        (home.folder / "metrics.jsonl").write_bytes(b"2\n")
    assert s3.contents() == {"metrics.jsonl": b"1\n"}


def test_the_first_look_is_at_all_files_of_the_run(s3, home, monkeypatch):
    class Mirror(home_module.Mirror):
        def __init__(self, store: Any, folder: Path):
            super().__init__(store, folder, every=3600.0)

        def watch(self, *patterns: str, later: Collection[str] = ()) -> None:
            super().watch(*patterns, later=later)
            time.sleep(0.5)  # its thread looks meanwhile

    monkeypatch.setattr(home_module, "Mirror", Mirror)
    (home.folder / "run.json").write_text("{}")
    with home.mirrored(0):
        end = time.monotonic() + 20
        while "run.json" not in s3.contents() and time.monotonic() < end:
            time.sleep(0.05)
        assert s3.contents() == {"run.json": b"{}"}


def test_a_run_that_ends_with_files_in_the_folder_only_says_so(s3, home, monkeypatch):
    monkeypatch.setattr(home_module, "_PATIENCE", 0.2)
    with pytest.raises(UserError) as caught, home.mirrored(0):
        s3.proxy.mode = "refuse"
        (home.folder / "metrics.jsonl").write_bytes(b"1\n")
    assert str(caught.value) == (
        f"S3 has not got everything; only in {home.folder}: metrics.jsonl; give the same command "
        "again when S3 takes files"
    )


def test_a_run_that_is_stopped_says_so_and_does_not_fail(s3, home, capsys):
    with home.mirrored(0, [signal.SIGTERM]):
        s3.proxy.mode = "denied"
        (home.folder / "metrics.jsonl").write_bytes(b"1\n")
    *_, last = capsys.readouterr().err.splitlines()
    assert last == (
        f"S3 has not got everything; only in {home.folder}: metrics.jsonl; the same command goes "
        "on from what S3 has"
    )
