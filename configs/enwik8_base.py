"""enwik8, 100 million bytes of Wikipedia: the original's base model, 400,000 steps.

    python -m txl_jax.train --local --config enwik8_base

Source: pytorch/run_enwik8_base.sh of kimiyoung/transformer-xl, on 4 GPUs of 11 GB. Its 22 sequences
lie there as 4, 6, 6 and 6; here they need 1, 2, 11 or 22 GPUs, or another batch.

Expect: 1.06 bits per character on test with tgt_len 80, mem_len 2100, clamp_len 820 and same_length
(the original's README). It says nothing of the time. 4.5 billion tokens.
"""

from configs._machines import ONE_L40S
from configs._original import CHARACTERS_BASE, experiment
from txl_jax.config import Config, DataConfig


def config() -> Config:
    data = DataConfig(dataset="enwik8", vocab="bytes")
    return experiment(CHARACTERS_BASE, data, batch=22, steps=400_000, cluster=ONE_L40S)
