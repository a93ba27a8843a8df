"""Brings a run's files from its spool to its store, in the background; and back at a start.

Nothing here waits for the network but `close` and `pull`. While the store is away, files wait in
the spool: the logs, which grow on, and for each kind of checkpoint the newest that was submitted.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from tqdm import tqdm

from txl_jax import run_folder, storage
from txl_jax.store import PATIENCE, Store, StoreAway, StoreRefused, patiently

Job = Callable[[Callable[[], bool]], None]
"""What brings some files to the store; its argument tells whether it is wanted no more."""

_LONGEST_PAUSE = 30.0
_PAUSE_AT_THE_END = 1.0
_LITTLE_PATIENCE = 8.0
"""Seconds, for an end before its time: a run that a signal stops has to be gone within 20 s."""
_NOTICE_PATIENCE = 90.0
"""Seconds, for a step that is going up meanwhile: what the two minutes of a spot notice leave."""
_LAST_PATIENCE = 3.0
"""Seconds, for an end at once."""
_LONGEST_CALL = 10.0
"""Seconds; what is under way in a store that was stopped ends sooner, if S3 is all it waits for."""
_POLL = 0.5
_LOGS = "the logs"


class _Failure(NamedTuple):
    kind: type[OSError]
    begins: str
    ends: str


_FAILURES = (
    _Failure(StoreAway, "S3 is away", "S3 is back"),
    _Failure(StoreRefused, "S3 refuses", "S3 takes files again"),
    _Failure(OSError, "cannot upload", "uploads go on"),
)
"""What is said of an error: the first that fits."""


@dataclass(eq=False)
class _Submitted:
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

    One thread uploads logs, and one for each key does the jobs of that key, so that none waits for
    another's. What fails is tried again for ever, said once on standard error, and once more when
    all goes well again.
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
        self._threads: dict[str, threading.Thread] = {}

    def watch(self, *patterns: str, later: Collection[str] = ()) -> None:
        """Uploads the files of these names or globs, and again whenever they have changed.

        They may be appended to, replaced or deleted at any time; what is deleted stays in the
        store. Those named in `later` are uploaded too, but not as they are now.
        """
        with self._changed:
            for name in later:
                with suppress(FileNotFoundError):
                    self._uploaded[name] = _state((self._folder / name).stat())
            self._patterns += (*patterns, *later)
            self._have_thread(_LOGS, self._keep_logs)

    def submit(self, key: str, what: str, job: Job) -> None:
        """Has `job` done in the background, and all logs written so far uploaded before it.

        The job takes the place of an unfinished one of the same key, which does not begin any more,
        or to which `cancelled()` says True from now on. It is tried until it returns without
        OSError, so it must bear being done again. Jobs of different keys are done side by side.
        `what` it brings is said if that never comes about.

        Raises what a job before this one raised that is no OSError.
        """
        with self._changed:
            self._raise_bug()
            if old := self._jobs.pop(key, None):
                old.dropped = True
            self._jobs[key] = _Submitted(what, job)
            self._changed.notify_all()
            self._have_thread(key, lambda: self._do_jobs(key))

    def pending(self) -> list[str]:
        """What is not in the store yet: the jobs' `what`, and the names of logs."""
        with self._changed:
            return [job.what for job in self._jobs.values()] + [
                name for name, _ in self._changed_logs()
            ]

    def close(self, patience: float, stopped: Collection[object] = ()) -> list[str]:
        """Waits at most `patience` seconds until all is in the store, and ends all threads.

        From when there is something in `stopped`, as signals may put there, it waits 8 s at most;
        where checkpoints are still going up and nothing fails, 90 s, and says so. What is under way
        then is given up, which takes some seconds more, and the store is stopped. Closing twice is
        the same as once.

        Returns what is not in the store, as `pending`. Raises as `submit`.
        """
        self._wait(patience, stopped)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self.pending():
            self._store.stop()
        deadline = time.monotonic() + _LONGEST_CALL
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._raise_bug()
        return self.pending()

    def leave(self) -> None:
        """Before an end of the process that waits for nobody: what is left after 3 s is said.

        Another thread may be using the mirror, or have closed it: then nothing is done.
        """
        if not self._stopped:
            self._wait(_LAST_PATIENCE)
            self._say_left(self.pending())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes with little patience, unless that was done; what is left is said."""
        if self._stopped:
            return
        try:
            left = self.close(_LITTLE_PATIENCE)
        except Exception as bug:
            if error is None:
                raise
            error.add_note(f"besides, {bug!r}")
        else:
            self._say_left(left)

    def _wait(self, patience: float, stopped: Collection[object] = ()) -> None:
        """The first part of `close`."""
        begun, said = time.monotonic(), False
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while not self._stopped and self.pending():
                limit, waited = patience, time.monotonic() - begun
                if stopped:
                    going_up = [job.what for job in self._jobs.values()]
                    limit = min(patience, _LITTLE_PATIENCE)
                    if going_up and not self._health.failing:
                        limit = min(patience, _NOTICE_PATIENCE)
                    if _LITTLE_PATIENCE < waited < limit and not said:
                        said = True
                        _say(
                            f"{', '.join(going_up)}: still going up; waiting for at most "
                            f"{limit - waited:.0f} s more"
                        )
                if waited >= limit:
                    break
                self._changed.wait(min(limit - waited, _POLL))

    def _say_left(self, left: list[str]) -> None:
        if left:
            _say(f"only in {self._folder}: {', '.join(left)}")

    def _have_thread(self, name: str, work: Callable[[], None]) -> None:
        """Starts the thread of that name, unless there is one."""
        if name not in self._threads:
            thread = threading.Thread(target=work, name=f"mirror-{name}", daemon=True)
            self._threads[name] = thread
            thread.start()

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

    def _do_jobs(self, key: str) -> None:
        while job := self._next_job(key):
            try:
                if not job.begun:
                    self._upload_logs()
                    job.begun = True
                if not self._unwanted(job):  # a newer one may have come meanwhile
                    job.run(lambda job=job: self._unwanted(job))
            except OSError as error:
                self._fails(key, error)
                job.failures += 1
                longest = min(_LONGEST_PAUSE, 2.0 ** min(job.failures, 10))
                self._pause(random.uniform(0, longest))
            except Exception as bug:
                self._bug = bug
                self._done(key, job)
            else:
                if not job.told:
                    self._health.works(key)
                    self._done(key, job)

    def _next_job(self, key: str) -> _Submitted | None:
        """The newest job, when there is one; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or key in self._jobs)
            return None if self._stopped else self._jobs[key]

    def _unwanted(self, job: _Submitted) -> bool:
        job.told = job.told or job.dropped or self._stopped
        return job.told

    def _done(self, key: str, job: _Submitted) -> None:
        with self._changed:
            if self._jobs.get(key) is job:
                del self._jobs[key]
            self._changed.notify_all()

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
    """Says what fails, once each, and when all that failed has gone well."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._failing: set[str] = set()
        self._said: list[_Failure] = []
        self._since = 0.0
        self._lock = threading.Lock()

    def fails(self, source: str, error: OSError) -> None:
        with self._lock:
            if not self._failing:
                self._since = time.monotonic()
            self._failing.add(source)
            failure = next(failure for failure in _FAILURES if isinstance(error, failure.kind))
            if failure not in self._said:
                self._said.append(failure)
                where = f"training goes on, files wait in {self._folder}"
                _say(f"{failure.begins} ({error}): {where}")

    @property
    def failing(self) -> bool:
        """Whether something fails now."""
        return bool(self._failing)

    def works(self, source: str) -> None:
        with self._lock:
            if source in self._failing:
                self._failing.remove(source)
                if not self._failing:
                    seconds = time.monotonic() - self._since
                    _say(f"{self._said[-1].ends} after {seconds:.0f} s")
                    self._said.clear()


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
