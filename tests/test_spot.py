"""The spot notice, from a real server that speaks IMDSv2."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from txl_jax import spot

NOTICE = {"action": "terminate", "time": "2026-01-02T03:04:05Z"}


class Metadata(ThreadingHTTPServer):
    """The instance metadata service of one machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.notice: bytes | None = None
        self.broken = False
        self.asked = threading.Semaphore(0)
        """Released when somebody has asked for the notice."""
        self.refused = threading.Semaphore(0)
        """Released when somebody was given no token."""


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        ttl = self.headers["x-aws-ec2-metadata-token-ttl-seconds"]
        if self.server.broken:
            self.answer(503)
            self.server.refused.release()
        elif self.path == "/latest/api/token" and int(ttl) > 0:
            self.answer(200, b"secret")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/spot/instance-action"
        self.server.asked.release()
        if self.headers["x-aws-ec2-metadata-token"] != "secret":
            self.answer(401)
        elif self.server.notice is None:
            self.answer(404)
        else:
            self.answer(200, self.server.notice)

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    monkeypatch.setattr(spot, "POLL_SECONDS", 0.05)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    with Metadata() as server:
        monkeypatch.setenv(spot.ENDPOINT, f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_notice_acts_once_and_says_what_comes_when(metadata, capfd):
    acts: list[int] = []
    thread = spot.start_watching(lambda: acts.append(1))
    for _ in range(2):
        assert metadata.asked.acquire(timeout=10)
    assert acts == []
    metadata.broken = True
    metadata.notice = b"not JSON"
    metadata.broken = False
    metadata.asked.acquire(timeout=10)
    metadata.notice = json.dumps(NOTICE).encode()
    thread.join(timeout=10)
    assert acts == [1]
    assert capfd.readouterr().err == "spot notice: terminate at 2026-01-02T03:04:05Z\n"


def test_a_service_that_fails_for_a_while_does_not_end_the_watch(metadata):
    noticed = threading.Event()
    thread = spot.start_watching(noticed.set)
    assert metadata.asked.acquire(timeout=10)
    metadata.notice, metadata.broken = json.dumps(NOTICE).encode(), True
    assert not noticed.wait(0.5)
    metadata.broken = False
    assert noticed.wait(10)
    thread.join(timeout=10)


def test_a_service_that_fails_at_the_start_is_asked_again(metadata):
    metadata.notice, metadata.broken = json.dumps(NOTICE).encode(), True
    noticed = threading.Event()
    thread = spot.start_watching(noticed.set)
    for _ in range(3):
        assert metadata.refused.acquire(timeout=10)
    assert not noticed.is_set()
    metadata.broken = False
    assert noticed.wait(10)
    thread.join(timeout=10)


def test_a_service_that_never_answers_is_let_be(metadata, monkeypatch):
    monkeypatch.setattr(spot, "TRY_SECONDS", 0.1)
    metadata.broken = True
    thread = spot.start_watching(lambda: None)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_elsewhere_the_watch_ends_at_once(metadata, monkeypatch, capfd):
    metadata.notice = json.dumps(NOTICE).encode()
    acts: list[int] = []
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    spot.start_watching(lambda: acts.append(1)).join(timeout=10)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv(spot.ENDPOINT, "http://127.0.0.1:9/")  # nothing listens there
    thread = spot.start_watching(lambda: acts.append(1))
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert acts == [] and capfd.readouterr() == ("", "")
