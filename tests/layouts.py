"""Trains a small model under several layouts: `-m tests.layouts PORT N I DEVICES FILE KIND…`.

Process I of N, with DEVICES devices each; process 0 writes what came of every kind to FILE. A kind
is written `zero=1,accumulate=2`; the fields are those of the config, and nothing for the plain one.
"""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from txl_jax import sharding
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from txl_jax.step import Totals, init_state, make_train_step, place_batch

QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""These programs compile for much longer than they compute."""
ROOT = Path(__file__).resolve().parent.parent
BATCH, TGT_LEN, SEGMENTS, STEPS = 16, 8, 3, 4
CONFIG = Config(
    model=ModelConfig(
        n_token=96,
        n_layer=2,
        n_head=2,
        d_model=16,
        d_head=8,
        d_inner=32,
        tgt_len=TGT_LEN,
        mem_len=12,
        init_std=0.3,
        proj_init_std=0.3,
        dropout=0.1,
        dropatt=0.1,
    ),
    # Far from where rounding decides: Adam's first steps would turn 1e-9 into the sign of a step.
    optim=OptimConfig(optim="lamb", lr=0.01, clip=0.5),
    train=TrainConfig(batch=BATCH, max_tokens=100 * BATCH * TGT_LEN),
)


def config_of(kind: str) -> Config:
    """The config of a kind; the number of cutoffs is 0 or, with `cutoffs=2`, two."""
    sections = {name: getattr(CONFIG, name) for name in ("model", "optim", "train", "cluster")}
    for field in filter(None, kind.split(",")):
        name, _, value = field.partition("=")
        ((section, part),) = ((s, p) for s, p in sections.items() if hasattr(p, name))
        old = getattr(part, name)
        new: Any = (
            (24, 48)
            if name == "cutoffs"
            else type(old)(value if isinstance(old, str) else int(value))
        )
        sections[section] = dataclasses.replace(part, **{name: new})
    return Config(**sections)


def train(cfg: Config) -> dict[str, np.ndarray]:
    """Losses of the steps, gradient norms, and the parameters in the end."""
    mesh = sharding.make_mesh()
    state, step = init_state(cfg, mesh), make_train_step(cfg, mesh, SEGMENTS)
    rng, rows = np.random.default_rng(0), sharding.local_rows(mesh, BATCH)
    losses, norms = [], []
    for _ in range(STEPS):
        # Rare tokens too, and a share of padding that is not the same everywhere.
        inputs, targets = rng.integers(0, cfg.model.n_token, (2, BATCH, TGT_LEN), dtype=np.int32)
        targets[0, 1:] = targets[3] = targets[-1, -1] = -1
        state, _ = step(state, *place_batch(cfg, mesh, (inputs[rows], targets[rows])))
        totals = jax.device_get(state.totals)
        losses.append(totals.loss / totals.tokens)
        norms.append(totals.grad_norm)
        state = state._replace(totals=jax.device_put(Totals.zero(), sharding.repeated(mesh)))
    params = sharding.Layout.of(cfg, mesh).whole(state.params)
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(params)])
    return {"losses": np.asarray(losses), "norms": np.asarray(norms), "params": flat}


def run(folder: Path, processes: int, devices: int, kinds: list[str]) -> dict[str, Any]:
    """What came of every kind, trained by `processes` processes of `devices` devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = folder / f"{processes}x{devices}.npz"
    words = [str(devices), str(file), *kinds]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.layouts", str(port), str(processes), str(i), *words],
            cwd=ROOT,
            env=os.environ | QUICKLY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        ends = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(ends)
    with np.load(file) as found:
        return {
            kind: {name: found[f"{kind} {name}"] for name in ("losses", "norms", "params")}
            for kind in kinds
        }


def main() -> None:
    port, processes, index, devices, file, *kinds = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            int(processes),
            int(index),
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"127.0.0.1:{port}",
        )
    found = {
        f"{kind} {name}": value for kind in kinds for name, value in train(config_of(kind)).items()
    }
    if index == "0":
        np.savez(file, allow_pickle=False, **found)


if __name__ == "__main__":
    main()
