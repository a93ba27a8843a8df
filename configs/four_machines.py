"""WikiText-103 on four machines with 8 GPUs each: the fork's SMALL in float16.

    python -m launcher --config four_machines

on AWS; or python -m txl_jax.train with the same words on each of the four machines, started
together by Slurm or MPI.

Source: `four_machines` in launch.py of cybertronai/transformer-xl (p3dn.24xlarge). Its base
learning rate is lower than that of two_machines.

Expect: about a quarter of the time of one_machine, 45 min; the fork published no figure for it.
"""

from dataclasses import replace

from configs._fork import SMALL, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(replace(SMALL, dtype="float16"), base_lr=0.000125, batch=96, machines=4)
