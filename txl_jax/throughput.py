"""The speed of training and nothing else: `python -m txl_jax.train … --throughput`.

The config's train step on real tokens, or on synthetic ones that need no files (`--dataset
synthetic --n-token V`). The first steps warm up: they compile, and the devices reach their clock.
Each of the others is timed. The result goes to standard output as two lines, one to read and one
of JSON. Nothing is written, but for the token files of a real data set that has none yet.
"""

import json
import math
import platform
import time
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray
from tqdm import tqdm

from txl_jax import flops, metrics, preflight, sharding, token_files
from txl_jax.checks import WARM_UP, check_throughput
from txl_jax.config import Config
from txl_jax.peers import Peers
from txl_jax.prefetch import Prefetch
from txl_jax.step import Totals, init_state, make_train_step, place_batch
from txl_jax.streams import Streams, training_streams

SEGMENTS = 16
"""Segments of each synthetic stream; they come again and again. The first has no memory yet: its
step is shorter."""
ZIPF_EXPONENT, ZIPF_SHIFT = 1.3, 5.0
_PACKAGES = ("jax", "jaxlib", "flax")


def run(name: str, cfg: Config, mesh: Mesh, peers: Peers) -> int:
    """Measures the config `name`; process 0 prints what comes out. Returns the exit status.

    Raises UserError: no step would be left to time, the data set cannot be used or is another one
    on another host …
    """
    check_throughput(cfg)
    cfg, streams = open_streams(cfg, peers)
    found = {"config": name} | measure(cfg, mesh, streams)
    if jax.process_index() == 0:
        print(show(found))
        print(json.dumps(found), flush=True)
    return 0


def open_streams(cfg: Config, peers: Peers) -> tuple[Config, Streams]:
    """The streams to train on, and `cfg` with the vocabulary's size filled in.

    Raises UserError: synthetic tokens of no vocabulary, a data set that cannot be used, is too
    short, or is not that of the other processes.
    """
    batch, tgt_len = cfg.train.batch, cfg.model.tgt_len
    if cfg.data.dataset == "synthetic":
        drawn = zipf(cfg.model.n_token, batch * (SEGMENTS * tgt_len + 1))
        return cfg, Streams.trimmed(drawn, batch, tgt_len)
    tokens = token_files.prepare(cfg.data)
    peers.check_same({"token files": tokens.fingerprint})
    cfg = preflight.with_vocabulary(cfg, tokens.vocab)
    return cfg, training_streams(cfg, tokens)


def zipf(n_token: int, size: int) -> NDArray[np.int32]:
    """`size` tokens, the same at every call, drawn one by one: rarer ones have higher ids.

    Token i has a probability in proportion to (i + 1 + 5)^-1.3, the law of Zipf and Mandelbrot.
    With the vocabulary and the cutoffs of WikiText-103 (20,000, 40,000 and 200,000 of 267,735) the
    head then has 95.2 % of the tokens and the tails 1.7, 2.8 and 0.4 %; its real text has about
    94.9, 2.2, 2.7 and 0.2 % (counted back from its word counts at the cutoffs).
    """
    drawn = np.random.default_rng(0).choice(n_token, size, p=zipf_probabilities(n_token))
    return drawn.astype(np.int32)


def zipf_probabilities(n_token: int) -> NDArray[np.float64]:
    """Those of the tokens that `zipf` draws, float64 [V]."""
    weights = (np.arange(1, n_token + 1) + ZIPF_SHIFT) ** -ZIPF_EXPONENT
    return weights / weights.sum()


def measure(cfg: Config, mesh: Mesh, streams: Streams) -> dict[str, Any]:
    """Trains for the config's number of steps, and what is known of their speed, ready for JSON.

    `ms_per_step`, `sequences_per_s` and `tokens_per_s` hold a median and the first and third
    quartile over the timed steps, q1 below q3; the rates are those of the whole mesh, and of the
    quartiles of the time (so that q1 of a rate belongs to q3 of the time). None stands for what
    is not known: `mfu` without a known peak, `peak_device_bytes` where the backend does not count
    (the largest of this process's devices), `loss` if it is not finite (mean over all steps that
    did not overflow, nats).
    """
    state = init_state(cfg, mesh)
    parameters = metrics.count(state.params)
    seconds, totals = time_steps(cfg, mesh, streams, state)
    quartiles = np.percentile(seconds[WARM_UP:], [25, 50, 75])
    batch, tgt_len = cfg.train.batch, cfg.model.tgt_len
    device = mesh.devices.flat[0]
    loss = float(totals.loss / totals.tokens) if totals.tokens else math.nan
    return {
        "dataset": cfg.data.dataset,
        "parameters": parameters,
        "batch": batch,
        "tgt_len": tgt_len,
        "mem_len": cfg.model.mem_len,
        "tokens_per_step": batch * tgt_len,
        "warm_up_steps": WARM_UP,
        "first_step_s": float(seconds[0]),
        "timed_steps": len(seconds) - WARM_UP,
        "ms_per_step": _spread(1000 * quartiles),
        "sequences_per_s": _spread(batch / quartiles[::-1]),
        "tokens_per_s": _spread(batch * tgt_len / quartiles[::-1]),
        "mfu": flops.utilization(cfg.model, batch * tgt_len / quartiles[1], mesh),
        "peak_device_bytes": _peak_bytes(),
        "loss": loss if math.isfinite(loss) else None,
        "devices": mesh.devices.size,
        "processes": jax.process_count(),
        "device_kind": device.device_kind,
        "platform": device.platform,
        "dtype": cfg.model.dtype,
        "remat": cfg.model.remat,
        "accumulate": cfg.train.accumulate,
        "zero": cfg.cluster.zero,
        "fsdp": cfg.cluster.fsdp,
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in _PACKAGES},
    }


def time_steps(cfg: Config, mesh: Mesh, streams: Streams, state: Any) -> tuple[Any, Totals]:
    """Seconds of each step, float64 [steps], and the sums over all of them; `state` is donated.

    Steps follow each other as in a run: while one is under way, the host hands over the next, and
    batches are made ahead.
    A step lasts from the end of the step before it to its own; the first, from the beginning.
    """
    rows = sharding.local_rows(mesh, cfg.train.batch)
    train_step = make_train_step(cfg, mesh, len(streams))
    jax.block_until_ready(state)
    ends, under_way = [time.perf_counter()], None
    hidden = None if jax.process_index() == 0 else True
    steps = range(_steps(cfg))
    with Prefetch(lambda n: place_batch(cfg, mesh, streams.at(n, rows)), steps) as batches:
        for _ in tqdm(steps, unit="step", delay=2, leave=False, disable=hidden):
            state, dispatched = train_step(state, *batches.take())
            if under_way is not None:
                jax.block_until_ready(under_way)
                ends.append(time.perf_counter())
            under_way = dispatched
    jax.block_until_ready(under_way)
    ends.append(time.perf_counter())
    return np.diff(ends), jax.device_get(state.totals)


def show(found: dict[str, Any]) -> str:
    """The line for people."""
    ms, sequences, tokens = (
        found[name] for name in ("ms_per_step", "sequences_per_s", "tokens_per_s")
    )
    parts = [
        f"{found['config']}: {found['devices']} x {found['device_kind']}",
        f"{found['batch']} x {found['tgt_len']} tokens a step",
        f"{ms['median']:.1f} ms/step ({ms['q1']:.1f} to {ms['q3']:.1f})",
        f"{sequences['median']:.1f} sequences/s",
        f"{tokens['median']:,.0f} tokens/s",
    ]
    if found["mfu"] is not None:
        parts.append(f"MFU {found['mfu']:.1%}")
    if found["peak_device_bytes"] is not None:
        parts.append(f"peak {found['peak_device_bytes'] / 1e9:.1f} GB")
    return " | ".join([*parts, f"{found['timed_steps']} steps"])


def _steps(cfg: Config) -> int:
    return -(-cfg.train.max_tokens // (cfg.train.batch * cfg.model.tgt_len))


def _spread(quartiles: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(("q1", "median", "q3"), quartiles.tolist(), strict=True))


def _peak_bytes() -> int | None:
    """The most memory that a device of this process has had in use, in bytes."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=None)
