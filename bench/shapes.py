"""The shapes that are timed, by name."""

import dataclasses

import jax

from configs import nvidia_base, one_machine, test_1
from txl_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

CPU = ("tiny", "enwik8", "small")
GPU = ("base", "large", "fork_small")


def shape(name: str, dtype: str | None = None) -> Config:
    """The config of a shape, on synthetic tokens, for one device.

    `tiny`, `enwik8` and `small` are those for which the original was timed: dropout 0.1, clip 0.25,
    Adam, float32. `base` is NVIDIA's base model with 32 sequences, `large` the fork's LARGE with
    16, `fork_small` the fork's SMALL with 96, all in bfloat16. `dtype` takes the place of a shape's
    own.
    """
    cfg = _shape(name)
    return _on(cfg, dtype=dtype) if dtype else cfg


def _shape(name: str) -> Config:
    if name == "tiny":
        return _small(ModelConfig(65, 4, 4, 128, 32, 512, tgt_len=64, mem_len=64), batch=16)
    if name == "enwik8":
        return _small(ModelConfig(205, 12, 8, 512, 64, 2048, tgt_len=128, mem_len=128), batch=2)
    if name == "small":
        return _small(ModelConfig(10_000, 16, 8, 512, 48, 2048, tgt_len=128, mem_len=128), batch=2)
    experiment, batch = {
        "base": (nvidia_base, 32),
        "large": (test_1, 16),
        "fork_small": (one_machine, 96),
    }[name]
    cfg = _on(experiment.config(), n_token=267_735, dtype="bfloat16")
    return dataclasses.replace(
        cfg,
        data=DataConfig(dataset="synthetic"),
        train=dataclasses.replace(cfg.train, batch=batch, accumulate=1, throughput=True),
        cluster=dataclasses.replace(cfg.cluster, machines=1, gpus=1),
    )


def here() -> tuple[str, ...]:
    """The shapes that this machine's devices are timed with."""
    return GPU if jax.devices()[0].platform == "gpu" else CPU


def with_steps(cfg: Config, steps: int) -> Config:
    """As `cfg`, for so many steps of training."""
    tokens = steps * cfg.train.batch * cfg.model.tgt_len
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, max_tokens=tokens))


def _small(model: ModelConfig, batch: int) -> Config:
    return Config(
        model=dataclasses.replace(model, dropout=0.1),
        data=DataConfig(dataset="synthetic"),
        optim=OptimConfig(optim="adam", lr=2.5e-4, clip=0.25),
        train=TrainConfig(batch=batch, throughput=True),
    )


def _on(cfg: Config, **model: object) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model))  # pyright: ignore
