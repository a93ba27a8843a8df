"""Stops hosts on demand after their trainers have saved; `start` goes on from there.

Spot hosts end when they stop, so they cannot be. A stopped host still costs its disk.
"""

from dataclasses import dataclass

from launcher import ec2, lookup, reach, setup
from launcher.amounts import dollars
from launcher.aws import Account
from launcher.options import OnHosts, OwnOnly, RunName
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OwnOnly, OnHosts):
    """Options of the command."""

    name: RunName
    """Run to stop."""


def main(options: Options) -> int:
    """Exit status 0. Raises UserError for spot hosts, or if none is running."""
    account = Account.open(options.region)
    run = lookup.running(account, options.name)
    lookup.check_own(account, run, options.force)
    if any(host.spot for host in run.hosts):
        raise UserError(
            f"the hosts of {run.name} are spot ones, which cannot be stopped and started again; "
            f"`python -m launcher kill {run.name}` ends them"
        )
    try:
        with reach.reached(account, run, options.private_ip) as hosts:
            print(f"{run.name}: the trainers save and end", flush=True)
            setup.stop_trainer(hosts)
    except UserError as error:
        # They are stopped all the same: whoever says stop does not want to pay on.
        print(f"{error}; what was trained since the last checkpoint is lost", flush=True)
    ec2.stop(account, run.hosts)
    ec2.wait(account, run, "stopped")
    saved = sum(host.price or 0.0 for host in run.hosts)
    print(f"stopped {len(run.hosts)} hosts, which cost {dollars(saved)} an hour")
    return 0
