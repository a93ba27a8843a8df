"""Removes what the launcher made in the account and nothing uses.

Keys, groups and roles that no host has, and a bucket only if it is empty.
"""

from dataclasses import dataclass

from launcher import standing
from launcher.aws import Account
from launcher.names import printable
from launcher.options import InRegion
from launcher.question import DECLINED_STATUS, agreed
from txl_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(InRegion):
    """Options of the command."""

    yes: bool = False
    """Do not ask."""


def main(options: Options) -> int:
    """Exit status 0; 1 if the answer was no. Raises UserError for what could not be removed."""
    account = Account.open(options.region)
    things = standing.unused(account)
    if not things:
        print(f"nothing in {account.region} is left unused")
        return 0
    for thing in things:
        print(f"{thing.kind} {printable(thing.name)}")
    if not agreed(f"Remove these {len(things)}?", options.yes):
        return DECLINED_STATUS
    stay = standing.remove(account, things)
    print(f"removed {len(things) - len(stay)}")
    if stay:
        told = "; ".join(f"{thing.kind} {printable(thing.name)} ({why})" for thing, why in stay)
        raise UserError(f"not removed: {told}")
    return 0
