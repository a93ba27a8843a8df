"""Layers that are not trained, as the fork's `freeze_below`: the lowest of the model.

Embedding, softmax and the biases that all layers share go on learning; what a layer has for itself
(with `untie_r` its biases too) is frozen with it.
"""

from typing import Any

import jax

from txl_jax.config import Config
from txl_jax.model import stacked


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
