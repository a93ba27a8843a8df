"""Looks after a run until it has finished: what is lost is replaced, and trainers start again.

look → verdict → recovery, over and over. A recovery goes on beside further looks, so that a `kill`,
a budget or the end of the run is seen in the midst of it. Nothing has to be remembered here: a
watcher that is killed is followed by another one (`lease.py`, `watch_book.py`).
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.text import Text

from launcher import ec2, hardware, inquiry, record, verdict, watch_book
from launcher.aws import Account
from launcher.hold import Superseded
from launcher.inquiry import Answer
from launcher.lease import Lease, Lost
from launcher.look import Look, look
from launcher.recovery import Recovery, TooDear
from launcher.verdict import Do, Limits, Verdict
from launcher.watch_book import Event
from txl_jax.errors import UserError
from txl_jax.story import INTERRUPTIONS

LOOK_SECONDS = 10.0
_PRICE_SECONDS = 300.0
"""After which the prices of spot hosts are asked for again."""
_FULL_SECONDS = 60.0
"""After which zones without room are asked again."""
_OTHERS_SECONDS = 300.0
"""For which another command that drives the hosts is left alone."""


def check(account: Account, bucket: str, name: str, limits: Limits) -> None:
    """Raises UserError if the run is not known, has no hosts, or costs more an hour than it may."""
    seen = look(account, bucket, name)
    verdict.check_price(seen, limits)
    verdict.check_known(seen, watch_book.read(account, bucket, name)[0])


def watch(
    account: Account,
    bucket: str,
    name: str,
    limits: Limits,
    private_ip: bool,
    console: Console,
) -> int:
    """Exit status: 0 when the run has finished, 1 when a person or a budget has ended it."""

    def say(text: str) -> None:
        console.print(Text(f"{datetime.now(UTC):%H:%M:%S} {text}"), soft_wrap=True)

    while True:
        try:
            with Lease(account, bucket, name, say) as lease:
                say(f"looking after {name}")
                return _Watch(account, bucket, name, limits, private_ip, console, lease).run()
        except Lost as lost:
            say(str(lost))


@dataclass
class _Watch:
    """A watcher that holds the lease."""

    account: Account
    bucket: str
    name: str
    limits: Limits
    private_ip: bool
    console: Console
    lease: Lease
    _recovering: Future[None] | None = None
    _recovered: bool = False
    """The last recovery came to its end."""
    _failed: str = ""
    """Why it did not."""
    _wait_until: float = 0.0
    """By the monotonic clock: nothing is done before."""
    _prices: dict[str, float] = field(default_factory=dict)
    _priced_until: float = 0.0
    _said: str = ""
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def run(self) -> int:
        """Looks until there is nothing more to look after."""
        while True:
            with self._away():
                seen = look(self.account, self.bucket, self.name)
                seen = dataclasses.replace(seen, spot=self._spot_prices(seen))
                self.lease.update(
                    lambda book, seen=seen: book.with_hosts(
                        seen.run, seen.now, seen.status.seen, seen.spot
                    )
                )
                self._end_of_recovery()
                self._note_progress(seen)
                found = self._verdict(seen)
                if self._act(seen, found):
                    return found.status
            time.sleep(LOOK_SECONDS)

    def _spot_prices(self, seen: Look) -> dict[str, float]:
        """US dollars an hour of a host now, by zone; asked for every five minutes."""
        if time.monotonic() > self._priced_until:
            self._priced_until = time.monotonic() + _PRICE_SECONDS
            with contextlib.suppress(UserError):  # the last ones will do
                name = seen.record.config.cluster.instance_type
                self._prices = hardware.prices(
                    self.account, hardware.describe(self.account, name)
                ).spot
        return self._prices

    def _verdict(self, seen: Look) -> Verdict:
        """What to do; while a recovery is under way, nothing but what ends it."""
        book, launch = self.lease.book, seen.record.launch
        found = verdict.judge(seen, book, self.limits)
        failed, self._failed = self._failed, ""
        if found.do in (Do.END, Do.WIND_DOWN):
            return found
        if self._recovering or time.monotonic() < self._wait_until:
            return Verdict(Do.NOTHING)
        if found.do not in (Do.NOTHING, Do.ASK):
            return found
        if failed:
            return self._on_failure(seen, Answer("failed", failed))
        cut_off = book.interrupted(launch) and not self._recovered
        if found.do is Do.ASK or cut_off:
            ours = bool(cut_off) and seen.record.attempt == book.attempt
            if answer := inquiry.ask(self.account, seen, self.private_ip, ours):
                return self._on_failure(seen, answer)
        return Verdict(Do.NOTHING)

    def _on_failure(self, seen: Look, answer: Answer) -> Verdict:
        if not answer.kind:
            self._say(answer.why)
            return Verdict(Do.RECOVER, answer.why)
        decided = verdict.on_failure(seen, self.lease.book, self.limits, answer.why)
        self._note(seen, answer.kind, answer.why, answer.hosts)
        return dataclasses.replace(decided, ill=answer.ill)

    def _act(self, seen: Look, found: Verdict) -> bool:
        """Does what the verdict says; whether the watcher ends."""
        if found.do is Do.END:
            if seen.record.wish == record.END:
                self._recovery().release(seen)
            if seen.status.finished:
                self._note(seen, "finished", found.why)
            else:
                self._say_once(f"{self.name}: {found.why}")
            # A recovery that is under way may rent a host until it learns that it is over.
            return not self._recovering
        if found.do is Do.WIND_DOWN:
            self._recovery().wind_down(seen)
            self._note(seen, "budget", found.why)
            if self._recovering:
                wait([self._recovering], _OTHERS_SECONDS)
                self._recovery().release(look(self.account, self.bucket, self.name))
            return True
        if found.do is Do.WAIT:
            self._say_once(f"{self.name}: {found.why}")
        if found.do is Do.RECOVER:
            self._said, self._recovered = "", False
            if found.lost:
                self._note(seen, "preempted", found.why, tuple(h.index for h in found.lost))
                self.lease.update(lambda book: book.giving_up(*found.lost))
            self._recovering = self._threads.submit(self._recovery().recover, seen, found.ill)
        return False

    def _end_of_recovery(self) -> None:
        """Takes in how the recovery ended, if it did."""
        if not self._recovering or not self._recovering.done():
            return
        done, self._recovering = self._recovering, None
        try:
            done.result()
            self._recovered = True
            self._say("trainers started")
        except (ec2.Full, TooDear) as error:
            self._say_once(f"{error}; asking again every {_FULL_SECONDS:.0f} s")
            self._wait_until = time.monotonic() + _FULL_SECONDS
        except record.Taken:
            return  # the next look sees what was written
        except Superseded as error:
            self._say(str(error))
            self._wait_until = time.monotonic() + _OTHERS_SECONDS
        except Lost:
            raise
        except UserError as error:
            self._failed = str(error)

    def _note_progress(self, seen: Look) -> None:
        """Writes down that training goes on after an interruption."""
        interrupted = self.lease.book.interrupted(seen.record.launch)
        last = seen.status.seen
        if not interrupted or not last or last <= interrupted.time or self._recovering:
            return
        lost = last - (interrupted.since or interrupted.time)
        text = f"training goes on after step {seen.status.step}"
        self._note(seen, "restarted", text, lost=lost)

    def _note(
        self,
        seen: Look,
        kind: str,
        text: str,
        hosts: tuple[int, ...] = (),
        lost: timedelta | None = None,
    ) -> None:
        event = Event(
            time=seen.now,
            kind=kind,
            text=text,
            launch=seen.record.launch,
            hosts=hosts,
            step=seen.status.step,
            lost_seconds=lost.total_seconds() if lost else None,
            since=seen.status.seen if kind in INTERRUPTIONS else None,
        )
        self.lease.update(lambda book: book.with_event(event))
        self._say(f"{kind}: {text}" + (f"; {lost.total_seconds():.0f} s lost" if lost else ""))

    def _recovery(self) -> Recovery:
        return Recovery(
            self.account,
            self.bucket,
            self.name,
            self.lease,
            self.limits,
            self.private_ip,
            self.console,
            self._say,
            lambda seen, why: self._note(seen, "moved", f"to another zone: {why}"),
        )

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        """AWS may be away for a while: the hosts train on meanwhile."""
        try:
            yield
        except Lost:
            raise
        except UserError as error:
            self._say_once(f"{error}; looking again")

    def _say(self, text: str) -> None:
        self.console.print(Text(f"{datetime.now(UTC):%H:%M:%S} {text}"), soft_wrap=True)

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)
