"""Files from the network: whole and the right ones, or not there at all."""

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tqdm import tqdm

from txl_jax import storage
from txl_jax.errors import UserError

if TYPE_CHECKING:
    import requests

_BLOCK = 1 << 20
_TIMEOUT = (15.0, 60.0)
"""Seconds that a connection may take, and that a server may then be silent."""


@dataclass(frozen=True)
class Download:
    """A file that never changes, and where it may be had."""

    name: str
    """Of the file on this machine."""
    urls: tuple[str, ...]
    """Addresses of the same bytes, tried in turn."""
    digest: str
    """`ALGORITHM:HEX` for an algorithm of hashlib, or `git:HEX` for git's id of the contents."""
    size: int | None = None
    """In bytes; None: not known before."""


class _Unfit(Exception):
    """What an address gave is not the file: why."""


def fetch(file: Download, folder: Path) -> Path:
    """The file in `folder`; it is downloaded if it is not there, or not whole.

    A download is checked before it gets its name, so that one that was cut off or killed leaves
    nothing that would be used. Proxies are those of the environment (`https_proxy`).

    Raises:
      UserError: no address gives the file (each is named, with what is wrong), or it cannot be
        written.
    """
    path = folder / file.name
    failures = []
    try:
        if path.is_file() and not _complaint(file, path):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        for url in file.urls:
            try:
                _download(url, file, path)
            except _Unfit as complaint:
                failures.append(f"{url} {complaint}")
            else:
                return path
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room there or name another "
            "folder with --data-dir"
        ) from None
    raise UserError(
        f"cannot download {file.name}: {'; '.join(failures)}; try again later, or put the file "
        f"into {folder} yourself"
    )


def _download(url: str, file: Download, path: Path) -> None:
    with storage.replacing(path) as target:
        with _answer(url) as answer:
            _check_kind(file, answer)
            _receive(answer, file, target)
        target.flush()
        if complaint := _complaint(file, Path(target.name)):
            raise _Unfit(complaint)


@contextmanager
def _answer(url: str) -> Iterator["requests.Response"]:
    """What the server answers; whatever goes wrong in the block with the network is `_Unfit`."""
    import requests

    # A server that compresses on the way would make the length it states another one.
    headers = {"Accept-Encoding": "identity"}
    try:
        with closing(requests.get(url, stream=True, timeout=_TIMEOUT, headers=headers)) as answer:
            if not answer.ok:
                raise _Unfit(f"answers {answer.status_code} {answer.reason}")
            yield answer
    except requests.Timeout:
        raise _Unfit("does not answer in time") from None
    except requests.exceptions.ChunkedEncodingError:
        raise _Unfit("was cut off") from None
    except requests.ConnectionError:
        raise _Unfit("cannot be reached, or broke off") from None
    except requests.RequestException as error:
        raise _Unfit(f"fails ({type(error).__name__})") from None


def _check_kind(file: Download, answer: "requests.Response") -> None:
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise _Unfit("gives a web page instead of the file")
    length = answer.headers.get("Content-Length")
    if length and file.size and int(length) != file.size:
        raise _Unfit(f"gives {length} bytes instead of {file.size}")


def _receive(answer: "requests.Response", file: Download, target: BinaryIO) -> None:
    length = int(answer.headers.get("Content-Length", 0)) or file.size
    received = 0
    with tqdm(
        desc=f"downloading {file.name}",
        total=length,
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=None,
    ) as bar:
        for block in answer.iter_content(_BLOCK):
            target.write(block)
            received += len(block)
            bar.update(len(block))
    if length and received < length:
        raise _Unfit(f"was cut off after {received} of {length} bytes")


def _complaint(file: Download, path: Path) -> str:
    """What is wrong with a file; empty if it is the right one."""
    size = path.stat().st_size
    with path.open("rb") as content:
        if content.read(100).lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "gives a web page instead of the file"
        content.seek(0)
        algorithm, expected = file.digest.split(":")
        # Against damage, not malice: where upstream states an MD5 or SHA-1, that has to do.
        if algorithm == "git":
            found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        else:
            found = hashlib.new(algorithm, usedforsecurity=False)
        while block := content.read(_BLOCK):
            found.update(block)
    if found.hexdigest() != expected:
        return f"gives another file (its {algorithm} hash is {found.hexdigest()})"
    return ""
