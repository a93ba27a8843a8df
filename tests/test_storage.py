import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from txl_jax import storage

CHILD = """
import sys
from pathlib import Path
from txl_jax import storage

with storage.replacing(Path(sys.argv[1])) as file:
    file.write(b"of the child")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


def child(path: Path) -> subprocess.Popen[str]:
    """A process that writes to path and waits for a line before it ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert process.stdout and process.stdout.readline() == "writing\n"
    return process


@pytest.fixture
def no_locks(monkeypatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_that_write_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with child(path) as process:
        storage.write_text(path, "of the parent, and longer")
        assert path.read_text() == "of the parent, and longer"
        with storage.replacing(path) as file:
            file.write(b"again")
            process.communicate("\n")
            assert path.read_text() == "of the child"
    assert process.returncode == 0
    assert path.read_text() == "again"
    assert names(tmp_path) == ["file"]


def test_one_that_fails_leaves_the_draft_of_another(tmp_path):
    path = tmp_path / "file"
    with child(path) as process:
        with pytest.raises(ZeroDivisionError), storage.replacing(path):
            raise ZeroDivisionError
        process.communicate("\n")
    assert path.read_text() == "of the child"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_taken_by_the_next(tmp_path):
    path = tmp_path / "file"
    with child(path) as process:
        process.kill()
    assert names(tmp_path) == ["file.tmp"]
    storage.write_text(path, "short")
    assert path.read_text() == "short"
    assert names(tmp_path) == ["file"]


@pytest.mark.usefixtures("no_locks")
def test_without_locks_drafts_have_names_of_their_own_and_old_ones_go(tmp_path):
    path = tmp_path / "file[1]"
    old, fresh = (tmp_path / f"file[1].{name}{storage.DRAFT}" for name in ("old", "fresh"))
    for left in (old, fresh, tmp_path / "file1.old.tmp"):
        left.write_text("left")
    for left in (old, tmp_path / "file1.old.tmp"):
        os.utime(left, (1, 1))
    with storage.replacing(path) as first, storage.replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
        assert first.name != second.name
    assert path.read_text() == "first"
    assert names(tmp_path) == sorted(["file1.old.tmp", "file[1]", fresh.name])


def test_a_file_is_written_in_any_order(tmp_path):
    with storage.replacing(tmp_path / "file") as file:
        file.seek(3)
        file.write(b"de")
        file.seek(0)
        file.write(b"abc")
    assert (tmp_path / "file").read_bytes() == b"abcde"
