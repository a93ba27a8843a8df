"""WikiText-103 on eight machines with 8 GPUs each: the fork's SMALL in float16.

    python -m launcher --config eight_machines

on AWS; or python -m txl_jax.train with the same words on each of the eight machines, started
together by Slurm or MPI.

Source: `eight_machines` in launch.py of cybertronai/transformer-xl (p3dn.24xlarge). There it starts
from what one_machine had learned after its first epoch, as --init-from does; without it, nobody
has published how it goes.

Expect: 90 s for an epoch of 103 million tokens (the fork's README).
"""

from dataclasses import replace

from configs._fork import SMALL, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(
        replace(SMALL, dtype="float16"),
        base_lr=0.000125 / 2,
        batch=96,
        machines=8,
        warmup_tokens=50_000_000,
    )
