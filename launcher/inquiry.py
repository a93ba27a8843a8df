"""Why a run is silent: what its hosts say by SSH.

That a host does not answer means nothing as long as the run tells in S3 that it lives. Only when it
has been silent for long are the hosts given up that do not answer while others do.
"""

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from launcher import setup
from launcher.amounts import duration
from launcher.aws import Account
from launcher.look import Look
from launcher.reach import reached
from launcher.runs import Host, Run
from launcher.setup import Condition
from txl_jax.errors import RESTART_STATUS, UserError

_REACH_SECONDS = 30.0
STALLED = timedelta(minutes=10)
"""Without a sign of life, trainers that ran before stand still."""
NOT_BEGUN = timedelta(minutes=30)
"""The same for trainers that have not made a step yet: they may prepare token files."""
_SETTING_UP = timedelta(minutes=5)
"""A set-up by another command goes on if it has shown something since."""
_NOTICED = timedelta(minutes=4)
"""A trainer that asks for a restart may have had a notice: its host is gone by then."""


@dataclass(frozen=True)
class Answer:
    """Why trainers have to be started again."""

    kind: str
    """`failed` or `stalled`, as `story.KINDS`; empty: a recovery was cut off, and goes on."""
    why: str
    hosts: tuple[int, ...] = ()
    """Numbers of those that it is about."""
    ill: tuple[Host, ...] = ()
    """Those that do not answer and are given up."""


def ask(account: Account, seen: Look, private_ip: bool, ours: bool) -> Answer | None:
    """Asks the hosts of a run; None: nothing is to be done, or nothing is known.

    `ours`: no other command but watchers has driven the hosts since the last recovery.
    """
    hosts = seen.of_state("running")
    if not seen.run or len(hosts) != seen.machines:
        return None
    run = dataclasses.replace(seen.run, hosts=hosts)
    try:
        with reached(account, run, run.private(private_ip), _REACH_SECONDS) as connected:
            told = setup.conditions(connected)
    except UserError:
        return _on_silence(account, seen, run, private_ip)
    return judge(seen, told, ours)


def judge(seen: Look, told: list[Condition], ours: bool) -> Answer | None:
    """What the conditions of all hosts, in the order of their numbers, mean."""
    ended = {n: c.status for n, c in enumerate(told) if c.status is not None}
    if ended and set(ended.values()) != {0}:
        early = set(ended.values()) <= {0, RESTART_STATUS} and seen.silence < _NOTICED
        if early and not ours:
            return None
        first, status = next((n, status) for n, status in ended.items() if status)
        why = f"the trainer of host {first} has ended with status {status}"
        return Answer("" if early else "failed", why, tuple(ended))
    idle = tuple(n for n, c in enumerate(told) if not c.training and c.status is None)
    if idle:
        if ours:
            return Answer("", f"no trainer was started on {_named(idle)}", idle)
        if any(c.busy or 0 <= c.set_up < _SETTING_UP.total_seconds() for c in told):
            return None
        return Answer("failed", f"the set-up of {_named(idle)} stands still", idle)
    if len(ended) == len(told):
        return None
    age = timedelta(seconds=min((c.trainer for c in told if c.training), default=0))
    limit = STALLED if seen.status.seen and seen.now - seen.status.seen < age else NOT_BEGUN
    if seen.silence > limit and age > limit:
        why = f"the trainers have shown no sign of life for {duration(seen.silence)}"
        return Answer("stalled", why)
    return None


def _on_silence(account: Account, seen: Look, run: Run, private_ip: bool) -> Answer | None:
    """Hosts that do not answer while others do, after a long silence."""
    if seen.silence < STALLED:
        return None

    def answers(host: Host) -> bool:
        alone = dataclasses.replace(run, hosts=(host,))
        private = run.private(private_ip)
        with contextlib.suppress(UserError), reached(account, alone, private, _REACH_SECONDS):
            return True
        return False

    with ThreadPoolExecutor() as threads:
        answered = list(threads.map(answers, run.hosts))
    ill = tuple(host for host, there in zip(run.hosts, answered, strict=True) if not there)
    if not ill or not any(answered):
        return None  # we may be what is cut off
    numbers = tuple(host.index for host in ill)
    why = f"{_named(numbers)} did not answer, after {duration(seen.silence)} without a sign of life"
    return Answer("stalled", why, numbers, ill)


def _named(numbers: tuple[int, ...]) -> str:
    return f"host{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
