"""text8, 100 million letters of Wikipedia: the original's large model, 277 million parameters.

    python -m txl_jax.train --local --config text8_large

Source: pytorch/run_text8_large.sh of kimiyoung/transformer-xl. Unlike that of enwik8 it
has no warm-up.

Expect: 1.08 bits per character on test with tgt_len 128, mem_len 3800, clamp_len 1000 and
same_length (the original's README), after 2 to 5 days on 32 TPU cores (its tf/README). 20 billion
tokens.
"""

from configs._machines import EIGHT_A100_80
from configs._original import CHARACTERS_LARGE, experiment
from txl_jax.config import Config, DataConfig


def config() -> Config:
    data = DataConfig(dataset="text8", vocab="bytes")
    return experiment(CHARACTERS_LARGE, data, batch=64, steps=400_000, cluster=EIGHT_A100_80)
