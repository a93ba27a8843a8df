"""Throughput on sixteen machines with 8 GPUs each: the fork's LARGE, 16 sequences a GPU, 300 steps.

    python -m launcher --config test_16

on AWS; or python -m txl_jax.train with the same words on each of the sixteen machines, started
together by Slurm or MPI.

Source: `test_16` in launch.py of cybertronai/transformer-xl at commit d6333bd (p3dn.24xlarge).

Expect: 2.08 s for a step (the fork's log), 984 sequences a second; why its README says
six times as many stands in configs/_fork.py. Tokens are synthetic; the result is one line of JSON.
"""

from configs._fork import throughput
from txl_jax.config import Config


def config() -> Config:
    return throughput(base_lr=0.001 / 4, machines=16)
