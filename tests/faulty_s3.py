"""A proxy before an S3 server that can fail: `python -m tests.faulty_s3 PORT UPSTREAM_PORT FILE`.

FILE holds one of `MODES` and is read again at each request; when it is absent, all is well.
"""

import http.client
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

_ANSWERS = {
    "slow-down": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
MODES = ("ok", "refuse", "hang", "cut", "crawl", *_ANSWERS)
"""Refuse: the connection is reset. Hang: no answer, for as long as it lasts; the connection ends
then. Cut: the request is done, and the connection reset before the answer. Crawl: the request is
read slowly."""
_CRAWL = 64 << 10
"""Bytes read every 50 ms."""
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}


class FaultyS3:
    """The proxy, in threads of this process; a context manager."""

    def __init__(self, upstream: int, port: int = 0, mode: Callable[[], str] | None = None):
        """`upstream`: port of the server. `mode`: where the mode comes from, else `self.mode`."""
        self.mode = "ok"
        self.requests: list[str] = []
        """Method and path of every request that reached the server."""
        self.begun: list[str] = []
        """Method and path of every request that has come as far as the proxy, if only its head."""
        self._server = _Server(self, upstream, port, mode or (lambda: self.mode))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def serve(self) -> None:
        """Serves until `close`."""
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        """Ends every thread and connection."""
        self._server.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve, name="faulty-s3", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, proxy: FaultyS3, upstream: int, port: int, mode: Callable[[], str]):
        super().__init__(("127.0.0.1", port), _Request)
        self.proxy, self.upstream, self.mode = proxy, upstream, mode
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what this server is for."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def _relay(self) -> None:
        self.server.proxy.begun.append(f"{self.command} {self.path}")
        body = self._read(int(self.headers.get("Content-Length", 0)))
        mode = self.server.mode()
        if mode == "hang":
            while self.server.mode() == "hang" and not self.server.closing.wait(0.05):
                pass
            self._reset()
        elif mode == "refuse":
            self._reset()
        elif mode in _ANSWERS:
            status, code, message = _ANSWERS[mode]
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            self._answer(status, [("Content-Type", "application/xml")], text.encode())
        else:
            status, headers, content = self._ask(body)
            if mode == "cut":
                self._reset()
            else:
                self._answer(status, headers, content)

    def _read(self, length: int) -> bytes:
        slow = b""
        while self.server.mode() == "crawl" and len(slow) < length:
            slow += self.rfile.read(min(_CRAWL, length - len(slow)))
            time.sleep(0.05)
        return slow + self.rfile.read(length - len(slow))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        self.server.proxy.requests.append(f"{self.command} {self.path}")
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        # The answer to HEAD has the length of a content that it leaves out.
        length = lengths[0] if self.command == "HEAD" and lengths else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()
        raise ConnectionResetError

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def main() -> None:
    port, upstream, file = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

    def mode() -> str:
        try:
            return file.read_text().strip() or "ok"
        except FileNotFoundError:
            return "ok"

    FaultyS3(upstream, port, mode).serve()


if __name__ == "__main__":
    main()
