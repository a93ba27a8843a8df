"""WikiText-103, the original's base model: 151 million parameters, Adam, 200,000 steps.

    python -m txl_jax.train --local --config wt103_base

Source: pytorch/run_wt103_base.sh of kimiyoung/transformer-xl, on 4 GPUs of 11 GB.

Expect: test perplexity 24.03 with tgt_len 64, mem_len 640, clamp_len 400 and same_length (the
original's README). It says nothing of the time. 1.8 billion tokens.
"""

from configs._machines import FOUR_A10G
from configs._original import WIKITEXT_103, WT103_CUTOFFS, experiment
from txl_jax.config import Config, ModelConfig


def config() -> Config:
    model = ModelConfig(
        n_layer=16,
        d_model=410,
        n_head=10,
        d_head=41,
        d_inner=2100,
        tgt_len=150,
        mem_len=150,
        dropout=0.1,
        cutoffs=WT103_CUTOFFS,
    )
    return experiment(model, WIKITEXT_103, batch=60, steps=200_000, cluster=FOUR_A10G)
