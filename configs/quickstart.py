"""Bytes of Python's standard library: a Transformer-XL in under five minutes on two CPU cores.

    python -m txl_jax.train --local

Expect: 1.76 bits per byte on valid and 1.79 on test with mem_len 32, 2.19 and 2.22 without memory
(the seed moves these by about 0.01, the Python version changes the corpus a little), in 3 min 59 s
with evaluation, by `make train` on 2 cores of an AMD EPYC; peak memory 0.8 GB. With 4.5 M tokens
(`--max-tokens 4500000 --warmup-tokens 270000`): 1.73 and 1.74.

How shape and settings were found is in bench/LOG.md: small steps, and many of them.
"""

from txl_jax.config import ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        model=ModelConfig(
            n_layer=3,
            d_model=128,
            n_head=2,
            d_head=32,
            d_inner=512,
            tgt_len=32,
            mem_len=32,
            init_std=0.06,
        ),
        data=DataConfig(dataset="stdlib", vocab="bytes"),
        optim=OptimConfig(
            optim="adam",
            lr=1.75e-3,
            scheduler="cosine",
            warmup_tokens=230_000,
            beta1=0.7,
            beta2=0.995,
            clip=0.25,
        ),
        train=TrainConfig(batch=16, max_tokens=3_800_000, log_every=500, eval_every=2500),
        cluster=ClusterConfig(instance_type="c7i.xlarge"),
    )
