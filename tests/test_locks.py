import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from txl_jax import locks

CHILD = """
import sys
from pathlib import Path
from txl_jax import locks

with locks.alone(Path(sys.argv[1]), "does the same"):
    print("has it", flush=True)
    sys.stdin.readline()
"""


def child(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )


@pytest.mark.parametrize("killed", [False, True])
def test_one_waits_for_the_other_and_says_so(tmp_path, killed):
    with child(tmp_path / "a" / "lock") as first:
        assert first.stdout and first.stdout.readline() == "has it\n"
        with child(tmp_path / "a" / "lock") as second:
            assert second.stdout and second.stderr
            said = second.stderr.readline()
            assert said == "waiting for another process that does the same\n"
            if killed:
                first.kill()
            first.communicate("\n")
            assert second.stdout.readline() == "has it\n"
            assert second.communicate("\n") == ("", "")
    assert second.returncode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_it_goes_on(tmp_path, monkeypatch, number):
    def flock(*args: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.alone(tmp_path / "lock", "does it"), locks.alone(tmp_path / "lock", "does it"):
        pass


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/new")):
        with pytest.raises(OSError), locks.alone(folder / "lock", "does it"):
            raise AssertionError


def test_what_goes_wrong_meanwhile_is_not_taken_for_a_missing_lock(tmp_path):
    with pytest.raises(OSError, match="of the block"), locks.alone(tmp_path / "lock", "does it"):
        raise OSError(errno.ENOLCK, "of the block")
    with locks.alone(tmp_path / "lock", "does it"):
        pass
