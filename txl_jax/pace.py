"""How fast training goes: time and throughput of the steps between two log lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jax.sharding import Mesh

from txl_jax import flops
from txl_jax.config import Config


@dataclass(frozen=True)
class Speed:
    """Means over the steps of a lap."""

    step_seconds: float
    """Wall time of a step."""
    input_seconds: float
    """Part of it in which the host waited for the batch."""
    tokens_per_sec: float
    samples_per_sec: float
    """Sequences in a second."""
    mfu: float | None
    """Model FLOP/s as a fraction of the devices' peak; None where the peak is not known."""


class Pace:
    """Times laps of steps; what `paused` encloses (evaluation, saving) does not count."""

    def __init__(self, cfg: Config, mesh: Mesh):
        self._cfg, self._mesh = cfg, mesh
        self._left_out = 0.0, 0.0, 1
        self._begin()

    def restart(self) -> None:
        """Begins the lap anew: what came before counts only if no step follows in it."""
        self._left_out = time.perf_counter() - self._since, self._input, self._steps
        self._begin()

    def _begin(self) -> None:
        self._since, self._input, self._steps = time.perf_counter(), 0.0, 0

    def step(self) -> None:
        """Counts a step."""
        self._steps += 1

    @contextmanager
    def input(self) -> Iterator[None]:
        """Counts what it encloses as waiting for the batch."""
        began = time.perf_counter()
        yield
        self._input += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes what it encloses out of the lap."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def lap(self) -> Speed:
        """The speed since the lap began, and the beginning of the next; the steps must be done."""
        seconds, waited, steps = time.perf_counter() - self._since, self._input, self._steps
        if not steps:
            seconds, waited, steps = self._left_out
        step_seconds = max(seconds, 1e-9) / max(steps, 1)
        input_seconds = waited / max(steps, 1)
        self._begin()
        sequences = self._cfg.train.batch / step_seconds
        tokens = sequences * self._cfg.model.tgt_len
        mfu = flops.utilization(self._cfg.model, tokens, self._mesh)
        return Speed(step_seconds, input_seconds, tokens, sequences, mfu)
