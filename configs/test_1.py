"""Throughput on one machine with 8 GPUs: the fork's LARGE, 16 sequences a GPU, 300 steps.

    python -m txl_jax.train --local --config test_1

Source: `test_1` in launch.py of cybertronai/transformer-xl at commit d6333bd (p3dn.24xlarge).

Expect: 1.72 s for a step (the fork's log), 74 sequences a second; why its README says
six times as many stands in configs/_fork.py. Tokens are synthetic; the result is one line of JSON.
"""

from configs._fork import throughput
from txl_jax.config import Config


def config() -> Config:
    return throughput(base_lr=0.000125 * 5 / 3, machines=1)
