"""What others have published about Transformer-XL on many GPUs, and what was measured here.

The fork's: README and generate_throughput_numbers.py of cybertronai/transformer-xl, p3dn.24xlarge.
Its gradients are float16 (`test_*` in its launch.py) and its LARGE has 277 million parameters.
NVIDIA's: README of PyTorch/LanguageModeling/Transformer-XL in DeepLearningExamples at 729963d,
"Training performance results", mixed precision, the largest batch of each. Gradients of Apex' level
O2 are float16 too. Both use PyTorch's DistributedDataParallel, which sums gradients in buckets of
25 MiB while it computes. Ours: bench/LOG.md, 2026-11-26, LARGE (`test_1`) in bfloat16.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from txl_jax.scaling_model import Links, links

FORK_GPUS = 8
"""GPUs of a host of the fork's."""
FORK_SEQUENCES = {1: 446, 2: 860, 4: 1736, 8: 3031, 16: 5904}
"""Sequences a second by number of hosts, as in the fork's README; `configs/_fork.py` says why these
are six times what its logs come to. What they are in proportion to each other is right."""
PIECES = 10
"""All-reduces into which XLA's GPU compiler splits that of LARGE's step (bench/LOG.md)."""
_BUCKET = 25 << 20


class Point(NamedTuple):
    """A measured step."""

    hosts: int
    devices: int
    """Of each host."""
    ms: float


@dataclass(frozen=True)
class Series:
    """The same work on every device, on more and more of them."""

    group: str
    """Those of a group have the software and the kind of link in common."""
    name: str
    size: float
    """Bytes of the gradients, as they are summed."""
    pieces: int
    """In so many all-reduces."""
    over: Links
    points: tuple[Point, ...]
    """The first is what the others are predicted from."""


def _torch(group: str, name: str, parameters: float, over: Links, points: list[Point]) -> Series:
    size = 2 * parameters
    return Series(group, name, size, math.ceil(size / _BUCKET), over, tuple(points))


def _gpus(tokens_per_s: dict[int, float], batch: int, tgt_len: int) -> list[Point]:
    """Points on one host, from tokens/s by number of GPUs, each with `batch` sequences."""
    return [Point(1, n, 1e3 * n * batch * tgt_len / rate) for n, rate in tokens_per_s.items()]


def _nodes(tokens_per_s: dict[int, float], gpus: int, batch: int, tgt_len: int) -> list[Point]:
    """As `_gpus`, by number of hosts of `gpus` GPUs each."""
    return [
        Point(n, gpus, 1e3 * n * gpus * batch * tgt_len / rate) for n, rate in tokens_per_s.items()
    ]


_BASE, _LARGE = 192e6, 285e6
_FORK, _INSIDE, _NODES, _OURS = (
    "the fork, between hosts",
    "NVIDIA, within a host",
    "NVIDIA, between hosts",
    "this project, within a host",
)
_P3DN, _DGX1, _DGX2 = links(150, 100), links(150, 400), links(150, 800)
_DGX_A100, _H100 = links(300, 1600), links(450, math.inf)  # of the latter there was one host
SERIES = (
    _torch(
        _FORK,
        "p3dn, LARGE",
        277e6,
        _P3DN,
        [
            Point(hosts, FORK_GPUS, ms)
            for hosts, ms in {1: 1720, 2: 1785, 4: 1769, 8: 2028, 16: 2082}.items()
        ],
    ),
    _torch(
        _INSIDE,
        "DGX A100, base",
        _BASE,
        _DGX_A100,
        _gpus({1: 59_961, 2: 113_238, 4: 225_609, 8: 449_890}, 32, 192),
    ),
    _torch(
        _INSIDE,
        "DGX A100, large",
        _LARGE,
        _DGX_A100,
        _gpus({1: 25_084, 2: 48_562, 4: 95_997, 8: 191_148}, 16, 384),
    ),
    _torch(
        _INSIDE,
        "DGX-1, base",
        _BASE,
        _DGX1,
        _gpus({1: 36_692, 2: 65_889, 4: 133_838, 8: 258_648}, 32, 192),
    ),
    _torch(
        _INSIDE,
        "DGX-1, large",
        _LARGE,
        _DGX1,
        _gpus({1: 10_210, 2: 17_984, 4: 36_340, 8: 66_716}, 4, 384),
    ),
    _torch(
        _INSIDE,
        "DGX-2H, base",
        _BASE,
        _DGX2,
        _gpus({1: 32_875, 2: 59_058, 4: 113_985, 8: 223_907, 16: 414_994}, 16, 192),
    ),
    _torch(
        _INSIDE,
        "DGX-2H, large",
        _LARGE,
        _DGX2,
        _gpus({1: 14_787, 2: 27_710, 4: 54_207, 8: 107_073, 16: 211_387}, 8, 384),
    ),
    _torch(
        _NODES,
        "DGX-2H, large",
        _LARGE,
        _DGX2,
        _nodes({1: 154_950, 2: 307_520, 4: 605_530, 8: 1_189_700}, 16, 4, 384),
    ),
    Series(
        _OURS,
        "H100, LARGE",
        1_140_682_032,
        PIECES,
        _H100,
        (Point(1, 1, 124.9), Point(1, 2, 129.0), Point(1, 4, 129.8)),
    ),
    Series(
        _OURS,
        "H200, LARGE",
        1_140_682_032,
        PIECES,
        _H100,
        (Point(1, 1, 65.3), Point(1, 2, 67.3)),
    ),
)
"""DGX-1: 8 V100 of 16 GB, DGX-2H: 16 of 32 GB, DGX A100: 8 A100 of 40 GB. NVLink and network are
those of data sheets."""
