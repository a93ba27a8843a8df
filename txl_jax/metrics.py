"""The numbers that a run shows: their names in TensorBoard, and what they mean."""

import math
import resource
from typing import Any

import jax

from txl_jax.logs import Progress, progress_line
from txl_jax.measure import Measure
from txl_jax.pace import Speed
from txl_jax.precision import LossScale
from txl_jax.step import Totals


def learning(totals: Totals, measure: Measure) -> dict[str, float]:
    """Mean loss in nats and in `measure`, mean gradient norm of some steps, the last one's rate.

    The means are nan if every step overflowed.
    """
    loss = _mean(totals.loss, totals.tokens)
    return {
        "learning/loss": loss,
        f"learning/{measure.tag}": measure.of(loss),
        "learning/lr": float(totals.learning_rate),
        "learning/grad_norm": _mean(totals.grad_norm, totals.steps),
    }


def _mean(total: Any, n: Any) -> float:
    return float(total / n) if n else math.nan


def scaling(loss_scale: LossScale | None) -> dict[str, float]:
    """The loss scale, and how many steps of the run have overflowed; nothing without one."""
    if loss_scale is None:
        return {}
    return {
        "learning/loss_scale": float(loss_scale.scale),
        "learning/overflows": int(loss_scale.overflows),
    }


def validation(loss: float, measure: Measure) -> dict[str, float]:
    """Mean loss on the valid split, in nats and in `measure`."""
    return {"learning/val_loss": loss, f"learning/val_{measure.tag}": measure.of(loss)}


def times(speed: Speed) -> dict[str, float]:
    """Time and memory: milliseconds, rates in 1/s, bytes."""
    shown = {
        "times/step": 1000 * speed.step_seconds,
        "times/input": 1000 * speed.input_seconds,
        "times/tokens_per_sec": speed.tokens_per_sec,
        "times/samples_per_sec": speed.samples_per_sec,
        "memory/host_peak": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    if speed.mfu is not None:
        shown["times/mfu"] = speed.mfu
    if on_device := jax.local_devices()[0].memory_stats():
        shown["memory/device_peak"] = on_device["peak_bytes_in_use"]
    return shown


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def sizes(params: Any) -> dict[str, float]:
    """Number of all parameters and, as in the original, of those of the layers."""
    return {
        "sizes/params": count(params),
        "sizes/non_emb_params": count(params["layers"]),
    }


def log_line(
    step: int,
    steps: int,
    tokens: int,
    shown: dict[str, float],
    speed: Speed,
    measure: Measure,
) -> str:
    """The line on the terminal after `step` of `steps` steps, which have seen `tokens` tokens."""
    return progress_line(
        Progress(
            step=step,
            steps=steps,
            tokens=tokens,
            loss=shown["learning/loss"],
            measure=measure,
            lr=shown["learning/lr"],
            step_seconds=speed.step_seconds,
            tokens_per_sec=speed.tokens_per_sec,
            mfu=speed.mfu,
            seconds_left=(steps - step) * speed.step_seconds,
        )
    )


def validation_line(step: int, loss: float, measure: Measure) -> str:
    """The line on the terminal after a validation."""
    return f"step {step} | validation loss {loss:.4f} | {measure.progress(loss)}"
