"""Brings a run's files from its spool to its store, in the background; and back at a start.

Nothing here waits for the network but `close` and `pull`. While the store is away, files wait in
the spool: the logs, which grow on, and for each kind of checkpoint the newest that was submitted.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tqdm import tqdm

from txl_jax import run_folder, storage
from txl_jax.store import PATIENCE, Store, patiently

Job = Callable[[Callable[[], bool]], None]
"""What brings some files to the store; its argument tells whether it is wanted no more."""

_LONGEST_PAUSE = 30.0
_PAUSE_AT_THE_END = 1.0
_PATIENCE_AFTER_AN_ERROR = 10.0
_GRACE = 1.0
"""Seconds; who is about nothing ends much sooner."""
_LONGEST_CALL = 30.0
"""Seconds; what is under way in a store that was stopped ends much sooner."""
_LOGS = "the logs"


@dataclass(eq=False)
class _Submitted:
    key: str
    what: str
    run: Job
    begun: bool = False
    """All logs that were written before it are in the store."""
    failures: int = 0
    dropped: bool = False
    told: bool = False
    """The job was told that it is wanted no more: what it returns then means nothing."""


class Mirror:
    """Keeps a store as its folder is; a context manager that closes it.

    One thread uploads logs, one does the jobs. A store that fails is asked again for ever, said
    once on standard error, and once more when it is back.
    """

    def __init__(self, store: Store, folder: Path, every: float = 10.0):
        """`every`: seconds between two looks at the logs."""
        self._store = store
        self._folder = folder
        self._every = every
        self._patterns: list[str] = []
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._uploading = threading.Lock()
        self._jobs: dict[str, _Submitted] = {}
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._bug: Exception | None = None
        self._health = _Health(folder)
        self._threads = [
            threading.Thread(target=work, name=f"mirror-{name}", daemon=True)
            for name, work in (("logs", self._keep_logs), ("jobs", self._do_jobs))
        ]
        for thread in self._threads:
            thread.start()

    def watch(self, *patterns: str) -> None:
        """Uploads the files of these names or globs, now and whenever they have changed.

        They may be appended to, replaced or deleted at any time; what is deleted stays in the
        store.
        """
        with self._changed:
            self._patterns += patterns

    def submit(self, key: str, what: str, job: Job) -> None:
        """Has `job` done in the background, and all logs written so far uploaded before it.

        The job takes the place of an unfinished one of the same key, to which `cancelled()` says
        True from now on. It is tried until it returns without OSError, so it must bear being done
        again. `what` it brings is said if that never comes about.

        Raises what a job before this one raised that is no OSError.
        """
        with self._changed:
            self._raise_bug()
            if old := self._jobs.pop(key, None):
                old.dropped = True
            self._jobs[key] = _Submitted(key, what, job)
            self._changed.notify_all()

    def pending(self) -> list[str]:
        """What is not in the store yet: the jobs' `what`, and the names of logs."""
        with self._changed:
            return [job.what for job in self._jobs.values()] + [
                name for name, _ in self._changed_logs()
            ]

    def close(self, patience: float) -> list[str]:
        """Waits at most `patience` seconds until all is in the store, and ends both threads.

        What is under way then is given up, which can take some seconds more, and the store is
        stopped. Closing twice is the same as once.

        Returns what is not in the store, as `pending`. Raises as `submit`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or not self.pending(), patience)
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_GRACE)
        if any(thread.is_alive() for thread in self._threads):
            self._store.stop()
            for thread in self._threads:
                thread.join(_LONGEST_CALL)
        self._raise_bug()
        return self.pending()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes with little patience, unless that was done; what is left is said."""
        if self._stopped:
            return
        try:
            left = self.close(_PATIENCE_AFTER_AN_ERROR)
        except Exception as bug:
            if error is None:
                raise
            error.add_note(f"besides, {bug!r}")
        else:
            if left:
                _say(f"only in {self._folder}: {', '.join(left)}")

    def _raise_bug(self) -> None:
        if self._bug:
            bug, self._bug = self._bug, None
            raise bug

    def _keep_logs(self) -> None:
        while not self._stopped:
            try:
                self._upload_logs()
            except OSError:
                pass  # said already; the next look comes soon enough
            except Exception as bug:
                self._bug = bug
            self._pause(self._every)

    def _upload_logs(self) -> None:
        with self._uploading:
            for name, state in self._changed_logs():
                try:
                    self._store.upload(name, self._folder / name)
                except OSError as error:
                    if not (self._folder / name).exists():
                        continue
                    self._fails(_LOGS, error)
                    raise
                self._uploaded[name] = state
            self._health.works(_LOGS)

    def _changed_logs(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names of the watched files that the store does not have as they are, and their state."""
        paths = {path for pattern in list(self._patterns) for path in self._folder.glob(pattern)}
        for path in sorted(paths):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            name, state = path.relative_to(self._folder).as_posix(), _state(status)
            if not name.endswith(storage.DRAFT) and self._uploaded.get(name) != state:
                yield name, state

    def _do_jobs(self) -> None:
        while job := self._next_job():
            try:
                if not job.begun:
                    self._upload_logs()
                job.begun = True
                job.run(lambda job=job: self._unwanted(job))
            except OSError as error:
                self._failed(job, error)
            except Exception as bug:
                self._bug = bug
                self._done(job)
            else:
                if not job.told:
                    self._health.works(job.key)
                    self._done(job)

    def _next_job(self) -> _Submitted | None:
        """The job whose turn it is, when there is one; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._jobs)
            return None if self._stopped else next(iter(self._jobs.values()))

    def _unwanted(self, job: _Submitted) -> bool:
        job.told = job.told or job.dropped or self._stopped
        return job.told

    def _done(self, job: _Submitted) -> None:
        with self._changed:
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]
            self._changed.notify_all()

    def _failed(self, job: _Submitted, error: OSError) -> None:
        self._fails(job.key, error)
        job.failures += 1
        with self._changed:
            if self._jobs.get(job.key) is job:
                self._jobs[job.key] = self._jobs.pop(job.key)  # now it is the others' turn
        self._pause(random.uniform(0, min(_LONGEST_PAUSE, 2.0 ** min(job.failures, 10))))

    def _fails(self, source: str, error: OSError) -> None:
        if not self._stopped:
            self._health.fails(source, error)

    def _pause(self, seconds: float) -> None:
        """Wakes `close` to see what there is now; while that waits, nobody pauses for long."""
        with self._changed:
            self._changed.notify_all()
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, seconds)
            else:
                seconds = min(seconds, random.uniform(0, _PAUSE_AT_THE_END))
                self._changed.wait_for(lambda: self._stopped, seconds)


class _Health:
    """Says when the store fails for the first time, and when all that failed has gone well."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._failing: set[str] = set()
        self._since = 0.0
        self._lock = threading.Lock()

    def fails(self, source: str, error: OSError) -> None:
        with self._lock:
            if not self._failing:
                self._since = time.monotonic()
                _say(f"S3 is away ({error}): training goes on, files wait in {self._folder}")
            self._failing.add(source)

    def works(self, source: str) -> None:
        with self._lock:
            if source in self._failing:
                self._failing.remove(source)
                if not self._failing:
                    _say(f"S3 is back after {time.monotonic() - self._since:.0f} s")


def pull(store: Store, folder: Path, names: Iterable[str], patience: float = PATIENCE) -> None:
    """Brings files of the run in `store` to its spool `folder`, for a start; others stay.

    What the store holds replaces what is there. But where a file of the spool is the store's with
    more at its end, as a log is that was written while the store was away, it stays. If the store
    has no run, nothing is done: what the spool holds of one has not reached the store yet.

    Raises UserError if the store refuses, or is away for `patience` seconds, and OSError if the
    folder cannot be written.
    """

    def read() -> dict[str, bytes]:
        found = {}
        for name in (run_folder.CONFIG, *names):
            try:
                found[name] = store.read(name)
            except FileNotFoundError:
                if name == run_folder.CONFIG:
                    break
        return found

    for name, content in patiently(read, patience).items():
        path = folder / name
        if not (path.exists() and path.read_bytes().startswith(content)):
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(path, content)


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _say(line: str) -> None:
    """Prints above the progress bar, if there is one."""
    tqdm.write(line, file=sys.stderr)
