"""Loss of a trained model over a whole split: `python -m txl_jax.evaluate --logdir DIR`.

Letters: B batch, T tgt_len, L layers, M mem_len, D d_model.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray
from tqdm import tqdm

from txl_jax import data, sharding
from txl_jax.config import ModelConfig, parse_words
from txl_jax.data import Streams
from txl_jax.errors import run_command
from txl_jax.model import Memory, abstract
from txl_jax.trained import load_trained


@dataclass(frozen=True)
class Score:
    """Mean loss over the tokens of a text."""

    loss: float
    """Nats for each token."""
    tokens: int
    """How many tokens were predicted, each once."""

    @property
    def bits(self) -> float:
        """Bits for each token: bits per byte where tokens are bytes."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class Evaluator:
    """Computes the loss of parameters over whole texts, with the settings of one config.

    `cfg` may differ from the training's in tgt_len, mem_len, clamp_len and same_length.

    Raises:
      UserError: the devices do not divide `batch`, or the config cannot work.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, batch: int, option: str = "batch"):
        sharding.check_batch(mesh, option, batch)
        graphdef, _ = abstract(cfg, mesh)
        self._tgt_len, self._batch = cfg.tgt_len, batch
        self._rows = sharding.local_rows(mesh, batch)
        everywhere, by_row = sharding.repeated(mesh), sharding.split(mesh, axis=0)
        self._by_row = by_row
        memory = Memory(sharding.split(mesh, 1), everywhere)  # pyright: ignore[reportArgumentType]

        def segment(params: Any, memory: Memory, inputs: jax.Array, targets: jax.Array):
            loss, memory = nnx.merge(graphdef, params)(inputs, targets, memory)
            return loss.sum(), memory

        self._empty = jax.jit(lambda: Memory.empty(cfg, batch), out_shardings=memory)
        self._segment = jax.jit(
            segment,
            in_shardings=(everywhere, memory, by_row, by_row),
            out_shardings=(everywhere, memory),
            donate_argnums=1,
        )

    def __call__(self, params: Any, tokens: NDArray[np.integer], what: str = "evaluating") -> Score:
        """The score of `params` on `tokens` [n]: n - 1 predictions, each made once.

        The text is cut into `batch` streams; memory starts empty in each and is carried to its end.
        """
        return self.over(params, Streams.covering(tokens, self._batch, self._tgt_len), what)

    def over(self, params: Any, streams: Streams, what: str = "evaluating") -> Score:
        """The score of `params` on streams of this evaluator's batch and tgt_len."""
        memory = self._empty()
        sums = []
        for i in tqdm(
            range(len(streams)), desc=what, unit="segment", delay=2, leave=False, disable=None
        ):
            inputs, targets = (
                jax.make_array_from_process_local_data(self._by_row, rows)
                for rows in streams.segment(i, self._rows)
            )
            loss, memory = self._segment(params, memory, inputs, targets)
            sums.append(loss)
        nats = np.sum(jax.device_get(sums), dtype=np.float64)
        return Score(float(nats / streams.n_tokens), streams.n_tokens)


@dataclass(frozen=True)
class Arguments:
    """What to evaluate, and how; settings that are not given are those of the training."""

    logdir: str
    """Folder of the run."""
    split: Literal["train", "valid", "test"] = "test"
    """Part of the corpus."""
    checkpoint: Literal["best", "latest"] = "best"
    """The step with the lowest validation loss, or the newest."""
    batch: int | None = None
    """Streams into which the split is cut, over all devices."""
    tgt_len: int | None = None
    """Tokens that are predicted in one segment."""
    mem_len: int | None = None
    """Hidden states that are remembered for each layer."""
    clamp_len: int | None = None
    """Distances beyond this count as this; -1: no limit."""
    same_length: bool | None = None
    """Let every query see exactly mem_len keys."""
    json: bool = False
    """Print one line of JSON."""


def main(words: list[str]) -> None:
    args = parse_words(Arguments, None, "python -m txl_jax.evaluate", __doc__ or "", words)
    mesh = sharding.make_mesh()
    trained = load_trained(Path(args.logdir), args.checkpoint, mesh)
    settings = ("tgt_len", "mem_len", "clamp_len", "same_length")
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    cfg = dataclasses.replace(trained.cfg.model, **given)
    batch = args.batch if args.batch is not None else trained.cfg.train.eval_batch
    evaluator = Evaluator(cfg, mesh, batch)
    tokens = data.prepare(trained.cfg.data)
    trained.check_corpus(tokens)
    score = evaluator(trained.params, tokens.splits[args.split], f"evaluating {args.split}")
    if args.json:
        numbers = {"split": args.split, "step": trained.step, "tokens": score.tokens}
        numbers |= {name: getattr(cfg, name) for name in settings} | {"batch": batch}
        numbers |= {"loss": score.loss, "bits": score.bits, "perplexity": score.perplexity}
        print(json.dumps(numbers))
    else:
        shown = trained.vocab.measure.sentence(score.loss)
        print(
            f"{args.split}: {shown}, loss {score.loss:.4f} nats, "
            f"over {score.tokens} tokens (step {trained.step}, tgt_len {cfg.tgt_len}, "
            f"mem_len {cfg.mem_len})"
        )


if __name__ == "__main__":
    run_command(main)
