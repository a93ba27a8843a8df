"""As two_machines, in float16 with dynamic loss scaling.

    python -m launcher --config two_machines_fp16

on AWS; or python -m txl_jax.train with the same words on each of the two machines, started
together by Slurm or MPI.

Source: `two_machines_fp16` in launch.py of cybertronai/transformer-xl (p3dn.24xlarge).

Expect: the perplexity of two_machines in less time; the fork published no figure for it.
"""

from dataclasses import replace

from configs._fork import SMALL, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(
        replace(SMALL, dtype="float16"), base_lr=0.000125 * 5 / 3, batch=96, machines=2
    )
