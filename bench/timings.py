"""What is timed of a shape, each in a process of its own: `python -m bench.timings SHAPE PART`.

Prints one line of JSON. Times are a median and the first and third quartile.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import shapes
from txl_jax import flops, host_memory, sharding, throughput
from txl_jax.account import account
from txl_jax.checks import WARM_UP
from txl_jax.config import Config
from txl_jax.decoding import Sampling
from txl_jax.evaluator import Evaluator
from txl_jax.generator import Generator
from txl_jax.peers import Peers
from txl_jax.step import init_state, make_train_step, place_batch

_TRAIN_STEPS = 50
_SEGMENTS = 40
_TOKENS_AT_ONCE = 32
_CHUNKS = 24
"""Times `_TOKENS_AT_ONCE` tokens are generated: many times as many as memory holds."""
_PRODUCTS = 20


def train(cfg: Config) -> dict[str, Any]:
    """Steps of training, and what part they are of the matrix products that the machine can do."""
    cfg, streams = throughput.open_streams(
        shapes.with_steps(cfg, WARM_UP + _TRAIN_STEPS), Peers(None)
    )
    found = throughput.measure(cfg, sharding.make_mesh(), streams)
    rate = found["tokens_per_s"]["median"] * flops.train_flops_per_token(cfg.model)
    return {
        "ms": found["ms_per_step"],
        "tokens_per_s": found["tokens_per_s"]["median"],
        "flops_per_s": rate,
        "of_ceiling": rate / _ceiling(cfg.model.dtype),
        "peak_device_bytes": found["peak_device_bytes"],
    }


def evaluate(cfg: Config) -> dict[str, Any]:
    """Segments of an evaluation with the shape's batch."""
    mesh, batch, tgt_len = sharding.make_mesh(), cfg.train.batch, cfg.model.tgt_len
    params = init_state(cfg, mesh).params
    ends: list[float] = []
    timed = Evaluator(cfg.model, mesh, batch, on_segment=lambda: ends.append(time.perf_counter()))
    tokens = throughput.zipf(cfg.model.n_token, (WARM_UP + _SEGMENTS) * batch * tgt_len + 1)
    timed(params, tokens)
    ms = 1000 * np.diff(ends)[WARM_UP - 1 :]
    return {"ms": _spread(ms), "tokens_per_s": batch * tgt_len / np.median(ms) * 1000}


def generate(cfg: Config) -> dict[str, Any]:
    """Tokens drawn one after another, batch 1, at the beginning and at the end of a long text."""
    mesh = sharding.make_mesh()
    params = init_state(cfg, mesh).params
    draw = Generator(cfg.model, mesh, Sampling(), at_once=_TOKENS_AT_ONCE)
    # The first call compiles.
    for n_chunks in (2, _CHUNKS):
        ends = []
        for _ in draw(params, np.zeros(1, np.int32), 0, n_chunks * _TOKENS_AT_ONCE):
            ends.append(time.perf_counter())
    ms = 1000 * np.diff(ends) / _TOKENS_AT_ONCE
    third = len(ms) // 3
    return {
        "ms": _spread(ms),
        "first_third_ms": float(np.median(ms[:third])),
        "last_third_ms": float(np.median(ms[-third:])),
    }


def data(cfg: Config) -> dict[str, Any]:
    """Making the next batch on the host and handing it to the device."""
    cfg, streams = throughput.open_streams(cfg, Peers(None))
    mesh = sharding.make_mesh()
    rows = sharding.local_rows(mesh, cfg.train.batch)

    def once(n: int) -> None:
        jax.block_until_ready(place_batch(cfg, mesh, streams.at(n, rows)))

    return {"ms": _spread(1000 * _seconds(once, 200))}


def compile(cfg: Config) -> dict[str, Any]:
    """Tracing and compiling the train step, with nothing in a cache; and what it will take."""
    mesh = sharding.make_mesh()
    jax.config.update("jax_enable_compilation_cache", False)
    begun = time.perf_counter()
    state = init_state(cfg, mesh)
    initial = time.perf_counter() - begun
    tokens = np.zeros((cfg.train.batch, cfg.model.tgt_len), np.int32)
    begun = time.perf_counter()
    step: Any = make_train_step(cfg, mesh, segments=2)
    lowered = step.lower(state, *place_batch(cfg, mesh, (tokens, tokens)))
    traced = time.perf_counter() - begun
    lowered.compile()
    compiled = time.perf_counter() - begun - traced
    found = account(cfg, mesh)
    return {
        "trace_s": traced,
        "compile_s": compiled,
        "init_s": initial,
        "temporary_bytes": found.temporary_bytes,
        "parameters": found.parameters,
    }


PARTS: dict[str, Callable[[Config], dict[str, Any]]] = {
    part.__name__: part for part in (train, evaluate, generate, data, compile)
}


def _ceiling(dtype: str) -> float:
    """FLOP/s of a large matrix product on one device, the best of several."""
    n = 8192 if jax.devices()[0].platform == "gpu" else 2048
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)
    return 2 * n**3 / float(_seconds(lambda _: jax.block_until_ready(product(a)), _PRODUCTS).min())


def _seconds(once: Callable[[int], Any], times: int) -> np.ndarray:
    """Of each call but the first ones."""
    ends = []
    for n in range(WARM_UP + times + 1):
        once(n)
        ends.append(time.perf_counter())
    return np.diff(ends)[WARM_UP:]


def _spread(ms: np.ndarray) -> dict[str, float]:
    return dict(zip(("q1", "median", "q3"), np.percentile(ms, [25, 50, 75]).tolist(), strict=True))


def machine() -> dict[str, Any]:
    """On what it was timed."""
    device = jax.devices()[0]
    names = (line for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return {
        "device": device.device_kind if device.platform != "cpu" else "CPU",
        "cpu": next(names, ":").partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
    }


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


def main(name: str, part: str) -> None:
    cfg = shapes.shape(name)
    host_memory.keep_freed(sharding.make_mesh())
    found = {"shape": name, "part": part} | PARTS[part](cfg)
    found["peak_host_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(found | machine()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
