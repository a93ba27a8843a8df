"""Optimizers, and learning rates as functions of the tokens seen."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from txl_jax import lamb
from txl_jax.config import Config, OptimConfig, TrainConfig


class AdamState(NamedTuple):
    """Decaying means of the gradient and of its square, and the number of updates so far."""

    mean: Any
    mean_square: Any
    count: jax.Array


def adam(
    beta1: float, beta2: float, eps: float, unbiased: bool = True
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, algorithm 1) as torch.optim.Adam computes it, for a rate of 1.

    Not optax.adam: that one computes 1 - beta**count in float32 by subtraction, 1e-5 off in the
    first updates; here it is exact to rounding.

    Args:
      unbiased: whether the means are corrected for starting at zero.
    """

    def init(params: Any) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(zeros, jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        del params
        count = state.count + 1
        done = count.astype(jnp.float32)
        corrected1 = -jnp.expm1(done * math.log(beta1)) if beta1 and unbiased else 1.0
        corrected2 = -jnp.expm1(done * math.log(beta2)) if beta2 and unbiased else 1.0
        mean = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, updates)
        square = jax.tree.map(
            lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.mean_square, updates
        )
        updates = jax.tree.map(
            lambda m, v: -(m / corrected1) / (jnp.sqrt(v / corrected2) + eps), mean, square
        )
        return updates, AdamState(mean, square, count)

    return optax.GradientTransformation(init, update)


class AdagradState(NamedTuple):
    """Sums of the squares of all gradients so far."""

    sum_of_squares: Any


def adagrad(eps: float) -> optax.GradientTransformation:
    """Adagrad (Duchi et al. 2011) as torch.optim.Adagrad computes it, for a rate of 1.

    Not optax.adagrad: there the sums start at 0.1 and eps is added before the root.
    """

    def init(params: Any) -> AdagradState:
        return AdagradState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdagradState]:
        del params
        sums = jax.tree.map(lambda s, g: s + jnp.square(g), state.sum_of_squares, updates)
        updates = jax.tree.map(lambda g, s: -g / (jnp.sqrt(s) + eps), updates, sums)
        return updates, AdagradState(sums)

    return optax.GradientTransformation(init, update)


_EPS = {"adam": 1e-8, "adamw": 1e-8, "adagrad": 1e-10, "lamb": 1e-6, "optax_lamb": 1e-6, "sgd": 0}
"""The original's: PyTorch's, pytorch_lamb's and the library's defaults."""


def make_optimizer(cfg: Config) -> optax.GradientTransformation:
    """The optimizer for a learning rate of 1; the train step scales its updates by the rate.

    Weight decay is that of all parameters, biases and norms included, as in the original. For adam,
    sgd and adagrad it is PyTorch's: decay x weight is added to the gradient. For adamw it is added
    to the update instead, for the LAMBs to the update before its norm is taken.
    """
    name, beta1, beta2 = cfg.optim.optim, cfg.optim.beta1, cfg.optim.beta2
    eps = _EPS[name] if cfg.optim.eps is None else cfg.optim.eps
    decay = cfg.optim.weight_decay
    before, after = optax.add_decayed_weights(decay), optax.add_decayed_weights(-decay)
    if name in ("lamb", "optax_lamb"):
        # optax.lamb itself would take the norm over all layers, which are one leaf here.
        ratio = lamb.forks_ratio if name == "lamb" else lamb.librarys_ratio
        step = adam(beta1, beta2, eps, unbiased=name == "optax_lamb")
        trust = lamb.scale_by_trust_ratio(lamb.tensors(cfg.model), ratio)
        return optax.chain(step, after, trust)
    if name == "adagrad":
        optimizer = adagrad(eps)
    elif name == "sgd":
        optimizer = optax.sgd(1.0, momentum=cfg.optim.momentum or None)
    else:
        optimizer = adam(beta1, beta2, eps)
    if not decay:
        return optimizer
    return optax.chain(optimizer, after) if name == "adamw" else optax.chain(before, optimizer)


def make_schedule(
    cfg: OptimConfig, train: TrainConfig, step_tokens: int
) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of a step, from the number of tokens seen before it.

    During warm-up the rate rises in a line and reaches its peak with the step that completes
    `warmup_tokens`. After it, as in the original, cosine and inverse square root are read at the
    tokens seen since the start of the run, not since the end of warm-up:
    cosine from the peak to `final_lr` x peak at `max_tokens`; inv_sqrt falls as
    sqrt(warmup_tokens / tokens), from the peak. constant stays there, and so does dev_perf, whose
    rate is multiplied by what `plateau.Plateau` says.

    Args:
      step_tokens: tokens in one optimizer step.

    Returns:
      float32 scalar → float32 scalar.
    """
    peak = cfg.peak_lr(train.batch)
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


def clip(cfg: OptimConfig, gradients: Any, norm: jax.Array) -> Any:
    """Gradients of a model, clipped as the config says; `norm` is that of all of them."""
    if not cfg.clip_nonemb:
        return clip_by_norm(gradients, norm, cfg.clip)
    others = {name: part for name, part in gradients.items() if name not in _EMBEDDINGS}
    return gradients | clip_by_norm(others, optax.tree.norm(others), cfg.clip)


_EMBEDDINGS = ("embedding", "output")
"""What the model keeps of its vocabulary."""


def clip_by_norm(gradients: Any, norm: jax.Array, limit: float) -> Any:
    """Gradients scaled so that their global norm, `norm`, is at most `limit`; 0 sets no limit.

    As torch's clip_grad_norm_: × min(1, limit / (norm + 1e-6)).
    """
    if not limit:
        return gradients
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, gradients)
