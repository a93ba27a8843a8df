"""One Billion Words, the original's large model.

    python -m txl_jax.train --local --config lm1b_large

Source: pytorch/run_lm1b_large.sh of kimiyoung/transformer-xl. The original draws the sentences in
another order in every epoch; here they keep their order.

Expect: test perplexity 21.8 with mem_len 128 and same_length (the original's README), after 2 to 5
days on 512 TPU cores (its tf/README). 20 billion tokens.
"""

from configs._original import LM1B_CUTOFFS, LM1B_TIE_PROJS, ONE_BILLION_WORDS, experiment
from txl_jax.config import Config, ModelConfig


def config() -> Config:
    model = ModelConfig(
        n_layer=24,
        d_model=1280,
        n_head=16,
        d_head=80,
        d_inner=8192,
        tgt_len=32,
        mem_len=32,
        dropout=0.05,
        dropatt=0.05,
        cutoffs=LM1B_CUTOFFS,
        div_val=4,
        tie_projs=LM1B_TIE_PROJS,
    )
    return experiment(model, ONE_BILLION_WORDS, batch=512, steps=1_200_000, warmup_steps=30_000)
