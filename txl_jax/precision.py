"""The type of activations: which devices compute in it, and loss scaling for float16.

float16 has the precision that training needs but not the range: gradients below 6e-8 vanish. So
the loss is multiplied by a large scale before the backward pass and the gradients are divided by it
afterwards (Micikevicius et al. 2018, arXiv 1710.03740). The scale is as large as it can be: a step
whose gradients overflow is not applied and halves it, many good steps in a row double it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from txl_jax.checks import check_capability
from txl_jax.errors import UserError

FIRST_SCALE, FLOOR, CEILING = 2.0**16, 1.0, 2.0**24
"""The original's first and lowest scale; beyond the ceiling nothing is gained."""
GROW_AFTER = 1000
"""Good steps in a row after which the scale is doubled, as in the original."""
GIVE_UP_AFTER = 20
"""Steps in a row that overflow at the lowest scale before the run is given up."""


def check_device(dtype: str, device: Any) -> None:
    """Raises UserError if `device`, one of `jax.devices()`, does not compute in `dtype`.

    CPUs compute in every type, if slowly; NVIDIA's GPUs do from a compute capability on; others
    than these two do in float32 and bfloat16.
    """
    if device.platform == "cpu" or dtype == "float32":
        return
    if device.platform == "gpu":
        # What other makers' devices call their capability is not a number.
        capability = getattr(device, "compute_capability", "")
        if capability.replace(".", "", 1).isdigit():
            check_capability(dtype, float(capability), device.device_kind)
    elif dtype != "bfloat16":
        raise UserError(
            f"dtype is {dtype} and the device ({device.device_kind}) does not compute in {dtype}; "
            "use --dtype bfloat16"
        )


class LossScale(NamedTuple):
    """What the loss is multiplied by, and how that has gone so far."""

    scale: jax.Array
    """float32: a power of two."""
    good: jax.Array
    """int32: steps without overflow since the scale last changed."""
    stuck: jax.Array
    """int32: steps in a row that overflowed at the lowest scale; from GIVE_UP_AFTER on it stays."""
    overflows: jax.Array
    """int32: steps of the run that overflowed."""

    def after(self, overflowed: jax.Array) -> "LossScale":
        """The state after a step, of which `overflowed` (bool) says whether it was lost."""
        grows = ~overflowed & (self.good + 1 >= GROW_AFTER)
        factor = jnp.where(overflowed, 0.5, jnp.where(grows, 2.0, 1.0))
        at_floor = overflowed & (self.scale <= FLOOR)
        given_up = self.stuck >= GIVE_UP_AFTER
        return LossScale(
            scale=jnp.clip(self.scale * factor, FLOOR, CEILING),
            good=jnp.where(overflowed | grows, 0, self.good + 1),
            stuck=jnp.where(given_up, self.stuck, jnp.where(at_floor, self.stuck + 1, 0)),
            overflows=self.overflows + overflowed.astype(jnp.int32),
        )


def begin(dtype: str) -> LossScale | None:
    """The state before the first step, as NumPy scalars; None where nothing is scaled."""
    if dtype != "float16":
        return None
    zero = np.int32(0)
    return LossScale(np.float32(FIRST_SCALE), zero, zero, zero)  # pyright: ignore[reportArgumentType]
