"""Optimizers, and learning rates as functions of the tokens seen."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from txl_jax.config import OptimConfig, TrainConfig
from txl_jax.errors import UserError


def check(cfg: OptimConfig) -> None:
    """Raises UserError, in one line, for the first field of `cfg` that cannot work."""
    if cfg.lr <= 0:
        raise UserError(f"lr is {cfg.lr}; it has to be above 0")
    for name in ("lr_batch", "warmup_tokens", "clip"):
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} is {getattr(cfg, name)}; it has to be 0 (off) or more")
    for name in ("beta1", "beta2", "momentum"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"{name} is {getattr(cfg, name)}; it has to be in [0, 1)")
    if not 0 <= cfg.final_lr <= 1:
        raise UserError(f"final_lr is {cfg.final_lr}, a fraction of lr; it has to be in [0, 1]")


class AdamState(NamedTuple):
    """Decaying means of the gradient and of its square, and the number of updates so far."""

    mean: Any
    mean_square: Any
    count: jax.Array


def adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, algorithm 1) as torch.optim.Adam computes it, for a rate of 1.

    Not optax.adam: that one computes 1 - beta**count in float32 by subtraction, 1e-5 off in the
    first updates; here it is exact to rounding.
    """

    def init(params: Any) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(zeros, jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        del params
        count = state.count + 1
        done = count.astype(jnp.float32)
        corrected1 = -jnp.expm1(done * math.log(beta1)) if beta1 else 1.0
        corrected2 = -jnp.expm1(done * math.log(beta2)) if beta2 else 1.0
        mean = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, updates)
        square = jax.tree.map(
            lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.mean_square, updates
        )
        updates = jax.tree.map(
            lambda m, v: -(m / corrected1) / (jnp.sqrt(v / corrected2) + eps), mean, square
        )
        return updates, AdamState(mean, square, count)

    return optax.GradientTransformation(init, update)


def make_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
    """The optimizer for a learning rate of 1; the train step scales its updates by the rate."""
    if cfg.optim == "adam":
        return adam(cfg.beta1, cfg.beta2, cfg.eps)
    return optax.sgd(1.0, momentum=cfg.momentum or None)


def make_schedule(
    cfg: OptimConfig, train: TrainConfig, step_tokens: int
) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of a step, from the number of tokens seen before it.

    During warm-up the rate rises in a line and reaches its peak with the step that completes
    `warmup_tokens`. After it, as in the original, cosine and inverse square root are read at the
    tokens seen since the start of the run, not since the end of warm-up:
    cosine from the peak to `final_lr` x peak at `max_tokens`; inv_sqrt falls as
    sqrt(warmup_tokens / tokens), from the peak.

    Args:
      step_tokens: tokens in one optimizer step.

    Returns:
      float32 scalar → float32 scalar.
    """
    peak = cfg.lr * (train.batch / cfg.lr_batch if cfg.lr_batch else 1.0)
    warmup = max(cfg.warmup_tokens, step_tokens)

    def rate(tokens: jax.Array) -> jax.Array:
        done = jnp.minimum(tokens / float(train.max_tokens), 1.0)  # may be beyond int32
        if cfg.scheduler == "cosine":
            shape = cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif cfg.scheduler == "inv_sqrt":
            shape = jnp.sqrt(warmup / jnp.maximum(tokens + step_tokens, warmup))
        else:
            shape = jnp.ones_like(tokens)
        rising = (tokens + step_tokens) / warmup
        return peak * jnp.where(tokens < cfg.warmup_tokens, jnp.minimum(rising, 1.0), shape)

    return rate


def clip_by_norm(gradients: Any, norm: jax.Array, limit: float) -> Any:
    """Gradients scaled so that their global norm, `norm`, is at most `limit`; 0 sets no limit.

    As torch's clip_grad_norm_: × min(1, limit / (norm + 1e-6)).
    """
    if not limit:
        return gradients
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, gradients)
