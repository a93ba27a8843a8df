"""What the experiments of kimiyoung/transformer-xl have in common (the scripts in pytorch/).

The original counts steps; here the same number of tokens is given. It validates with segments of
eval_tgt_len and a batch of 10; here validation has the segments of training. The numbers of the
paper come from evaluations with a longer memory, which each script names.
"""

from configs._machines import EIGHT_A100
from txl_jax.config import ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def experiment(
    model: ModelConfig,
    data: DataConfig,
    batch: int,
    steps: int,
    warmup_steps: int = 0,
    cluster: ClusterConfig = EIGHT_A100,
) -> Config:
    """An experiment of `steps` steps with Adam and a cosine to 0."""
    step_tokens = batch * model.tgt_len
    return Config(
        model=model,
        data=data,
        optim=OptimConfig(
            optim="adam",
            lr=0.00025,
            scheduler="cosine",
            warmup_tokens=warmup_steps * step_tokens,
            clip=0.25,
        ),
        train=TrainConfig(
            batch=batch,
            max_tokens=steps * step_tokens,
            seed=1111,
            log_every=200,
            eval_every=4000,
        ),
        cluster=cluster,
    )


WIKITEXT_103 = DataConfig(dataset="wikitext-103", vocab="words")
ONE_BILLION_WORDS = DataConfig(dataset="lm1b", vocab="words")

WT103_CUTOFFS = (20_000, 40_000, 200_000)
LM1B_CUTOFFS = (60_000, 100_000, 640_000)
LM1B_TIE_PROJS = (False,) * 4

CHARACTERS_BASE = ModelConfig(
    n_layer=12,
    d_model=512,
    n_head=8,
    d_head=64,
    d_inner=2048,
    tgt_len=512,
    mem_len=512,
    dropout=0.1,
)
"""The base model of enwik8 and text8."""

CHARACTERS_LARGE = ModelConfig(
    n_layer=24,
    d_model=1024,
    n_head=8,
    d_head=128,
    d_inner=3072,
    tgt_len=768,
    mem_len=768,
    dropout=0.15,
    dropatt=0.15,
)
"""The large model of enwik8 and text8."""
