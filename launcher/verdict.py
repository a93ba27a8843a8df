"""What is to be done about a run, by a look at it: no calls, no clocks, no state."""

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from launcher import record
from launcher.amounts import dollars, duration
from launcher.look import DIGITS, Look
from launcher.runs import Host
from launcher.watch_book import Book
from txl_jax.errors import UserError

SILENT = timedelta(minutes=2)
"""After which hosts are asked how it stands; signs of life come four times a minute."""
_WIND_DOWN_HOURS = 5 / 60
"""What trainers may take to save, and hosts to end, while they cost."""
_OVER = 0.95
"""Of max_hours, after which a host that ended itself has done so for them."""


@dataclass(frozen=True)
class Limits:
    """How much a watcher may spend, and how often it may try."""

    preemptions: int = 20
    """Losses of hosts."""
    failures: int = 3
    """Trainers that ended with an error, or stood still."""
    max_hourly_cost: float | None = None
    """US dollars an hour of all hosts together; None: any."""
    max_cost: float | None = None
    """US dollars of all hosts that the run has ever had; None: any."""


class Do(Enum):
    """What to do."""

    NOTHING = "nothing"
    END = "end"
    """The watcher ends: nothing is left for it."""
    WAIT = "wait"
    """Somebody has stopped the run, or its hosts change their state."""
    RECOVER = "recover"
    """Hosts are missing, stopped or ill."""
    ASK = "ask"
    """The run is silent: hosts are asked why."""
    WIND_DOWN = "wind down"
    """A budget is used up: trainers save, hosts end."""


@dataclass(frozen=True)
class Verdict:
    """What to do, and why."""

    do: Do
    why: str = ""
    lost: tuple[Host, ...] = ()
    """Hosts whose loss is not written down yet."""
    ill: tuple[Host, ...] = ()
    """Those of them that run, and are given up."""
    status: int = 0
    """Exit status of a watcher that ends."""


def judge(seen: Look, book: Book, limits: Limits) -> Verdict:
    """The verdict on a look, with what is written down already."""
    if seen.status.finished:
        kept = "with --keep its hosts stand, and cost, until they are killed"
        end = "its hosts end by themselves, 10 minutes after success"
        return Verdict(Do.END, f"finished; {kept if seen.record.options['keep'] else end}")
    if seen.record.wish == record.END:
        return Verdict(Do.END, "ended by a person, or for its budget", status=1)
    if seen.record.wish == record.STOP:
        return Verdict(Do.WAIT, "stopped by a person: waiting until it is started again")
    if not book.interrupted(seen.record.launch) and (why := _ended_by_people(seen)):
        return Verdict(Do.END, why, status=1)
    if why := _over(seen) or _too_dear(seen, book, limits):
        return Verdict(Do.WIND_DOWN, why, status=1)
    if seen.of_state("stopping"):
        return Verdict(Do.WAIT, "hosts are stopping")
    ill = _ill(seen)
    gone = (*seen.of_state("shutting-down", "terminated", "stopped"), *ill)
    if seen.missing or gone:
        return _on_loss(seen, book, limits, gone, ill)
    return Verdict(Do.ASK if seen.silence > SILENT else Do.NOTHING)


def on_failure(seen: Look, book: Book, limits: Limits, why: str) -> Verdict:
    """The verdict on hosts that run, and trainers that do not."""
    if book.happened(seen.record.launch, "failed", "stalled") >= limits.failures:
        return Verdict(
            Do.WIND_DOWN,
            f"{why}, and {limits.failures} --failures were seen to already",
            status=1,
        )
    return Verdict(Do.RECOVER, why)


def check_known(seen: Look, book: Book) -> None:
    """Raises UserError if EC2 knows no hosts of the run, and no watcher has lost any.

    Hosts that nobody was asked about are not rented.
    """
    ended = seen.status.finished or seen.record.wish != record.TRAIN
    if seen.run is None and not ended and not book.interrupted(seen.record.launch):
        raise UserError(
            "EC2 knows no host of this run any more: the command that launched it goes on from the "
            "last checkpoint, with new ones"
        )


def check_price(seen: Look, limits: Limits) -> None:
    """Raises UserError if the run costs more an hour already than it may, or that is not known."""
    price = seen.hourly(seen.standing)
    if price is None and (limits.max_hourly_cost or limits.max_cost):
        raise UserError(
            "what the hosts cost is not known: leave --max-hourly-cost and --max-cost out"
        )
    if limits.max_hourly_cost is None or price is None:
        return
    if price > limits.max_hourly_cost:
        raise UserError(
            f"the hosts cost {dollars(price)} an hour, which is more than --max-hourly-cost "
            f"{limits.max_hourly_cost:g}: raise that, or launch with fewer --machines"
        )


def share(seen: Look, limits: Limits, hosts: int) -> float | None:
    """US dollars an hour that each of so many further hosts may cost; None: any price.

    Raises UserError if that is not known.
    """
    if limits.max_hourly_cost is None:
        return None
    price = seen.hourly(seen.standing)
    if price is None:
        raise UserError("what the hosts cost is not known: --max-hourly-cost cannot be kept")
    return round((limits.max_hourly_cost - price) / hosts, DIGITS)


def _on_loss(
    seen: Look, book: Book, limits: Limits, gone: tuple[Host, ...], ill: tuple[Host, ...]
) -> Verdict:
    new = tuple(host for host in gone if not book.hosts[host.instance_id].given_up)
    if not new:
        return Verdict(Do.RECOVER, ill=ill)
    numbers = ", ".join(str(host.index) for host in new)
    reasons = {"EC2's checks fail" if host in ill else host.reason_code for host in new}
    why = f"host{'s' * (len(new) > 1)} {numbers} lost ({', '.join(sorted(reasons))})"
    if book.happened(seen.record.launch, "preempted") >= limits.preemptions:
        why = f"{why}, and {limits.preemptions} --preemptions were seen to already"
        return Verdict(Do.WIND_DOWN, why, new, status=1)
    return Verdict(Do.RECOVER, why, new, ill)


def _ill(seen: Look) -> tuple[Host, ...]:
    """A check that fails alone is no loss: training may go on."""
    if seen.silence <= SILENT:
        return ()
    return tuple(host for host in seen.alive if host.instance_id in seen.impaired)


def _ended_by_people(seen: Look) -> str:
    """Why nothing is to be done where all hosts were ended by hand; empty: they were not."""
    hosts = seen.run.current().hosts if seen.run else ()
    gone = [host for host in hosts if host.state in ("shutting-down", "terminated")]
    by_hand = all(host.reason_code == "Client.UserInitiatedShutdown" for host in gone)
    if len(gone) == seen.machines and by_hand and seen.record.wish == record.TRAIN:
        return "all hosts were terminated by hand"
    return ""


def _over(seen: Look) -> str:
    """Why the run is at its end by the rules of its hosts; empty: it is not."""
    if seen.record.options["keep"]:
        return ""
    most = seen.record.options["max_hours"]
    hosts = seen.run.current().hosts if seen.run else ()
    if any(
        host.reason_code == "Client.InstanceInitiatedShutdown"
        and host.state not in ("pending", "running")
        and host.hours(seen.now, seen.status.seen) - host.hours_before > _OVER * most
        for host in hosts
    ):
        return f"its hosts have run for --max-hours {most:g}"
    return ""


def _too_dear(seen: Look, book: Book, limits: Limits) -> str:
    """Why the run is at its end by what it cost; empty: it is not."""
    hourly = seen.hourly(seen.standing)
    if limits.max_hourly_cost is not None and hourly and hourly > limits.max_hourly_cost:
        return (
            f"its hosts cost {dollars(hourly)} an hour by now, more than --max-hourly-cost "
            f"{limits.max_hourly_cost:g}"
        )
    if limits.max_cost is None:
        return ""
    # Of lost hosts too, as others take their place.
    price, cost = seen.hourly(seen.run.current().hosts if seen.run else ()), book.cost
    if price is None or cost is None:
        return "what its hosts cost is not known, and --max-cost cannot be kept"
    if cost + price * _WIND_DOWN_HOURS >= limits.max_cost:
        ahead = duration(timedelta(hours=_WIND_DOWN_HOURS))
        return (
            f"it has cost {dollars(cost)}, and would reach --max-cost {limits.max_cost:g} in "
            f"less than {ahead}"
        )
    return ""
