"""Which run a name means, and where its files are."""

import dataclasses

from botocore.exceptions import ClientError

from launcher import log_bucket, names, record, runs
from launcher.aws import Account, error_code, explained
from launcher.names import printable
from launcher.runs import Run
from txl_jax.config import nearest
from txl_jax.errors import UserError

_NOT_OURS = {"403", "404", "AccessDenied", "NoSuchBucket"}


def standing(account: Account, name: str) -> Run:
    """The latest launch of a run that has hosts which run or are stopped: the caller's own, if any.

    Raises UserError if there is none, with the nearest name that there is.
    """
    found = runs.find(account, name, all_users=True)
    if not found:
        known = sorted({run.name for run in runs.find(account, all_users=True)})
        raise UserError(
            f"no host of a run {name} stands in {account.region}{nearest(name, known)}; "
            f"{account.command('ls', '--all')} lists the runs"
        )
    return preferred(account, found)[-1]


def preferred(account: Account, found: list[Run]) -> list[Run]:
    """The caller's own of these runs, or if there are none, all: names are not reserved."""
    return [run for run in found if run.owner == account.caller] or found


def running(account: Account, name: str) -> Run:
    """As `standing`, with only those of its hosts that are running, one at least.

    Raises UserError also if none is running.
    """
    run = standing(account, name)
    hosts = tuple(host for host in run.hosts if host.state == "running")
    if not hosts:
        states = ", ".join(sorted({host.state for host in run.hosts}))
        raise UserError(f"no host of {name} is running: {states}")
    return dataclasses.replace(run, hosts=hosts)


def check_own(account: Account, run: Run, force: bool) -> None:
    """Raises UserError for somebody else's run, unless it is forced."""
    if run.owner != account.caller and not force:
        raise UserError(
            f"the run {run.name} was launched by {run.owner or 'somebody unknown'}, and you are "
            f"{account.caller}; --force does it all the same"
        )


def check_launched(account: Account, bucket: str, name: str) -> None:
    """Raises UserError unless the caller has launched such a run; its hosts may be gone."""
    known, _ = record.read(account, bucket, name)
    if known is None:
        raise UserError(
            f"s3://{bucket} knows of no launch of a run {name}: "
            f"{account.command('ls', '--all')} lists the runs"
        )
    if known.owner != account.caller:
        raise UserError(
            f"the run {name} was launched by {printable(known.owner)}, and you are "
            f"{account.caller}: hosts that you rent would not be that person's"
        )


def bucket(account: Account, name: str, wanted: str) -> str:
    """The bucket of a run, whether or not its hosts still stand.

    Args:
      wanted: as typed; empty: what the hosts' tags say, or else the account's own bucket.

    Raises UserError if it is not the account's: nothing is to be read from others' buckets.
    """
    names.check_run_name(name)
    known = "" if wanted else _tagged(account, name)
    return check_bucket(account, wanted or known)


@explained()
def check_bucket(account: Account, wanted: str) -> str:
    """The bucket of this name, or the account's own for an empty one.

    Raises UserError if there is none that belongs to the account.
    """
    found = log_bucket.bucket_name(account, wanted)
    try:
        account.client("s3").head_bucket(Bucket=found, ExpectedBucketOwner=account.id)
    except ClientError as error:
        if error_code(error) not in _NOT_OURS:
            raise
        raise UserError(
            f"the account {account.id} has no bucket {found} that you may read: name the one of "
            "your runs with --bucket, or another --region"
        ) from error
    return found


def _tagged(account: Account, name: str) -> str:
    """What the tags of a run's hosts say of its bucket; empty: nothing."""
    found = [run for run in runs.find(account, name, all_users=True, gone=True) if run.logdir]
    if not found:
        return ""
    return preferred(account, found)[-1].logdir.removeprefix("s3://").split("/")[0]
