"""Looks after a run: replaces lost hosts, starts trainers again, keeps to budgets.

It goes on until the run has finished, and may be ended (Ctrl-C) and typed again at any time: the
run trains on. Several may look after a run, on several machines: one acts, the others wait.
"""

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console

from launcher import lookup
from launcher.aws import Account
from launcher.interrupts import signals_as_interrupts
from launcher.names import check_run_name, quoted
from launcher.options import OfBucket, OnHosts, RunName
from launcher.verdict import Limits
from launcher.watch import check, watch
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OnHosts, OfBucket):
    """Options of the command."""

    name: RunName
    """Run to look after."""
    preemptions: int = Limits.preemptions
    """Losses of hosts that are seen to; at one more the run ends."""
    failures: int = Limits.failures
    """Failures of trainers that are seen to, likewise."""
    max_hourly_cost: float | None = None
    """US dollars an hour that all hosts together may cost; None: any."""
    max_cost: float | None = None
    """US dollars that all hosts of the run may have cost in the end; None: any."""
    detach: bool = False
    """In a tmux session on this machine, which goes on when you log out."""


def main(options: Options) -> int:
    """Exit status 0 when the run has finished, 1 if a person or a budget has ended it.

    Raises UserError for a run that is not known or somebody else's, or for budgets that it exceeds.
    """
    limits = _limits(options)
    account = Account.open(options.region)
    bucket = lookup.bucket(account, check_run_name(options.name), options.bucket)
    lookup.check_launched(account, bucket, options.name)
    check(account, bucket, options.name, limits)
    if options.detach:
        return _detach(options)
    try:
        with signals_as_interrupts():
            console = Console(highlight=False)
            return watch(account, bucket, options.name, limits, options.private_ip, console)
    except KeyboardInterrupt:
        print(f"{options.name} goes on as it is, and this watcher looks after it no more")
        raise


def _limits(options: Options) -> Limits:
    for name in ("preemptions", "failures"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} is {getattr(options, name)}; it has to be 0 or more")
    for name in ("max_hourly_cost", "max_cost"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value:g}; it has to be above 0, in US dollars")
    return Limits(
        preemptions=options.preemptions,
        failures=options.failures,
        max_hourly_cost=options.max_hourly_cost,
        max_cost=options.max_cost,
    )


def _detach(options: Options) -> int:
    """Types the same command without --detach in tmux, whose own server has our environment."""
    if not shutil.which("tmux"):
        raise UserError("tmux is not installed on this machine: install it, or leave --detach out")
    tmux = ["tmux", "-L", f"txl-watch-{options.name}"]
    show = f"`{shlex.join([*tmux, 'attach'])}`"
    if not subprocess.run([*tmux, "has-session"], capture_output=True).returncode:
        raise UserError(f"{options.name} is looked after in tmux already: {show} shows it")
    words = [word for word in sys.argv[1:] if word != "--detach"]
    # What it said last can be looked at after its end.
    line = f"{quoted([sys.executable, '-m', 'launcher', *words])}; echo status $?; exec sh"
    subprocess.run([*tmux, "new-session", "-d", line], check=True)
    print(f"looking after {options.name} in tmux: {show}")
    return 0
