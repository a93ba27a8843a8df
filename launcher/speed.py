"""How fast an experiment was the last time that it ran on the same machines.

    throughput/CONFIG-TYPE-N.json    names of the latest runs of a config on N hosts of a type

The runs tell themselves: by their metrics, or where they did nothing but measure (--throughput), by
what host 0 has printed.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher import objects, record
from launcher.aws import Account
from launcher.names import is_run_name
from txl_jax.config import Config
from txl_jax.json_values import parse

_REMEMBERED = 5
"""Runs that are looked at, the latest first."""
_END_BYTES = 1 << 16
"""As much of a file as is read: hundreds of log lines."""


@dataclass(frozen=True)
class Speed:
    """A measured speed."""

    tokens_per_s: float
    """Over all hosts."""
    run: str
    """The run that it was measured in."""


def remember(account: Account, bucket: str, name: str, config: str, cfg: Config) -> None:
    """Notes that the run `name` is the latest one of a config on its machines."""
    earlier = [run for run in _runs(account, bucket, config, cfg) if run != name]
    runs = [name, *earlier][:_REMEMBERED]
    objects.write_json(account, bucket, _key(config, cfg), {"runs": runs})


def last_measured(account: Account, bucket: str, config: str, cfg: Config) -> Speed | None:
    """The speed of the latest run of the same experiment on the same machines; None: unknown."""
    for run in _runs(account, bucket, config, cfg):
        known, _ = record.read(account, bucket, run)
        if known and _what_matters(known.config) == _what_matters(cfg):
            speeds = list(_told(account, bucket, run, cfg.train.throughput))
            if speeds:
                return Speed(statistics.median(speeds), run)
    return None


def _key(config: str, cfg: Config) -> str:
    return f"throughput/{config}-{cfg.cluster.instance_type}-{cfg.cluster.machines}.json"


def _runs(account: Account, bucket: str, config: str, cfg: Config) -> list[str]:
    content = objects.read_json(account, bucket, _key(config, cfg))
    names = content.get("runs") if isinstance(content, dict) else None
    names = names if isinstance(names, list) else []
    return [name for name in names[:_REMEMBERED] if isinstance(name, str) and is_run_name(name)]


def _what_matters(cfg: Config) -> tuple[Any, ...]:
    """What of an experiment changes its speed on the same machines."""
    model = dataclasses.replace(cfg.model, n_token=0)  # the run may have been told by its corpus
    train = cfg.train
    return model, train.batch, train.accumulate, train.throughput, cfg.cluster


def _told(account: Account, bucket: str, run: str, throughput: bool) -> Iterator[float]:
    """Tokens a second, as far as the run has told them yet."""
    name = f"launches/{run}/output-0.txt" if throughput else f"runs/{run}/metrics.jsonl"
    for line in (objects.read(account, bucket, name, _END_BYTES) or b"").splitlines():
        told = parse(line)
        try:
            speed = told["tokens_per_s"]["median"] if throughput else told["times/tokens_per_sec"]
            if math.isfinite(speed) and speed > 0:
                yield float(speed)
        except (LookupError, OverflowError, TypeError, ValueError):
            continue  # a line of other things
