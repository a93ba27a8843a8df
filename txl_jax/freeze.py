"""Layers that are not trained, as the fork's `freeze_below`: the lowest of the model.

Embedding, softmax and the biases that all layers share go on learning; what a layer has for itself
(with `untie_r` its biases too) is frozen with it.
"""

from typing import Any

import jax

from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.model import stacked


def check(cfg: Config) -> None:
    """Raises UserError, in one line, unless the model has the layers that are to be frozen."""
    if not 0 <= cfg.optim.freeze_below <= cfg.model.n_layer:
        raise UserError(
            f"freeze_below is {cfg.optim.freeze_below}; it has to be from 0 (train all layers) to "
            f"n_layer, {cfg.model.n_layer}"
        )


def zero_frozen(cfg: Config, tree: Any) -> Any:
    """`tree`, gradients or updates of the parameters, with zeros in place of frozen layers'.

    Gradients, so that they do not count in the norm; updates, so that neither an optimizer's state
    nor weight decay moves what is frozen.
    """
    below = cfg.optim.freeze_below
    if not below:
        return tree
    over_layers = stacked(cfg.model)
    return {
        name: jax.tree.map(lambda leaf: leaf.at[:below].set(0), part)
        if name in over_layers
        else part
        for name, part in tree.items()
    }
