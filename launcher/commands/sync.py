"""Sends the source as it lies here to a run, and has it train with that.

The trainers save first, and go on from there with the words that were typed before.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launcher import again, lookup, reach, record, setup
from launcher.aws import Account
from launcher.options import OnHosts, OwnOnly, RunName
from launcher.source import archive

_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, kw_only=True)
class Options(OwnOnly, OnHosts):
    """Options of the command."""

    name: RunName
    """Run whose source is replaced."""
    committed: bool = False
    """Send the source as it is committed; refuse if it was changed since."""


def main(options: Options) -> int:
    """Exit status 0 when trainers run. Raises UserError unless all hosts are running."""
    account = Account.open(options.region)
    console = Console(highlight=False)
    run = lookup.running(account, options.name)
    lookup.check_own(account, run, options.force)
    bucket, known, version = again.known_launch(account, run)
    again.check_whole(account, run, known)
    private = run.private(options.private_ip)
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        source = archive(_ROOT, Path(folder), options.committed)
        if source.warning:
            console.print(Text(source.warning), soft_wrap=True)
        known = again.keep_source(account, bucket, known, source)
        known = dataclasses.replace(known, wish=record.TRAIN)
        work = again.prepared(account, run, bucket, known, source.path)
        with reach.reached(account, run, private) as hosts:
            hold = again.take_hold(account, bucket, run.name, known, version)
            console.print(Text("the trainers save and end"))
            with again.what_stands_is_said(account, run, console):
                setup.stop_trainer(hosts)
        with again.what_stands_is_said(account, run, console):
            again.train(account, run, work, hold, private, console)
    console.print(Text(f"{run.name} trains with source {known.revision or source.sha256[:12]}"))
    return 0
