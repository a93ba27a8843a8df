"""How long a data-parallel step takes on many hosts: a model with few parameters.

A step is computing, and then the part of the all-reduce of the gradients that computing does not
hide. The all-reduce is hierarchical: the devices of a host sum over NVLink in a ring, the hosts sum
over the network, in a ring or along a tree, whichever is faster. That takes each of N members

    ring     2 (N - 1) (S / N / bandwidth + pieces x latency)
    tree     2 (S / bandwidth + pieces x ceil(log2 N) x latency)

for S bytes in so many pieces. In a ring a member sends 2 (N - 1) / N of the bytes and no algorithm
sends less; the two trees of NCCL send all of them up and down, over fewer hops.

Not in it: hosts that are slower than others, and networks that are slower the more hosts use them.
"""

from dataclasses import dataclass

NVLINK_FRACTION = 0.77
"""Of the bandwidth of NVLink, what an all-reduce of 1 GiB achieves: 231 of 300 GB/s on the A100s of
a p4d (NVIDIA/nccl, issue 527)."""
NETWORK_FRACTION = 0.5
"""Of the network's bandwidth, what is left to an all-reduce over several hosts: about 50 of 100
Gbit/s on p3dn (the fork's authors in "Scaling Transformer-XL to 128 GPUs"; 50 to 60 on 8 to 32 of
them, NVIDIA/nccl issue 235), and half of 400 on 3 and 4 p4d (issue 527). Two hosts do better."""
NVLINK_LATENCY = 3.4e-6
"""Seconds for a hop between GPUs of a host (NCCL's own table, src/graph/tuning.cc)."""
NETWORK_LATENCY = 17e-6
"""Seconds for a hop between hosts: 8 bytes over 2, 4 and 8 p3dn with EFA took 163, 319 and 631 µs
(nccl-tests of July 2019 in gists of jacobkahn), in rings of 16, 32 and 64 GPUs. NCCL's table has
14."""


@dataclass(frozen=True)
class Links:
    """What gradients cross, as fast as an all-reduce finds it."""

    nvlink: float
    """Bytes/s that a device sends to the others of its host."""
    network: float
    """Bytes/s that a host sends to others."""
    nvlink_latency: float = NVLINK_LATENCY
    """Seconds for a hop."""
    network_latency: float = NETWORK_LATENCY


def links(nvlink: float, network: float) -> Links:
    """What is achieved of data sheets' GB/s of NVLink and Gbit/s of a host's network."""
    return Links(NVLINK_FRACTION * nvlink * 1e9, NETWORK_FRACTION * network * 1e9 / 8)


def ring(size: float, members: int, bandwidth: float, latency: float, pieces: int = 1) -> float:
    """Seconds to all-reduce `size` bytes in a ring of members that send `bandwidth` bytes/s."""
    return 2 * (members - 1) * (size / members / bandwidth + pieces * latency)


def tree(size: float, members: int, bandwidth: float, latency: float, pieces: int = 1) -> float:
    """As `ring`, along two binary trees that share the bytes."""
    depth = (members - 1).bit_length()
    return 2 * (size / bandwidth + pieces * depth * latency) if depth else 0.0


def all_reduce(size: float, hosts: int, devices: int, over: Links, pieces: int) -> float:
    """Seconds to sum `size` bytes of every device over `hosts` hosts of `devices` devices each."""
    way = hosts, over.network, over.network_latency, pieces
    inside = ring(size, devices, over.nvlink, over.nvlink_latency, pieces)
    return inside + min(ring(size, *way), tree(size, *way))
