"""One Billion Words, the original's base model.

    python -m txl_jax.train --local --config lm1b_base

Source: pytorch/run_lm1b_base.sh of kimiyoung/transformer-xl, on 4 GPUs or more. Sentences
come in another order in every epoch.

Expect: the paper has a test perplexity of 23.5 for a base model of 0.46 billion parameters; this
script's has 0.36 billion, and no result or time was published for it. Evaluate with mem_len 128 and
same_length. 3.6 billion tokens.
"""

from configs._original import LM1B_CUTOFFS, LM1B_TIE_PROJS, ONE_BILLION_WORDS, experiment
from txl_jax.config import Config, ModelConfig


def config() -> Config:
    model = ModelConfig(
        n_layer=18,
        d_model=1024,
        n_head=8,
        d_head=128,
        d_inner=4096,
        tgt_len=32,
        mem_len=32,
        cutoffs=LM1B_CUTOFFS,
        div_val=4,
        tie_projs=LM1B_TIE_PROJS,
    )
    return experiment(model, ONE_BILLION_WORDS, batch=224, steps=500_000, warmup_steps=20_000)
