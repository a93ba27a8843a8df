"""The model of scaling: all-reduces against the algorithm itself, and against counts by hand."""

import math

import numpy as np
import pytest

from txl_jax.scaling_model import Links, all_reduce, links, ring, tree

GB, US = 1e9, 1e-6


@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_a_ring_takes_what_its_algorithm_does(members):
    """Members with a real array each: a part goes around, then the sums go around."""
    size, bandwidth, latency = 240.0, 10.0, 0.5
    held = np.random.default_rng(0).normal(size=(members, members))
    total, seconds = held.sum(0), 0.0
    for turn in range(2 * (members - 1)):
        sent = [(i, (i - turn) % members, held[i, (i - turn) % members]) for i in range(members)]
        for i, part, value in sent:
            to = (i + 1) % members
            held[to, part] = held[to, part] + value if turn < members - 1 else value
        seconds += size / members / bandwidth + latency
    np.testing.assert_allclose(held, np.tile(total, (members, 1)))
    assert ring(size, members, bandwidth, latency) == pytest.approx(seconds)


def test_a_ring_and_a_tree_by_hand():
    """1 GB over 4 hosts at 5 GB/s. Ring: 2 x 3 turns of 50 ms. Tree: up and down, 2 x 200 ms. Ten
    pieces: 6 turns, or 2 x 2 levels, of 20 µs for each."""
    assert ring(1 * GB, 4, 5 * GB, 20 * US, pieces=10) == pytest.approx(0.3 + 0.0012)
    assert tree(1 * GB, 4, 5 * GB, 20 * US, pieces=10) == pytest.approx(0.4 + 0.0008)
    assert [tree(0, n, 1, 1) / 2 for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    assert ring(1 * GB, 1, 5 * GB, 20 * US) == tree(1 * GB, 1, 5 * GB, 20 * US) == 0


def test_hosts_sum_within_and_then_between_them_the_faster_way():
    over = Links(100 * GB, 5 * GB, nvlink_latency=3 * US, network_latency=20 * US)
    inside = 2 * 7 * (1 / 8 / 100 + 10 * 3 * US)
    assert all_reduce(1 * GB, 1, 8, over, 10) == pytest.approx(inside)
    assert all_reduce(1 * GB, 4, 8, over, 10) == pytest.approx(inside + 0.3 + 0.0012)
    # 1,000 bytes are latency and nothing else: 2 x 3 levels, not 2 x 7 turns.
    assert all_reduce(1000, 8, 1, over, 1) == pytest.approx(6 * 20 * US, rel=0.01)
    assert all_reduce(1 * GB, 1, 1, over, 10) == 0


def test_of_data_sheets_a_part_is_achieved():
    """All-reduces of 1 GiB that NVIDIA/nccl's issue 527 tells of, on one, three and four p4d."""
    over = links(nvlink=300, network=400)
    for hosts, ms, within in ((1, 8.14, 0.01), (3, 64.8, 0.03), (4, 70.3, 0.04)):
        assert 1e3 * all_reduce(2**30, hosts, 8, over, 1) == pytest.approx(ms, rel=within)
    assert math.isclose(links(150, 100).network, 6.25 * GB)
