"""A Transformer-XL over the source of Python's standard library, in minutes on a laptop's CPU."""

from txl_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        model=ModelConfig(n_layer=4, d_model=128, n_head=4, d_head=32, d_inner=512),
        data=DataConfig(dataset="stdlib", vocab="bytes"),
        optim=OptimConfig(optim="adam", lr=2e-3, warmup_tokens=60_000),
        train=TrainConfig(batch=16, max_tokens=2_000_000),
    )
