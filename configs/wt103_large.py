"""WikiText-103, the original's large model: 285 million parameters, Adam, 4,000,000 steps.

    python -m txl_jax.train --local --config wt103_large

Source: pytorch/run_wt103_large.sh of kimiyoung/transformer-xl.

Expect: test perplexity 18.3 with tgt_len 128, mem_len 1600, clamp_len 1000 and same_length (the
original's README), after 2 to 5 days on 64 TPU cores (its tf/README). 197 billion tokens.
"""

from configs._original import WIKITEXT_103, WT103_CUTOFFS, experiment
from txl_jax.config import Config, ModelConfig


def config() -> Config:
    model = ModelConfig(
        n_layer=18,
        d_model=1024,
        n_head=16,
        d_head=64,
        d_inner=4096,
        tgt_len=384,
        mem_len=384,
        dropout=0.2,
        dropatt=0.2,
        cutoffs=WT103_CUTOFFS,
        div_val=4,
    )
    return experiment(model, WIKITEXT_103, batch=128, steps=4_000_000, warmup_steps=16_000)
