"""Runs a command on all hosts of a run, and shows what each says.

    python -m launcher run NAME -- nvidia-smi -L
    python -m launcher run NAME -- 'df -h | head -3'

One word is a line for the hosts' shell; several are the words of a command as they are.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from launcher import lookup, reach
from launcher.aws import Account
from launcher.names import quoted
from launcher.options import OnHosts, RunName
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(OnHosts):
    """Options of the command."""

    name: RunName
    """Run on whose hosts."""
    command: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CMD")]
    """The command, after --."""
    timeout: float = 3600.0
    """Seconds after which it is given up."""


def main(options: Options) -> int:
    """0 if it succeeded on all hosts, else 1. Raises UserError without a command or hosts."""
    if not options.command:
        raise UserError("no command: python -m launcher run NAME -- COMMAND")
    line = options.command[0] if len(options.command) == 1 else quoted(options.command)
    account = Account.open(options.region)
    run = lookup.running(account, options.name)
    with reach.reached(account, run, run.private(options.private_ip)) as hosts:
        outputs = hosts.run(line, options.timeout, quiet=False, check=False)
    failed = [output for output in outputs if output.status]
    for output in failed:
        print(f"{output.host}: exit status {output.status} ({output.last_line()})")
    return 1 if failed else 0
