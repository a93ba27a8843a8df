"""As one_machine, in float16 with dynamic loss scaling.

    python -m txl_jax.train --local --config one_machine_fp16

Source: `one_machine_fp16` in launch.py of cybertronai/transformer-xl (a p3dn.24xlarge, 8 V100 of
32 GB).

Expect: the perplexity of one_machine, 24.6, in less time; the fork published no figure for it.
"""

from dataclasses import replace

from configs._fork import SMALL, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(replace(SMALL, dtype="float16"), base_lr=0.000125 * 5 / 3, batch=96)
