"""Has all hosts of a run stand again, and trainers at work on them from the last checkpoint.

Every step may be cut off, and be done again by another watcher: what is asked of EC2 follows from
how many hosts the launch has had, so that the same request is made until its outcome is seen.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from launcher import again, ec2, hardware, plan, record, runs, setup, standing, verdict
from launcher.aws import Account
from launcher.hold import Hold
from launcher.lease import Lease
from launcher.look import Look
from launcher.on_host.keeper import KEEP
from launcher.order import order_of
from launcher.reach import reached
from launcher.record import Record
from launcher.runs import Host, Run
from launcher.verdict import Limits
from txl_jax.errors import UserError

_DRY_SECONDS = 60.0
"""For which a zone is asked again for the hosts that are missing, before the run moves."""
_AGAIN_SECONDS = 10.0
_SHORT = 60.0


class TooDear(UserError):
    """Further hosts would cost more an hour than they may."""


@dataclass(frozen=True)
class Recovery:
    """What recovering a run takes."""

    account: Account
    bucket: str
    name: str
    lease: Lease
    limits: Limits
    private_ip: bool
    console: Console
    say: Callable[[str], None]
    moved: Callable[[Look, str], None]
    """Is told of a run that leaves its zone, and why."""

    def recover(self, seen: Look, ill: tuple[Host, ...]) -> None:
        """Replaces what is lost, `ill` hosts too, and starts all trainers again.

        Raises ec2.Full if no zone has room, TooDear if hosts would cost too much: nothing runs
        then. Superseded or Lost: another command or watcher goes on. UserError if hosts cannot be
        prepared, or are lost meanwhile: those that stand stay.
        """
        known = dataclasses.replace(seen.record, wish=record.TRAIN)
        hold = self._take_hold(seen, known)
        if ill:
            self._terminate(ill)
            seen = seen.without(ill)
        run = self._whole(seen, hold)
        self.lease.check()
        self._train(run, known, hold)

    def wind_down(self, seen: Look) -> None:
        """Has trainers save, as far as hosts answer, and ends all hosts; those on demand stop."""
        spot = any(host.spot for host in seen.alive)
        known = dataclasses.replace(seen.record, wish=record.END if spot else record.STOP)
        self._take_hold(seen, known)
        running = seen.of_state("running")
        if running and seen.run:
            run = dataclasses.replace(seen.run, hosts=running)
            try:
                with reached(self.account, run, run.private(self.private_ip)) as hosts:
                    setup.stop_trainer(hosts)
            except UserError as error:
                self.say(f"{error}; what was trained since the last checkpoint is lost")
        self.release(seen)

    def release(self, seen: Look) -> None:
        """Terminates the hosts; those on demand stop where the run has not been ended."""
        # A recovery may have rented some since the book was written last.
        self.lease.update(
            lambda book: book.with_hosts(seen.run, seen.now, seen.status.seen, seen.spot)
        )
        if seen.record.wish == record.END or any(host.spot for host in seen.alive):
            self._terminate(seen.alive)
        else:
            ec2.stop(self.account, seen.alive)

    def _take_hold(self, seen: Look, known: Record) -> Hold:
        hold = again.take_hold(self.account, self.bucket, self.name, known, seen.version)
        self.lease.update(lambda book: dataclasses.replace(book, attempt=hold.attempt))
        return hold

    def _whole(self, seen: Look, hold: Hold) -> Run:
        """All hosts, running: what is missing beside the others, or all in another zone."""
        if stopped := seen.of_state("stopped"):
            self._start_again(stopped, seen)
        missing = [n for n in range(seen.machines) if n not in {h.index for h in seen.alive}]
        missing = [n for n in missing if n not in {h.index for h in stopped}]
        there = [host.instance_id for host in (*seen.alive, *stopped)]
        if not missing:
            return ec2.wait_for(self.account, self.name, there, "running")
        order = self._order(seen)
        if there:
            zone = (*seen.alive, *stopped)[0].zone
            order = self._capped(order, seen, len(missing))
            try:
                new, why = self._fill(order, zone, missing, hold)
            except ec2.Quota as quota:
                # The hosts that were lost a moment ago may count yet.
                self.say(f"{quota}: waiting until the lost hosts are terminated")
                ec2.until_terminated(self.account, seen.of_state("shutting-down", "terminated"))
                new, why = self._fill(order, zone, missing, hold)
            if len(new) == len(missing):
                return ec2.wait_for(self.account, self.name, [*there, *new], "running")
            self.moved(seen, why)
            self._end_all(seen)
            others = tuple(z for z in order.zones if z != zone)
            order = dataclasses.replace(order, zones=(*others, zone))
            seen = seen.without(seen.standing)
        order = self._capped(order, seen, seen.machines)
        ec2.until_terminated(self.account, seen.of_state("shutting-down"))  # quotas count them
        return ec2.start(self.account, order, self.say, lambda: not hold.lost())

    def _start_again(self, stopped: tuple[Host, ...], seen: Look) -> None:
        """Hosts for which their zone has no room any more are given up."""
        try:
            ec2.start_again(self.account, stopped, seen.status.seen)
        except ec2.Full:
            self._terminate(stopped)
            raise

    def _fill(
        self, order: ec2.Order, zone: str, missing: list[int], hold: Hold
    ) -> tuple[list[str], str]:
        """Ids of the hosts of these numbers, as far as the zone has room; and why it has not."""
        new: dict[int, str] = {}
        why, deadline = "", time.monotonic() + _DRY_SECONDS
        if zone not in order.zones:
            return [], f"{zone} costs too much now"
        while True:
            for number in missing:
                hold.check()
                self.lease.check()
                had = self.lease.book.had(order.launch, number)
                one = dataclasses.replace(order, number=number, round=had)
                try:
                    if number not in new:
                        new[number] = ec2.start_one(self.account, one, zone, self.say)
                except ec2.Full as full:
                    why = str(full)
                    break
            if len(new) == len(missing) or time.monotonic() > deadline:
                return list(new.values()), why
            time.sleep(_AGAIN_SECONDS)

    def _end_all(self, seen: Look) -> None:
        """Terminates what stands, and waits for it: no more hosts stand than are needed."""
        for run in runs.find(self.account, self.name, all_users=True):
            if run.launch == seen.record.launch:
                self.lease.update(lambda book, run=run: book.with_hosts(run, seen.now, None))
                self._terminate(run.hosts)
                ec2.until_terminated(self.account, run.hosts)

    def _terminate(self, hosts: tuple[Host, ...]) -> None:
        self.lease.update(lambda book: book.giving_up(*hosts))
        ec2.terminate(self.account, hosts)

    def _order(self, seen: Look) -> ec2.Order:
        """The order of all hosts, at today's prices, the cheapest zone first."""
        known = seen.record
        # As the others, which a launch with --private-ip has rented.
        private = self.private_ip or (
            bool(seen.alive) and not any(host.public_ip for host in seen.alive)
        )
        command = again.command_of(self.account, self.bucket, self.name, known, private)
        kind = hardware.describe(self.account, known.config.cluster.instance_type)
        image = hardware.image(self.account, kind, command.image)
        now = hardware.prices(self.account, kind)
        zones = tuple(sorted(known.zones, key=lambda zone: (now.spot.get(zone, 1e9), zone)))
        near = zones if kind.clusters else ()
        made = standing.ensure(self.account, command, None, near)
        prices = plan.prices_of(command, zones, now)
        order = order_of(command, known, kind, image, prices, made, again=True)
        return dataclasses.replace(order, zones=zones, round=self.lease.book.had(known.launch))

    def _capped(self, order: ec2.Order, seen: Look, hosts: int) -> ec2.Order:
        """The order without zones in which so many more hosts would cost more than they may.

        Spot hosts get no dearer than that either.
        """
        most = verdict.share(seen, self.limits, hosts)
        if self.limits.max_cost is not None:
            known = tuple(zone for zone in order.zones if zone in order.prices)
            order = dataclasses.replace(order, zones=known)
        if most is None:
            return order
        zones = tuple(zone for zone in order.zones if order.prices.get(zone, most + 1) <= most)
        if not zones and not seen.standing:
            raise TooDear(
                f"{hosts} hosts of {self.name} would cost more than --max-hourly-cost "
                f"{self.limits.max_hourly_cost:g} in every zone now"
            )
        cap = min(most, order.max_price or most)
        return dataclasses.replace(order, zones=zones, max_price=cap)

    def _train(self, run: Run, known: Record, hold: Hold) -> None:
        """Ends trainers that wait for lost ones, and starts all, each in its place."""
        private = run.private(self.private_ip)
        with again.kept_source(self.account, self.bucket, known) as archive:
            work = again.prepared(self.account, run, self.bucket, known, archive)
            with reached(self.account, run, private, again.SSH_SECONDS) as hosts:
                setup.stop_trainer(hosts)
            again.train(self.account, run, work, hold, private, self.console)
            if known.options["keep"]:
                with reached(self.account, run, private) as hosts:
                    hosts.run(f"touch ~/txl/{KEEP}", timeout=_SHORT)
