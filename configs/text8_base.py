"""text8, 100 million letters of Wikipedia: the original's base model, 400,000 steps.

    python -m txl_jax.train --local --config text8_base

Source: pytorch/run_text8_base.sh of kimiyoung/transformer-xl, on 4 GPUs of 11 GB. Its 22 sequences
lie there as 4, 6, 6 and 6; here they need 1, 2, 11 or 22 GPUs, or another batch.

Expect: bits per character above the 1.08 of text8_large, with tgt_len 80, mem_len 2100, clamp_len
820 and same_length; the original published no result and no time. 4.5 billion tokens.
"""

from configs._machines import ONE_L40S
from configs._original import CHARACTERS_BASE, experiment
from txl_jax.config import Config, DataConfig


def config() -> Config:
    data = DataConfig(dataset="text8", vocab="bytes")
    return experiment(CHARACTERS_BASE, data, batch=22, steps=400_000, cluster=ONE_L40S)
