"""Where the files of a run are: a folder of this machine, and the store that it is a copy of."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from txl_jax import heartbeat, logs, results, run_folder
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

    def events(self) -> list[str]:
        """Names of the TensorBoard files that the store has of earlier starts."""
        store = self.store
        return patiently(lambda: store.names(logs.EVENTS)) if store else []

    @contextmanager
    def mirrored(self, primary: bool) -> Iterator[Mirror | None]:
        """Uploads in the background what is written in the folder; waits for it at the end.

        Process 0 uploads the run's own files, each process its heartbeat. What checkpoints upload,
        they say themselves.

        Raises UserError if the store does not come back in time: the files are in the folder.
        """
        if self.store is None:
            yield None
            return
        with Mirror(self.store, self.folder) as mirror:
            mirror.watch(f"{heartbeat.FOLDER}/*.json")
            if primary:
                mirror.watch(*_REPLACED, *_GROWING, f"{logs.EVENTS}*")
            yield mirror
            if left := mirror.close(_PATIENCE):
                raise UserError(
                    f"S3 did not come back; only in {self.folder}: {', '.join(left)}; give the "
                    "same command again when it is back"
                )
