"""How fast this process's devices are by themselves.

In data-parallel training all processes take the same time for a step: that of the slowest. So each
times a small computation that is the same on all hosts and waits for no other.
"""

import time

import jax
import jax.numpy as jnp

_SIZE = {"cpu": 256}
_GPU_SIZE = 2048
_PRODUCTS = 8
_REPEATS = 3


class OwnSpeed:
    """Times a chain of products of matrices [2048, 2048] (on CPUs 256), float32, on local devices.

    `several`: whether there are other processes; alone, nothing is timed.
    """

    def __init__(self, several: bool):
        devices = jax.local_devices() if several else []
        size = _SIZE.get(devices[0].platform, _GPU_SIZE) if devices else 0
        # Products of this matrix with itself are this matrix.
        self._operands = [jax.device_put(jnp.full((size, size), 1 / size), d) for d in devices]
        self._work = jax.jit(_chain)
        self._time()  # it is compiled

    def times(self) -> dict[str, float]:
        """Milliseconds as `times/own`, the least of three; the devices have to be idle."""
        if not self._operands:
            return {}
        return {"times/own": 1000 * min(self._time() for _ in range(_REPEATS))}

    def _time(self) -> float:
        """Seconds until the last device is done."""
        began = time.perf_counter()
        jax.block_until_ready([self._work(operand) for operand in self._operands])
        return time.perf_counter() - began


def _chain(matrix: jax.Array) -> jax.Array:
    result = matrix
    for _ in range(_PRODUCTS):
        # In TF32, which GPUs have for float32, it would be over before all devices have begun.
        result = jnp.matmul(result, matrix, precision=jax.lax.Precision.HIGHEST)
    return result
