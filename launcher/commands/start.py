"""Starts hosts that were stopped, and goes on training from the last checkpoint."""

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from launcher import again, ec2, lookup
from launcher.aws import Account
from launcher.options import OnHosts, OwnOnly, RunName
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OwnOnly, OnHosts):
    """Options of the command."""

    name: RunName
    """Run to start."""


def main(options: Options) -> int:
    """Exit status 0 when trainers run. Raises UserError if no host was stopped."""
    account = Account.open(options.region)
    console = Console(highlight=False)
    run = lookup.standing(account, options.name)
    lookup.check_own(account, run, options.force)
    bucket, known, _ = again.known_launch(account, run)
    stopped = [host for host in run.hosts if host.state in ("stopping", "stopped")]
    if not stopped:
        raise UserError(f"no host of {run.name} is stopped")
    if any(host.state == "stopping" for host in stopped):
        console.print(Text(f"waiting until {run.name} has stopped"))
        ec2.wait(account, run, "stopped")
    with again.kept_source(account, bucket, known) as archive:
        ec2.start_again(account, stopped)
        run = ec2.wait(account, run, "running")
        again.train(account, run, known, archive, options.private_ip, console)
    console.print(Text(f"{run.name} trains on {len(run.hosts)} hosts"))
    return 0
