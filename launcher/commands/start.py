"""Starts hosts that were stopped, and goes on training from the last checkpoint.

Hosts that run and do not train are put to work too.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.text import Text

from launcher import again, ec2, lookup, reach, record, setup, status
from launcher.aws import Account
from launcher.options import OnHosts, OwnOnly, RunName
from launcher.runs import Run
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OwnOnly, OnHosts):
    """Options of the command."""

    name: RunName
    """Run to start."""


def main(options: Options) -> int:
    """Exit status 0 when trainers run. Raises UserError if they do already."""
    account = Account.open(options.region)
    console = Console(highlight=False)
    run = lookup.standing(account, options.name)
    lookup.check_own(account, run, options.force)
    bucket, known, version = again.known_launch(account, run)
    again.check_whole(account, run, known)
    stopped = _stopped_by_now(account, run, console)
    if not stopped:
        _check_idle(account, run, options.private_ip)
    with again.kept_source(account, bucket, known) as archive:
        work = again.prepared(account, run, bucket, known, archive)
        known = dataclasses.replace(known, wish=record.TRAIN)
        hold = again.take_hold(account, bucket, run.name, known, version)
        with again.what_stands_is_said(account, run, console):
            ec2.start_again(account, stopped.hosts if stopped else (), _seen(account, bucket, run))
            run = ec2.wait(account, run, "running")
            again.train(account, run, work, hold, run.private(options.private_ip), console)
    console.print(Text(f"{run.name} trains on {len(run.hosts)} hosts"))
    return 0


def _stopped_by_now(account: Account, run: Run, console: Console) -> Run | None:
    """The part of a run that is stopped, when no host is stopping any more; None: no host."""
    hosts = tuple(host for host in run.hosts if host.state in ("stopping", "stopped"))
    if not hosts:
        return None
    if any(host.state == "stopping" for host in hosts):
        console.print(Text(f"waiting until {run.name} has stopped"))
    return ec2.wait(account, dataclasses.replace(run, hosts=hosts), "stopped")


def _check_idle(account: Account, run: Run, private_ip: bool) -> None:
    """Raises UserError if the hosts, none of which is stopped, train."""
    run = ec2.wait(account, run, "running")
    with reach.reached(account, run, run.private(private_ip), again.SSH_SECONDS) as hosts:
        if setup.is_training(hosts):
            raise UserError(f"no host of {run.name} is stopped, and all train")


def _seen(account: Account, bucket: str, run: Run) -> datetime | None:
    """When the run was last seen at work; None also where that cannot be read."""
    with contextlib.suppress(UserError):
        return status.read(account, bucket, run.name).seen
    return None
