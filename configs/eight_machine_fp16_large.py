"""As one_machine_fp16_large, on eight machines.

    python -m launcher --config eight_machine_fp16_large

on AWS; or python -m txl_jax.train with the same words on each of the eight machines, started
together by Slurm or MPI.

Source: `eight_machine_fp16_large` in launch.py of cybertronai/transformer-xl (p3dn.24xlarge).

Expect: 2.03 s for a step (the fork's log of test_8), 2 h 10 min in all; it published no perplexity.
"""

from configs._fork import LARGE, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(LARGE, base_lr=0.001 / 4, batch=16, machines=8)
