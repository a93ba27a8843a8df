"""Throughput on two machines with 8 GPUs each: the fork's LARGE, 16 sequences a GPU, 300 steps.

    python -m launcher --config test_2

on AWS; or python -m txl_jax.train with the same words on each of the two machines, started
together by Slurm or MPI.

Source: `test_2` in launch.py of cybertronai/transformer-xl at commit d6333bd (p3dn.24xlarge).

Expect: 1.79 s for a step (the fork's log), 143 sequences a second; why its README says
six times as many stands in configs/_fork.py. Tokens are synthetic; the result is one line of JSON.
"""

from configs._fork import throughput
from txl_jax.config import Config


def config() -> Config:
    return throughput(base_lr=0.000125 * 5 / 3, machines=2)
