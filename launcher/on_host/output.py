"""Runs the trainer of a host and keeps what it prints, here and in S3.

    python -m launcher.on_host.output NUMBER FOLDER WORD …

WORD … is the command. What it prints goes to the terminal and to `~/txl/output-NUMBER.txt`, which
is appended to, and from there to FOLDER (s3://BUCKET/FOLDER; empty: nowhere else) every 20 s and at
the end. `~/txl/output.txt` is a link to it. SIGTERM, SIGINT and SIGHUP go on to the command.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from launcher.on_host.keeper import PID
from txl_jax import storage
from txl_jax.errors import run_command
from txl_jax.store import Store, open_store

LINK = "output.txt"
_EVERY_SECONDS = 20.0
_PAUSE_SECONDS = 1.0
_PATIENCE = 60.0
"""Seconds for which the end waits for a store that is away."""


def run(number: int, folder: str, command: list[str], home: Path) -> int:
    """Runs the command; its exit status, or 128 + the signal that ended it.

    Raises UserError for a malformed URL.
    """
    path = home / f"output-{number}.txt"
    store = open_store(folder) if folder else None
    if store and not path.exists():
        _bring(store, path)
    _link(home / LINK, path.name)
    with path.open("ab") as file, _uploading(store, path):
        file.write(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())
        early: list[int] = []
        # Before the child is there, as it would ignore what a shell's background job ignores.
        _on_signals(early.append)
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # a terminal's Ctrl-C reaches it once, from here
        )
        _on_signals(child.send_signal)
        for received in early:
            child.send_signal(received)
        storage.write_text(home / PID, f"{child.pid}\n")
        assert child.stdout
        while part := child.stdout.read1(1 << 16):  # pyright: ignore[reportAttributeAccessIssue]
            file.write(part)
            file.flush()
            with contextlib.suppress(OSError):  # the terminal may be gone
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
        status = child.wait()
    return status if status >= 0 else 128 - status


def _on_signals(act: Callable[[int], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: act(number))


def _bring(store: Store, path: Path) -> None:
    """Brings what an earlier host of the same number has printed, if S3 is there."""
    with contextlib.suppress(OSError):
        store.download(path.name, path)


def _link(link: Path, target: str) -> None:
    draft = link.with_name(link.name + storage.DRAFT)
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(link)


@contextlib.contextmanager
def _uploading(store: Store | None, path: Path) -> Iterator[None]:
    """Uploads the file while the block goes on, and when it ends."""
    if store is None:
        yield
        return
    ended = threading.Event()
    sent = -1

    def upload() -> bool:
        """Whether the store has the file as it is."""
        nonlocal sent
        size = path.stat().st_size
        try:
            if size != sent:
                store.upload(path.name, path)
                sent = size
        except OSError:
            return False
        return True

    def work() -> None:
        while not ended.wait(_EVERY_SECONDS):
            upload()
        deadline = time.monotonic() + _PATIENCE
        while not upload():
            if time.monotonic() > deadline:
                only = f"S3 did not take {path.name}: it is only on this host"
                print(only, file=sys.stderr, flush=True)
                return
            time.sleep(_PAUSE_SECONDS)

    thread = threading.Thread(target=work, name="upload")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main(words: list[str]) -> int:
    number, folder, *command = words
    return run(int(number), folder, command, Path.home() / "txl")


if __name__ == "__main__":
    run_command(main)
