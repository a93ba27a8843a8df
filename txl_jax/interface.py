"""The network interface towards the coordinator: collectives listen there, and nowhere else.

Those over CPUs are gloo's, which would listen at the address of the host's name; those over GPUs
are NCCL's. What JAX keeps private is used here to make gloo.
"""

import ipaddress
import os
import socket
from functools import partial
from typing import Any

import psutil
from jax._src import distributed, xla_bridge
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax.extend import backend


def use_towards(address: str, port: int) -> None:
    """Lets gloo and NCCL use the network in which the coordinator is; before a device is used.

    What NCCL_SOCKET_IFNAME says goes before that, for NCCL.
    """
    own = address_towards(address, port)
    backend.register_backend_factory("cpu", partial(_cpu_client, own), fail_quietly=False)
    name = _name(own)
    if name is None or "NCCL_SOCKET_IFNAME" in os.environ:
        return
    os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"
    # NCCL takes an interface's IPv4 address if it has one, and never ::1.
    if ":" in own and not ipaddress.ip_address(own).is_loopback:
        os.environ.setdefault("NCCL_SOCKET_FAMILY", "AF_INET6")


def address_towards(address: str, port: int) -> str:
    """The address of this machine from which `address` is reached."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        return probe.getsockname()[0]


def _name(own: str) -> str | None:
    """The interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if own in [address.address for address in addresses]:
            return name
    return None


def _cpu_client(own: str) -> Any:
    """JAX's own client, but for where gloo listens."""
    client = distributed.global_state.client
    gloo = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=own)
    return xla_bridge.make_cpu_client(gloo)
