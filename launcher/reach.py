"""SSH from this machine to the hosts of a run, which another one may have launched."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

from launcher import key_pair, security_group
from launcher.aws import Account
from launcher.remote import Hosts
from launcher.runs import Run

_PATIENCE = 3.0
"""Seconds after which a host that lets us in would have answered."""
WAIT_SECONDS = 60.0
"""For which hosts that run may take to answer."""


@contextmanager
def reached(
    account: Account, run: Run, private: bool, seconds: float = WAIT_SECONDS
) -> Iterator[Hosts]:
    """Connections to the hosts of a run, closed at the end of the block.

    `seconds`: for which they may take to answer.

    Raises UserError: names the hosts that cannot be reached, and why.
    """
    key = prepared(account, run, private)
    with Hosts.of(run, key, private) as hosts:
        hosts.wait(seconds)
        yield hosts


def prepared(account: Account, run: Run, private: bool) -> Path:
    """Has the hosts' security group let this machine in, if need be; returns the key's path.

    Raises UserError if the key is not to be had.
    """
    key = key_pair.fetch(account, run.hosts[0].key_name)
    if not private and is_shut_out(run.address(run.hosts[0], private)):
        own = ip_network(security_group.own_public_address())
        security_group.admit(account, [host.instance_id for host in run.hosts], [own])
    return key


def is_shut_out(address: str) -> bool:
    """Whether nothing answers: a security group drops what it does not let in."""
    try:
        socket.create_connection((address, 22), _PATIENCE).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


def admit_mosh(account: Account, run: Run, private: bool) -> None:
    """Has the hosts' security group let in what mosh sends from this machine.

    Raises UserError if this machine's address cannot be told.
    """
    if not private:
        own = ip_network(security_group.own_public_address())
        ids = [host.instance_id for host in run.hosts]
        security_group.admit(account, ids, [own], mosh=True)
