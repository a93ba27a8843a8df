"""Stops hosts on demand after their trainers have saved; `start` goes on from there.

Spot hosts end when they stop, so they cannot be. A stopped host still costs its disk.
"""

from dataclasses import dataclass

from launcher import again, ec2, lookup, reach, record, setup
from launcher.amounts import dollars
from launcher.aws import Account
from launcher.options import OnHosts, OwnOnly, RunName
from launcher.remote import Hosts
from launcher.runs import Run
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OwnOnly, OnHosts):
    """Options of the command."""

    name: RunName
    """Run to stop."""


def main(options: Options) -> int:
    """Exit status 0.

    Raises UserError for spot hosts, if none is running, or if they have no key or address by which
    the trainers could be told to save.
    """
    account = Account.open(options.region)
    run = lookup.running(account, options.name)
    lookup.check_own(account, run, options.force)
    if any(host.spot for host in run.hosts):
        raise UserError(
            f"the hosts of {run.name} are spot ones, which cannot be stopped and started again; "
            f"{account.command('kill', run.name)} ends them"
        )
    private = run.private(options.private_ip)
    # Without its key or the hosts' addresses nothing could be saved: that ends the command here.
    key = reach.prepared(account, run, private)
    _tell_watchers(account, run)
    with Hosts.of(run, key, private) as hosts:
        _save(run, hosts)
    ec2.stop(account, run.hosts)
    ec2.wait(account, run, "stopped")
    price = "" if run.price is None else f", which cost {dollars(run.price)} an hour"
    print(f"stopped {len(run.hosts)} hosts{price}")
    return 0


def _tell_watchers(account: Account, run: Run) -> None:
    """They leave a run alone that was stopped."""
    try:
        again.ask(account, run, record.STOP)
    except UserError as error:
        print(f"{error}; a watcher, if there is one, starts the run again", flush=True)


def _save(run: Run, hosts: Hosts) -> None:
    """Has the trainers save and end, as far as hosts answer."""
    try:
        hosts.wait(reach.WAIT_SECONDS)
        print(f"{run.name}: the trainers save and end", flush=True)
        setup.stop_trainer(hosts)
    except UserError as error:
        # They are stopped all the same: whoever says stop does not want to pay on.
        print(f"{error}; what was trained since the last checkpoint is lost", flush=True)
