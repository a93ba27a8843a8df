"""Signs of life of a run's processes: heartbeats/P.json in the run's folder, for each process P.

    {"step": 500, "loss": 3.2, "tokens_per_s": 61000.0, "own_ms": 9.8, "time": 1767322984.1,
     "host": "ip-10-0-0-7"}

`time` is in seconds since 1970. `loss` (nats, from process 0 only), `tokens_per_s` and `own_ms`
(`own_speed.py`; of several processes only) are those of the last log line; null: there was none
yet, or the loss is not finite. Files are replaced, at most
every 15 s, while steps are made and texts evaluated. Whoever looks after a host stops it when they
stay as they are.
"""

import json
import math
import socket
import time
from pathlib import Path
from typing import Any

from txl_jax import storage
from txl_jax.errors import UserError

FOLDER = "heartbeats"
SECONDS = 15.0
"""From one sign to the next, at least."""


class Heartbeat:
    """The signs of one process.

    Methods raise UserError when the file cannot be written.
    """

    def __init__(self, logdir: Path, process: int, step: int | None = None):
        """`step`: optimizer steps made before; None: as many as the last sign says."""
        self._path = logdir / FOLDER / f"{process}.json"
        earlier = self._earlier()
        self._step: int = earlier.get("step", 0) if step is None else step
        self._loss: float | None = earlier.get("loss")
        self._speed: float | None = earlier.get("tokens_per_s")
        self._own: float | None = earlier.get("own_ms")
        self._shown = -math.inf

    def measured(self, loss: float | None, tokens_per_s: float, own_ms: float | None) -> None:
        """Takes in what a log line says; the loss is None where it is another process's to tell."""
        self._loss = loss if loss is not None and math.isfinite(loss) else None
        self._speed, self._own = tokens_per_s, own_ms

    def advance(self) -> None:
        """Counts a step, and shows a sign if the last one is old enough."""
        self._step += 1
        self.work_on()

    def work_on(self) -> None:
        """Shows a sign if the last one is old enough, without a step: in a long evaluation."""
        if time.monotonic() - self._shown >= SECONDS:
            self.show()

    def show(self) -> None:
        """Shows a sign."""
        sign = {
            "step": self._step,
            "loss": self._loss,
            "tokens_per_s": self._speed,
            "own_ms": self._own,
            "time": time.time(),
            "host": socket.gethostname(),
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_text(self._path, json.dumps(sign, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror or error}; mend that and give the "
                "same command again: the run goes on from its last checkpoint"
            ) from error
        self._shown = time.monotonic()

    def _earlier(self) -> dict[str, Any]:
        try:
            sign = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return sign if isinstance(sign, dict) else {}
