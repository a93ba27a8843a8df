"""Shows what the trainer of a run prints, also when its hosts are gone.

It comes from S3, where a host sends it every 20 seconds.
"""

import sys
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from launcher import lookup, objects, runs
from launcher.aws import Account
from launcher.names import printable
from launcher.options import OfBucket, RunName
from txl_jax.errors import UserError

_POLL_SECONDS = 5.0
_LOOK_SECONDS = 30.0
"""From one look whether hosts still stand to the next."""


@dataclass(frozen=True, kw_only=True)
class Options(OfBucket):
    """Options of the command."""

    name: RunName
    """Run whose output is shown."""
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Go on showing what is added, until the hosts are gone."""
    host: int = 0
    """Number of the host."""


def main(options: Options) -> int:
    """Exit status 0. Raises UserError if there is no output, and none is to come."""
    account = Account.open(options.region)
    bucket = lookup.bucket(account, options.name, options.bucket)
    key = f"launches/{options.name}/output-{options.host}.txt"
    start, rest, looked = 0, b"", -_LOOK_SECONDS
    while True:
        content = objects.read_from(account, bucket, key, start)
        if content is None and not options.follow:
            raise UserError(
                f"host {options.host} of {options.name} has left no output in s3://{bucket}; -f "
                "waits for it"
            )
        over = not options.follow
        if not content and options.follow and time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            over = not _stands(account, options.name)
        if over and content is None and not start:
            raise UserError(
                f"host {options.host} of {options.name} has left no output in s3://{bucket}, and "
                f"no host of that run is running; {account.command('ls', '--all')} lists the runs"
            )
        content = content or b""
        start += len(content)
        *lines, rest = (rest + content).split(b"\n")
        _show(lines)
        if over:
            _show([rest] if rest else [])
            return 0
        time.sleep(_POLL_SECONDS)


def _show(lines: list[bytes]) -> None:
    for line in lines:
        print(printable(line.decode("utf-8", "replace")))
    sys.stdout.flush()


def _stands(account: Account, name: str) -> bool:
    found = runs.find(account, name, all_users=True)
    return any(host.state in ("pending", "running") for run in found for host in run.hosts)
