"""Hosts that are slower than the others of their run, by what every process tells in S3.

All hosts take the same time for a step, as they wait for the slowest. What differs is the time of a
small computation that each makes by itself (`txl_jax/own_speed.py`).
"""

import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from launcher import objects
from launcher.aws import Account
from launcher.names import printable
from launcher.runs import Run
from txl_jax.heartbeat import FOLDER
from txl_jax.json_values import mapping, number, text

_RATIO = 1.2
_FRESH = timedelta(minutes=2)
_DOWNLOADS = 16


@dataclass(frozen=True)
class SlowHost:
    """A host that takes more than 1.2 times what the median of all hosts takes."""

    host: int | str
    """Its number in the run, or what it calls itself where no host of the run has its address."""
    ratio: float


def find(account: Account, bucket: str, run: Run) -> tuple[SlowHost, ...]:
    """The slow hosts of a run, the slowest first; of those that have told within two minutes."""
    told = objects.written(account, bucket, f"runs/{run.name}/{FOLDER}/")
    newest = max(told.values(), default=None)
    keys = [key for key, time in told.items() if newest and newest - time < _FRESH]
    with ThreadPoolExecutor(_DOWNLOADS) as threads:
        signs = list(threads.map(lambda key: objects.read_json(account, bucket, key), keys))
    of_host: defaultdict[str, float] = defaultdict(float)
    for sign in map(mapping, signs):
        own = number(sign.get("own_ms"))
        if own is not None and own > 0:
            name = text(sign.get("host"))
            of_host[name] = max(of_host[name], own)
    if not of_host:
        return ()
    usual = statistics.median_low(of_host.values())  # of two, the faster one
    numbers = {"ip-" + host.private_ip.replace(".", "-"): host.index for host in run.hosts}
    slow = [
        SlowHost(numbers.get(name, printable(name)), own / usual)
        for name, own in of_host.items()
        if own > _RATIO * usual
    ]
    return tuple(sorted(slow, key=lambda host: -host.ratio))
