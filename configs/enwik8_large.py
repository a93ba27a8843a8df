"""enwik8, 100 million bytes of Wikipedia: the original's large model, 277 million parameters.

    python -m txl_jax.train --local --config enwik8_large

Source: pytorch/run_enwik8_large.sh of kimiyoung/transformer-xl.

Expect: 0.99 bits per character on test with tgt_len 128, mem_len 3800, clamp_len 1000 and
same_length (the original's README), after 2 to 5 days on 32 TPU cores (its tf/README). 20 billion
tokens.
"""

from configs._machines import EIGHT_A100_80
from configs._original import CHARACTERS_LARGE, experiment
from txl_jax.config import Config, DataConfig


def config() -> Config:
    data = DataConfig(dataset="enwik8", vocab="bytes")
    return experiment(
        CHARACTERS_LARGE, data, batch=64, steps=400_000, warmup_steps=4000, cluster=EIGHT_A100_80
    )
