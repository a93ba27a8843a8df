"""Terminates the hosts of runs, after a question.

What the runs have left in S3 stays. What was trained since the last checkpoint is lost; `stop` has
hosts on demand save first.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from launcher import again, ec2, lookup, record, runs, watch_book
from launcher.amounts import dollars
from launcher.aws import Account
from launcher.options import OwnOnly, RunNames
from launcher.question import DECLINED_STATUS, agreed
from launcher.runs import Run
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OwnOnly):
    """Options of the command."""

    names: RunNames
    """Runs to end."""
    yes: bool = False
    """Do not ask."""


def main(options: Options) -> int:
    """Exit status 0; 1 if the answer was no. Raises UserError if one of them does not stand."""
    if not options.names:
        raise UserError("which run? python -m launcher kill NAME …")
    account = Account.open(options.region)
    console = Console(highlight=False)
    found = [run for name in dict.fromkeys(options.names) for run in _standing(account, name)]
    for run in found:
        lookup.check_own(account, run, options.force)
        _tell(console, run)
    hosts = [host for run in found for host in run.hosts]
    if not hosts:
        return 0
    if not agreed(f"Terminate {len(hosts)} hosts?", options.yes):
        return DECLINED_STATUS
    for run in found:
        _tell_watchers(account, run, console)
    ec2.terminate(account, hosts)
    console.print(Text(f"terminated: {', '.join(host.instance_id for host in hosts)}"))
    return 0


def _standing(account: Account, name: str) -> list[Run]:
    """All launches of the name that stand: the caller's own, or if there are none, others'.

    Of a run without hosts a watcher that waits for room for them is told to end.
    """
    try:
        lookup.standing(account, name)
    except UserError:
        if not _told_to_end(account, name):
            raise
        print(f"{name} has no hosts; a watcher that waits for some ends")
        return []
    return lookup.preferred(account, runs.find(account, name, all_users=True))


def _told_to_end(account: Account, name: str) -> bool:
    """Whether a watcher had lost the hosts of a run, to rent others when there is room."""
    try:
        bucket = lookup.bucket(account, name, "")
    except UserError:
        return False  # that there is no such run says more
    known, _ = record.read(account, bucket, name)
    if known is None or known.owner != account.caller or known.wish != record.TRAIN:
        return False
    book, _ = watch_book.read(account, bucket, name)
    if not book.interrupted(known.launch):
        return False
    again.ask_in(account, bucket, name, known.launch, record.END)
    return True


def _tell_watchers(account: Account, run: Run, console: Console) -> None:
    """They end, and replace nothing."""
    try:
        again.ask(account, run, record.END)
    except UserError as error:
        console.print(Text(f"{error}; a watcher, if there is one, replaces the hosts"))


def _tell(console: Console, run: Run) -> None:
    cost = dollars(run.cost_so_far(datetime.now(UTC)))
    console.print(
        Text(f"{run.name}, launched by {run.owner} {run.started:%Y-%m-%d %H:%M} UTC, {cost} so far")
    )
    for host in run.hosts:
        price = "" if host.price is None else f", {dollars(host.price)} an hour"
        console.print(
            Text(
                f"  host {host.index}: {host.instance_id}, {host.kind} in {host.zone}, "
                f"{host.state}{price}"
            )
        )
    if run.logdir:
        console.print(Text(f"  its logs and checkpoints stay in {run.logdir}"))
