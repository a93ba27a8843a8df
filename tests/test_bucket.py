import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from txl_jax.bucket import Bucket
from txl_jax.errors import UserError
from txl_jax.store import StoreAway, StoreRefused, check_store, open_store, patiently

pytest_plugins = ["tests.buckets"]

pytestmark = pytest.mark.processes

BIG = bytes(range(256)) * (40 << 12)
"""40 MiB: several parts."""


@pytest.fixture
def bucket(s3) -> Bucket:
    store = open_store(s3.url)
    assert isinstance(store, Bucket)
    return store


def test_what_is_written_is_read(s3, bucket, tmp_path):
    bucket.write("a/b/c", b"1")
    bucket.write("a/b/c", b"22")
    bucket.write("a/bc", b"3")
    s3.direct.put_object(Bucket=s3.bucket, Key="some/run2/a", Body=b"another run's")
    s3.direct.put_object(Bucket=s3.bucket, Key="some/run/folder/", Body=b"")
    assert bucket.read("a/b/c") == b"22"
    assert bucket.names() == ["a/b/c", "a/bc"]
    assert bucket.names("a/b/") == ["a/b/c"]
    assert bucket.names("x") == []
    bucket.download("a/bc", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"3"
    bucket.delete(["a/b/c", "a/bc", "absent"])
    bucket.delete([])
    assert bucket.names() == []


def test_more_files_than_one_answer_holds(s3, bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    names = [f"x{i}" for i in range(8)]
    for name in names:
        bucket.write(name, b"")
    assert bucket.names() == names
    assert sum("list-type" in request for request in s3.proxy.requests) == 3
    bucket.delete([*names, *(f"absent-{i}" for i in range(1000))])  # in two requests
    assert bucket.names() == []


def test_a_large_file_goes_in_parts(s3, bucket, tmp_path):
    (tmp_path / "big").write_bytes(BIG)
    bucket.upload("big", tmp_path / "big")
    assert sum("partNumber" in request for request in s3.proxy.requests) == 3
    bucket.download("big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == BIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "copy"]


def test_what_is_absent(bucket, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        bucket.read("absent")
    assert "some/run/absent" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        bucket.download("absent", tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        bucket.upload("new", tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def calls(bucket: Bucket, folder: Path) -> dict[str, object]:
    (folder / "small").write_bytes(b"1")
    (folder / "big").write_bytes(BIG)
    return {
        "names": lambda: bucket.names(),
        "read": lambda: bucket.read("a"),
        "write": lambda: bucket.write("a", b"2"),
        "upload": lambda: bucket.upload("a", folder / "small"),
        "upload in parts": lambda: bucket.upload("a", folder / "big"),
        "download": lambda: bucket.download("a", folder / "copy"),
        "delete": lambda: bucket.delete(["a"]),
    }


@pytest.mark.parametrize(
    "mode", ["refuse", pytest.param("slow-down", marks=pytest.mark.slow), "error", "denied"]
)
def test_every_fault_is_an_oserror_of_one_line(s3, bucket, mode, tmp_path):
    bucket.write("a", b"1")
    s3.proxy.mode = mode
    for call in calls(bucket, tmp_path).values():
        with pytest.raises(OSError, match=f"s3://{s3.bucket}/some/run/") as caught:
            call()  # pyright: ignore[reportCallIssue]
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, FileNotFoundError)
        assert type(caught.value) is (StoreRefused if mode == "denied" else StoreAway)
    s3.proxy.mode = "ok"
    assert bucket.read("a") == b"1"
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_nothing_answers(s3, bucket):
    s3.proxy.mode = "hang"
    with pytest.raises(OSError, match=r"[Tt]imeout"):
        bucket.read("a")


def test_nobody_is_there(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="Could not connect"):
        open_store(s3.url).read("a")
    with pytest.raises(UserError, match=r"S3 is away .*AWS_ENDPOINT_URL"):
        check_store(open_store(s3.url), patience=0)


def test_a_store_that_is_stopped_gives_up(s3, bucket, tmp_path):
    (tmp_path / "big").write_bytes(BIG)
    s3.proxy.mode = "hang"
    failed = threading.Event()

    def upload() -> None:
        with pytest.raises(OSError, match=r"given up|imeout"):
            bucket.upload("big", tmp_path / "big")
        failed.set()

    thread = threading.Thread(target=upload)
    thread.start()
    bucket.stop()
    thread.join(30)
    assert failed.is_set()
    s3.proxy.mode = "ok"
    with pytest.raises(OSError, match="given up"):
        bucket.read("a")
    assert s3.proxy.requests == []


def stopped_while_it_uploads(s3, bucket, path: Path, mode: str) -> None:
    """Stops a store that is sending all parts of a file, when the proxy is in `mode`."""
    path.write_bytes(BIG)
    errors: list[OSError] = []

    def upload() -> None:
        try:
            bucket.upload("big", path)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=upload)
    thread.start()
    eventually(lambda: sum("partNumber" in request for request in s3.proxy.begun) == 3)
    s3.proxy.mode = mode
    bucket.stop()
    thread.join(100)
    assert [type(error) for error in errors] == [StoreAway]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_file_that_is_sent_slowly_is_given_up(s3, bucket, tmp_path):
    s3.proxy.mode = "crawl"
    stopped_while_it_uploads(s3, bucket, tmp_path / "big", "crawl")
    assert not any("partNumber" in request for request in s3.proxy.requests)


def test_parts_of_a_file_are_taken_back_without_waiting_for_long(s3, bucket, tmp_path):
    s3.proxy.mode = "crawl"
    stopped_while_it_uploads(s3, bucket, tmp_path / "big", "hang")
    assert sum(request.startswith("DELETE") for request in s3.proxy.begun) == 1
    s3.proxy.mode = "ok"


def test_faults_from_another_process(s3, moto_port, tmp_path, monkeypatch):
    """The proxy as a program, whose mode a file tells."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "tests.faulty_s3", str(port), str(moto_port), str(tmp_path / "mode")]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with subprocess.Popen([sys.executable, *words]) as process:
        bucket = Bucket(s3.bucket, "some/run")
        patiently(lambda: bucket.write("a", b"1"))
        (tmp_path / "mode").write_text("denied\n")
        with pytest.raises(StoreRefused):
            bucket.read("a")
        (tmp_path / "mode").write_text("ok\n")
        assert bucket.read("a") == b"1"
        process.terminate()


def test_a_check_leaves_nothing(s3, bucket):
    check_store(bucket)
    assert s3.contents() == {}


def refusal(url: str) -> str:
    with pytest.raises(UserError) as caught:
        check_store(open_store(url))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_check_refuses(s3, monkeypatch):
    assert "NoSuchBucket" in refusal("s3://there-is-none/run")
    s3.proxy.mode = "denied"
    assert "AccessDenied" in refusal(s3.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "credentials" in refusal(s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "credentials" in refusal(s3.url)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match="nobody"):
        open_store(s3.url)
