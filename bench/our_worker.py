"""This project at work, for `bench.compare_torch`: `python -m bench.our_worker SHAPE DTYPE`.

What it is asked and answers is that of `original_worker`.
"""

import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from bench import shapes
from txl_jax import host_memory, sharding
from txl_jax.config import Config
from txl_jax.decoding import Sampling
from txl_jax.evaluator import Evaluator
from txl_jax.generator import Generator
from txl_jax.peers import Peers
from txl_jax.step import init_state, make_train_step, place_batch
from txl_jax.throughput import open_streams, zipf

Seconds = list[float]


def train(cfg: Config) -> Callable[[int], Seconds]:
    cfg, streams = open_streams(shapes.with_steps(cfg, 1000), Peers(None))
    mesh = sharding.make_mesh()
    state, step, done = init_state(cfg, mesh), make_train_step(cfg, mesh, len(streams)), 0

    def run(number: int) -> Seconds:
        nonlocal state, done
        seconds = []
        for _ in range(number):
            began = time.perf_counter()
            state, ready = step(state, *place_batch(cfg, mesh, streams.at(done)))
            jax.block_until_ready(ready)
            seconds.append(time.perf_counter() - began)
            done += 1
        return seconds

    return run


def evaluate(cfg: Config) -> Callable[[int], Seconds]:
    mesh = sharding.make_mesh()
    params, batch = init_state(cfg, mesh).params, cfg.train.batch
    ends: Seconds = []
    evaluator = Evaluator(
        cfg.model, mesh, batch, on_segment=lambda: ends.append(time.perf_counter())
    )

    def run(number: int) -> Seconds:
        # At most two segments are under way, so the first two ends come early.
        ends.clear()
        tokens = zipf(cfg.model.n_token, (number + 2) * batch * cfg.model.tgt_len + 1)
        evaluator(params, tokens)
        return np.diff(ends)[1:].tolist()

    return run


def generate(cfg: Config) -> Callable[[int], Seconds]:
    mesh = sharding.make_mesh()
    params = init_state(cfg, mesh).params
    at_once = 32
    draw = Generator(cfg.model, mesh, Sampling(), at_once=at_once)

    def run(number: int) -> Seconds:
        ends = []
        for _ in draw(params, np.zeros(1, np.int32), 0, (2 + -(-number // at_once)) * at_once):
            ends.append(time.perf_counter())
        return (np.diff(ends) / at_once).tolist()

    return run


def main(name: str, dtype: str) -> None:
    host_memory.keep_freed(sharding.make_mesh())
    cfg = shapes.shape(name, dtype)
    known = {what.__name__: what(cfg) for what in (train, evaluate, generate)}
    print("ready", flush=True)
    for line in sys.stdin:
        what, number = line.split()
        print(json.dumps(known[what](int(number))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
