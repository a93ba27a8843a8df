"""As one_machine_fp16_large, on four machines.

    python -m launcher --config four_machine_fp16_large

on AWS; or python -m txl_jax.train with the same words on each of the four machines, started
together by Slurm or MPI.

Source: `four_machine_fp16_large` in launch.py of cybertronai/transformer-xl (p3dn.24xlarge).

Expect: 1.77 s for a step (the fork's log of test_4), 4 hours in all; it published no perplexity.
"""

from configs._fork import LARGE, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(LARGE, base_lr=0.001 / 4, batch=16, machines=4)
