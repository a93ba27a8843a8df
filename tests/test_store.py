import subprocess
import sys
from pathlib import Path

import pytest

from txl_jax import storage
from txl_jax.errors import UserError
from txl_jax.store import Folder, is_remote, local_folder, open_store, patiently


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "store")


def test_what_is_written_is_read(folder, tmp_path):
    folder.write("a/b/c", b"1")
    folder.write("a/b/c", b"22")
    folder.write("a/bc", b"3")
    (tmp_path / "local").write_bytes(b"4")
    folder.upload("ab", tmp_path / "local")
    assert folder.read("a/b/c") == b"22"
    assert folder.names() == ["a/b/c", "a/bc", "ab"]
    assert folder.names("a/b") == ["a/b/c", "a/bc"]
    assert folder.names("a/b/") == ["a/b/c"]
    assert folder.names("x/y/") == []
    folder.download("ab", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"4"
    folder.delete(["a/b/c", "a/bc", "absent", "x/absent"])
    assert folder.names() == ["ab"]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["ab"]


def test_what_is_absent(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    with pytest.raises(FileNotFoundError):
        folder.download("a", tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        folder.upload("a", tmp_path / "absent")
    assert folder.names() == []
    assert not (tmp_path / "copy").exists()


def test_a_file_that_is_in_its_place_is_left_alone(folder, tmp_path):
    folder.write("log", b"1")
    path = tmp_path / "store" / "log"
    before = path.stat()
    folder.upload("log", path)
    folder.download("log", path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_failed_copy_leaves_what_was_there(folder, tmp_path):
    folder.write("x", b"old")
    with pytest.raises(OSError, match="full"), storage.replacing(tmp_path / "store" / "x") as new:
        new.write(b"ne")
        raise OSError("full")
    assert folder.read("x") == b"old"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["x"]


def test_logdirs():
    assert not is_remote("runs/default")
    assert local_folder("runs/default") == Path("runs/default")
    assert isinstance(open_store("runs/default"), Folder)
    assert is_remote("s3://my-bucket/a/b/")
    assert local_folder("s3://my-bucket/a/b/") == Path("runs/my-bucket/a/b")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://", "is no name of a bucket"),
        ("s3:///a", "is no name of a bucket"),
        ("s3://My_Bucket/a", "is no name of a bucket"),
        ("s3://bucket", r"write s3://bucket/FOLDER"),
        ("s3://bucket/", r"write s3://bucket/FOLDER"),
        ("s3://bucket/a//b", "may be empty"),
        ("s3://bucket/../b", "may be empty"),
        ("gs://bucket/a", "s3://BUCKET/FOLDER"),
    ],
)
def test_malformed_urls(url, words):
    for use in (local_folder, open_store):
        with pytest.raises(UserError, match=words) as caught:
            use(url)
        assert "\n" not in str(caught.value)


def test_a_local_run_does_without_boto3():
    program = (
        "import sys; from txl_jax import mirror, store; store.open_store('runs/x'); "
        "sys.exit('boto3' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_patience(capsys):
    answers = [OSError("first"), OSError("second"), None]

    def attempt() -> str:
        if answer := answers.pop(0):
            raise answer
        return "done"

    assert patiently(attempt, 60) == "done"
    assert capsys.readouterr().err == "S3 is away (first): trying again for 60 s\n"
    answers += [OSError("for good")] * 9
    with pytest.raises(UserError, match=r"S3 is away \(for good\); check the network"):
        patiently(attempt, 0.5)
