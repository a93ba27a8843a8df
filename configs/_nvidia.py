"""What NVIDIA's recipes for WikiText-103 have in common.

DeepLearningExamples, PyTorch/LanguageModeling/Transformer-XL: LAMB with a high learning rate that
falls along a cosine. There the cosine begins after the warm-up, here it is read at the tokens since
the start of the run; and each stream starts at a random place there (`roll`), which is not done
here. The cutoffs leave room in the head for three clusters, so that it has 20,000 rows.
"""

from dataclasses import replace

from configs._machines import EIGHT_A100
from txl_jax.config import ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

_CUTOFFS = (19_997, 39_997, 199_997)

BASE = ModelConfig(
    n_layer=16,
    d_model=512,
    n_head=8,
    d_head=64,
    d_inner=2048,
    tgt_len=192,
    mem_len=192,
    dropout=0.1,
    cutoffs=_CUTOFFS,
    dtype="float16",
)

LARGE = ModelConfig(
    n_layer=18,
    d_model=1024,
    n_head=16,
    d_head=64,
    d_inner=4096,
    tgt_len=384,
    mem_len=384,
    dropout=0.2,
    dropatt=0.2,
    init_std=0.005,
    cutoffs=_CUTOFFS,
    div_val=4,
    dtype="float16",
)

_CLUSTER = replace(EIGHT_A100, zero=1)
"""On four H200 both models were faster with zero 1 (bench/LOG.md)."""


def base(
    model: ModelConfig = BASE, accumulate: int = 1, cluster: ClusterConfig = _CLUSTER
) -> Config:
    """40,000 steps of 256 sequences."""
    return _experiment(
        model, 256, 40_000, warmup_steps=1000, final_lr=0.1, accumulate=accumulate, cluster=cluster
    )


def large(
    model: ModelConfig = LARGE, accumulate: int = 1, cluster: ClusterConfig = _CLUSTER
) -> Config:
    """100,000 steps of 128 sequences."""
    return _experiment(
        model,
        128,
        100_000,
        warmup_steps=16_000,
        final_lr=0.01,
        accumulate=accumulate,
        cluster=cluster,
    )


def _experiment(
    model: ModelConfig,
    batch: int,
    steps: int,
    warmup_steps: int,
    final_lr: float,
    accumulate: int,
    cluster: ClusterConfig,
) -> Config:
    step_tokens = batch * model.tgt_len
    return Config(
        model=model,
        data=DataConfig(dataset="wikitext-103", vocab="words"),
        optim=OptimConfig(
            optim="lamb",
            lr=0.01,
            scheduler="cosine",
            warmup_tokens=warmup_steps * step_tokens,
            final_lr=final_lr,
        ),
        train=TrainConfig(
            batch=batch,
            accumulate=accumulate,
            max_tokens=steps * step_tokens,
            seed=1111,
            log_every=100,
            eval_every=5000,
        ),
        cluster=cluster,
    )
