"""What a run tells of itself in S3: how far it is, how fast, and when it was last seen.

    runs/NAME/heartbeats/P.json    a sign of life of process P
    runs/NAME/metrics.jsonl        everything that was logged
    runs/NAME/results.json         only there when the run has finished

Whoever may write to the bucket may have written these: what is not of the right form is left out.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from launcher import objects
from launcher.aws import Account
from txl_jax.heartbeat import FOLDER as HEARTBEATS
from txl_jax.json_values import number, parse
from txl_jax.story import METRICS, RESULTS

_END_BYTES = 1 << 16
"""As much of the metrics as is read: hundreds of log lines."""


@dataclass(frozen=True)
class Status:
    """How a run goes; None: it has not told yet."""

    step: int | None = None
    """Optimizer steps."""
    loss: float | None = None
    """Of the last log line, in nats for each token."""
    tokens_per_s: float | None = None
    """Of the last log line, over all hosts."""
    seen: datetime | None = None
    """When any of its processes last showed that it makes steps."""
    finished: bool = False


def read(account: Account, bucket: str, name: str) -> Status:
    """The status of a run; an empty one if there is nothing in S3."""
    folder = f"runs/{name}"
    known = _written(account, bucket, folder)
    seen = [time for key, time in known.items() if key.startswith(f"{HEARTBEATS}/")]
    sign = objects.read_json(account, bucket, f"{folder}/{HEARTBEATS}/0.json")
    sign = sign if isinstance(sign, dict) else {}
    logged = {}
    if sign.get("loss") is None and METRICS in known:
        logged = _last_logged(objects.read(account, bucket, f"{folder}/{METRICS}", _END_BYTES))
    step = number(sign.get("step", logged.get("step")))
    return Status(
        step=None if step is None else int(step),
        loss=number(sign.get("loss") or logged.get("learning/loss")),
        tokens_per_s=number(sign.get("tokens_per_s") or logged.get("times/tokens_per_sec")),
        seen=max(seen, default=None),
        finished=RESULTS in known,
    )


def _written(account: Account, bucket: str, folder: str) -> dict[str, datetime]:
    """When these files of the run were written last, by name."""
    return {
        key.removeprefix(f"{folder}/"): time
        for name in (f"{HEARTBEATS}/", METRICS, RESULTS)
        for key, time in objects.written(account, bucket, f"{folder}/{name}").items()
    }


def _last_logged(content: bytes | None) -> dict[str, Any]:
    """The last lines of metrics.jsonl, laid over one another."""
    logged: dict[str, Any] = {}
    for line in (content or b"").splitlines():
        told = parse(line)
        if isinstance(told, dict):
            logged |= told
    return logged
