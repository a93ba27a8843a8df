"""Where the files of a run are: a folder of this machine, and the store that it is a copy of."""

import os
import socket
import sys
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from txl_jax import heartbeat, logs, results, run_folder
from txl_jax.checkpoint_reader import Gather
from txl_jax.distributed import name_of
from txl_jax.errors import UserError
from txl_jax.mirror import Mirror, pull
from txl_jax.store import Store, check_store, is_remote, local_folder, open_store, patiently
from txl_jax.trained import VOCAB

_REPLACED = (run_folder.CONFIG, run_folder.STARTS, run_folder.IMPORTED, VOCAB, results.FILE)
_GROWING = (logs.METRICS, logs.SAMPLES)
_PATIENCE = 900.0
"""Seconds for which the end of a run waits for a store that is away."""


class Home:
    """The files of a run whose `--logdir` is a folder, or s3://BUCKET/FOLDER.

    Raises UserError for a malformed URL.
    """

    def __init__(self, logdir: str):
        self.logdir = logdir
        self.folder: Path = local_folder(logdir)
        self.store: Store | None = open_store(logdir) if is_remote(logdir) else None
        """None: the folder is where the files are kept."""

    def bring(self) -> None:
        """Brings what the run has left in the store to the folder; process 0 does it, at a start.

        Raises UserError if the store refuses, or is away for long.
        """
        if self.store:
            check_store(self.store)
            with run_folder.writable(self.folder):
                pull(self.store, self.folder, (*_REPLACED, *_GROWING))

    def check_shared(self, gather: Gather, primary: bool, patience: float = 10.0) -> None:
        """Sees that all processes have the same folder, where there is no store.

        Process 0 writes a file there, and the others look for it: for `patience` seconds, as the
        names in a folder may be cached.

        Raises UserError, in all of them, if one does not see it.
        """
        if self.store:
            return
        trial = self.folder / gather("trial", f"{run_folder.TRIAL}{uuid.uuid4().hex}")[0]
        if primary:
            with run_folder.writable(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                trial.touch()
        gather("trial is there", "")
        found = gather("trial is seen", "" if _appears(trial, patience) else socket.gethostname())
        if primary:
            trial.unlink(missing_ok=True)
            with suppress(OSError):  # there is a run in it already
                self.folder.rmdir()
        if blind := [name_of(number, host) for number, host in enumerate(found) if host]:
            raise UserError(
                f"--logdir {self.logdir} is not the same folder on all hosts: {', '.join(blind)} "
                "cannot see what process 0 writes there; use a shared disk or s3://BUCKET/FOLDER"
            )

    def events(self) -> list[str]:
        """Names of the TensorBoard files that the store has of earlier starts."""
        store = self.store
        return patiently(lambda: store.names(logs.EVENTS)) if store else []

    @contextmanager
    def mirrored(self, process: int, stopped: Collection[object] = ()) -> Iterator[Mirror | None]:
        """Uploads in the background what is written in the folder; waits for it at the end.

        Process 0 uploads the run's own files, each process its heartbeat. What checkpoints upload,
        they say themselves. If there is something in `stopped`, as `caught_signals` puts there, the
        end waits as `Mirror.close` says, and tells what is only in the folder.

        Raises UserError if the store does not come back in time otherwise.
        """
        if self.store is None:
            yield None
            return
        with Mirror(self.store, self.folder) as mirror:
            own = (*_REPLACED, *_GROWING, f"{logs.EVENTS}*") if process == 0 else ()
            # Signs that lie here are of earlier starts: who looks into the store would take its own
            # for a new one, and those of processes that are on other hosts now for theirs.
            mirror.watch(*own, later=[f"{heartbeat.FOLDER}/{process}.json"])
            yield mirror
            if left := mirror.close(_PATIENCE, stopped):
                only = f"S3 has not got everything; only in {self.folder}: {', '.join(left)}"
                if not stopped:
                    raise UserError(f"{only}; give the same command again when S3 takes files")
                goes_on = "the same command goes on from what S3 has"
                print(f"{only}; {goes_on}", file=sys.stderr, flush=True)


def _appears(path: Path, patience: float) -> bool:
    """Whether a file is there after at most `patience` seconds."""
    deadline = time.monotonic() + patience
    # A folder's listing is newer than what was once not found under a name.
    while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
