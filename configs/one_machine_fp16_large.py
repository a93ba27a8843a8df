"""WikiText-103 on one machine with 8 GPUs: the fork's LARGE in float16, 16 sequences a GPU.

    python -m txl_jax.train --local --config one_machine_fp16_large

Source: `one_machine_fp16_large` in launch.py of cybertronai/transformer-xl (a p3dn.24xlarge, 8 V100
of 32 GB).

Expect: 1.72 s for a step (the fork's log of test_1), 15 hours for 1.5 billion tokens; it published
no perplexity. The original's large model reaches 18.3 with 130 times as many.
"""

from configs._fork import LARGE, experiment
from txl_jax.config import Config


def config() -> Config:
    return experiment(LARGE, base_lr=0.001 / 4, batch=16)
