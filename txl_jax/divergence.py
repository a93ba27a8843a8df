"""Whether training can go on from a state."""

import jax

from txl_jax import precision
from txl_jax.checkpoint import Checkpoints
from txl_jax.errors import UserError
from txl_jax.step import Totals, TrainState


def finite_totals(state: TrainState, checkpoints: Checkpoints) -> Totals:
    """The state's totals, on the host; UserError if training cannot go on from it.

    That is: a loss or gradient was not finite, or in float16 none is whatever the loss scale.
    """
    totals, loss_scale = jax.device_get((state.totals, state.loss_scale))
    if totals.non_finite_step >= 0:
        problem = (
            f"the loss or its gradient is not finite at step {totals.non_finite_step}: try a lower "
            "--lr, a longer --warmup-tokens or a smaller --clip with another --logdir"
        )
    elif loss_scale and loss_scale.stuck >= precision.GIVE_UP_AFTER:
        problem = (
            f"float16 overflowed in {precision.GIVE_UP_AFTER} steps in a row at the lowest loss "
            "scale: try --dtype bfloat16 or float32, or a lower --lr, with another --logdir"
        )
    else:
        return totals
    checkpoints.wait()
    steps = checkpoints.steps()
    raise UserError(f"{problem} (last checkpoint: {f'step {steps[-1]}' if steps else 'none'})")
