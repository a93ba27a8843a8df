"""Sends the source as it lies here to a run, and has it train with that.

The trainers save first, and go on from there with the words that were typed before.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launcher import again, lookup, reach, setup
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
    """Exit status 0 when trainers run. Raises UserError if no host is running."""
    account = Account.open(options.region)
    console = Console(highlight=False)
    run = lookup.running(account, options.name)
    lookup.check_own(account, run, options.force)
    bucket, known, version = again.known_launch(account, run)
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        source = archive(_ROOT, Path(folder), options.committed)
        with reach.reached(account, run, options.private_ip) as hosts:
            console.print(Text("the trainers save and end"))
            setup.stop_trainer(hosts)
        known = again.replace_source(account, bucket, run, known, version, source)
        again.train(account, run, known, source.path, options.private_ip, console)
    console.print(Text(f"{run.name} trains with source {known.revision or source.sha256[:12]}"))
    return 0
