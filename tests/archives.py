"""Archives of the layout that the real ones have, with little text, and a server that gives them,
whole or broken, over HTTP on loopback."""

import dataclasses
import gzip
import hashlib
import io
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from txl_jax import sources

PAGE = b"<!DOCTYPE html>\n<html><body>This file has moved.</body></html>\n"


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return packed.getvalue()


class Archives:
    """What the server gives, and how."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        """By the path of the address."""
        self.types: dict[str, str] = {}
        """Content types other than that of unknown bytes."""
        self.lengths: dict[str, int | None] = {}
        """Lengths that are stated in place of the true one; None: none is stated."""
        self.asked: Counter[str] = Counter()
        """How often each file was asked for."""
        self.stopped_at: int | None = None
        """Bytes after which an answer waits for `go_on`."""
        self.waiting = threading.Event()
        self.go_on = threading.Event()

    def serve(self, dataset: str, content: bytes, mirrors: int = 0, **changes: Any) -> str:
        """Makes `content` the archive of a data set; the path of its address.

        mirrors: further addresses, which give nothing unless a test adds to `files`.
        """
        source = sources.SOURCES[dataset]
        path = f"/{source.archive.name}"
        self.files[path] = content
        archive = dataclasses.replace(
            source.archive,
            urls=tuple(self.url + path + ".mirror" * i for i in range(mirrors + 1)),
            digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
            size=len(content),
        )
        sources.SOURCES[dataset] = dataclasses.replace(source, archive=archive, **changes)
        return path


@contextmanager
def serving() -> Iterator[Archives]:
    """A server, which takes the place of true addresses in `sources` as `Archives.serve` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.removeprefix(served.url)
            served.asked[path] += 1
            if path not in served.files:
                self.send_error(404)
                return
            content = served.files[path]
            self.send_response(200)
            self.send_header("Content-Type", served.types.get(path, "application/octet-stream"))
            if "gzip" in self.headers.get("Accept-Encoding", ""):
                content = gzip.compress(content)
                self.send_header("Content-Encoding", "gzip")
            length = served.lengths.get(path, len(content))
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            if served.stopped_at is not None:
                self.wfile.write(content[: served.stopped_at])
                self.wfile.flush()
                content = content[served.stopped_at :]
                served.waiting.set()
                served.go_on.wait()
            with suppress(ConnectionError):  # who asked may have been killed
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Archives(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        served.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Writes files below a folder; the folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root
