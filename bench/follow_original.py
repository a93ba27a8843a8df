"""Follows the original PyTorch implementation: its first 100 training steps, its evaluation.

    python -m bench.follow_original --reference DIR

DIR holds `train_100_steps.npz` and `evaluate_trained.npz`: weights, tokens and losses of the
original (4 layers, d_model 128, 65 characters; Adam, cosine, clipping, no dropout). They are not
part of this repository. The steps go through this project's own train step, the evaluation through
its own evaluator.
"""

import dataclasses
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from txl_jax import interop, sharding
from txl_jax.config import Config, ModelConfig, OptimConfig, TrainConfig, parse_words
from txl_jax.errors import UserError, run_command
from txl_jax.evaluator import Evaluator
from txl_jax.model import TransformerXL
from txl_jax.step import Totals, init_state, make_train_step, place_batch
from txl_jax.streams import Streams


@dataclass(frozen=True)
class Arguments:
    """What to compare with."""

    reference: str
    """Folder of the original's numbers."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, configuration) of a file of the original's numbers."""
    try:
        with np.load(path) as arrays:
            return dict(arrays), json.loads(str(arrays["config"]))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def model_config(original: dict[str, Any], **other: Any) -> ModelConfig:
    """Our config for the arguments of the original's constructor."""
    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in original.items()
        if name in ours
    }
    return ModelConfig(**(fields | other))


def load_params(cfg: ModelConfig, arrays: dict[str, Any]) -> Any:
    """The original's weights as our parameters."""
    xl = TransformerXL(cfg, rngs=nnx.Rngs(0))
    weights = {n.removeprefix("param/"): a for n, a in arrays.items() if n.startswith("param/")}
    interop.load_torch_state_dict(xl, weights)
    return nnx.to_pure_dict(nnx.state(xl))


def follow_training(reference: Path) -> None:
    arrays, original = read(reference / "train_100_steps.npz")
    training = original["training"]
    model = model_config(original["model"])
    cfg = Config(
        model=model,
        optim=OptimConfig(lr=training["lr"], clip=training["clip"]),
        train=TrainConfig(
            batch=training["batch"],
            max_tokens=training["steps"] * training["batch"] * model.tgt_len,
        ),
    )
    mesh = sharding.make_mesh()
    tokens = arrays["tokens"]
    streams = Streams.trimmed(tokens.reshape(-1), cfg.train.batch, model.tgt_len)
    everywhere = sharding.repeated(mesh)
    params = jax.device_put(load_params(model, arrays), everywhere)
    state = init_state(cfg, mesh)._replace(params=params)
    train_step = make_train_step(cfg, mesh, len(streams))
    differences = []
    for n, loss in enumerate(arrays["loss"]):
        batch = place_batch(cfg, mesh, streams.segment(n))
        state, _ = train_step(state, *batch)
        differences.append(abs(float(state.totals.loss / state.totals.tokens) - loss))
        state = state._replace(totals=jax.device_put(Totals.zero(), everywhere))
    print("training: difference of the loss from the original's, in nats")
    for n in (1, 10, 20, 30, 40, 50, 100):
        until = max(differences[:n])
        print(f"  step {n:3}: {differences[n - 1]:.1e}   largest so far: {until:.1e}")


def follow_evaluation(reference: Path) -> None:
    arrays, original = read(reference / "evaluate_trained.npz")
    mesh = sharding.make_mesh()
    print("evaluation: mean loss, in nats")
    for name, expected in original["eval"].items():
        split, mem_len = name.split("_mem")
        cfg = model_config(original["model"], mem_len=int(mem_len), dropout=0.0)
        evaluator = Evaluator(cfg, mesh, batch=16)
        streams = Streams.trimmed(arrays[split], 16, cfg.tgt_len)
        params = jax.device_put(load_params(cfg, arrays), sharding.repeated(mesh))
        loss = evaluator.over(params, streams).loss
        print(
            f"  {split:5} with memory {mem_len:>3}: {loss:.6f}, the original's "
            f"{expected['nll']:.6f}, difference {abs(loss - expected['nll']):.1e}"
        )


def main(words: list[str]) -> None:
    about = __doc__ or ""
    reference = Path(parse_words(Arguments, None, "bench.follow_original", about, words).reference)
    follow_training(reference)
    follow_evaluation(reference)


if __name__ == "__main__":
    run_command(main)
