"""WikiText-103 on two machines with 8 GPUs each: the fork's SMALL, 96 sequences a GPU.

    python -m launcher --config two_machines

on AWS; or python -m txl_jax.train with the same words on each of the two machines, started
together by Slurm or MPI.

Source: `two_machines` in launch.py of cybertronai/transformer-xl (p3dn.24xlarge).

Expect: a perplexity near that of one_machine, 24.6, in about half its 2 h 54 min; the fork
published no figure for it.
"""

from configs._fork import SMALL, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(SMALL, base_lr=0.000125 * 5 / 3, batch=96, machines=2)
