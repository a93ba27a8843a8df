"""What a finished run shows: its losses over whole splits, a sample, and where its logs are."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from txl_jax import run_folder, storage
from txl_jax.config import ModelConfig
from txl_jax.decoding import Sampling
from txl_jax.evaluator import Evaluator
from txl_jax.generator import Generator
from txl_jax.measure import BITS_PER_BYTE, Measure
from txl_jax.token_files import TokenFiles
from txl_jax.trained import Trained
from txl_jax.vocab import Vocab

FILE = "results.json"
_SPLITS = ("valid", "test")


@dataclass(frozen=True)
class Results:
    """The final evaluation of a run."""

    step: int
    """Optimizer steps that made the parameters: those with the lowest validation loss."""
    bits: dict[str, dict[str, float]]
    """Bits for each token, by split and, as text, length of memory."""
    tokens: dict[str, int]
    """Tokens of each split, every one predicted once."""
    sample: str
    """What the model wrote after the beginning of valid."""


def sample_text(
    generator: Generator,
    params: Any,
    vocab: Vocab,
    context: np.ndarray,
    tokens: int,
    on_part: Callable[[], object] = lambda: None,
) -> str:
    """`tokens` tokens that follow `context` [n ≥ 1], as text; `on_part` is called now and then."""
    text = b""
    for part in generator(params, context, seed=0, tokens=tokens):
        text += vocab.decode(part.tokens[0])
        on_part()
    return text.decode(errors="replace")


def context_of(cfg: ModelConfig, split: np.ndarray) -> np.ndarray:
    """The first tokens of a split, int32: whole segments that fill the memory, and one more.

    A model that was trained with a long memory has hardly ever seen a text without one.
    """
    segments = max(1, -(-cfg.mem_len // cfg.tgt_len))
    return np.asarray(split[: segments * cfg.tgt_len + 1], np.int32)


def evaluate_run(
    trained: Trained, tokens: TokenFiles, mesh: Mesh, work_on: Callable[[], object]
) -> Results:
    """Evaluates valid and test with no memory, with mem_len and with four times as much.

    `work_on` is called after every segment and part of the sample, on every process alike.
    """
    cfg = trained.cfg
    bits: dict[str, dict[str, float]] = {split: {} for split in _SPLITS}
    for mem_len in sorted({0, cfg.model.mem_len, 4 * cfg.model.mem_len}):
        # same_length needs memory; without any, plain attention is what it comes nearest to.
        model = dataclasses.replace(
            cfg.model, mem_len=mem_len, same_length=cfg.model.same_length and mem_len > 0
        )
        evaluator = Evaluator(model, mesh, cfg.train.eval_batch, "eval_batch", on_segment=work_on)
        for split in _SPLITS:
            what = f"evaluating {split} with memory {mem_len}"
            score = evaluator.exact(trained.params, tokens.splits[split], what)
            bits[split][str(mem_len)] = score.bits
    generator = Generator(cfg.model, mesh, Sampling(temperature=0.8))
    n_sample = max(cfg.train.sample_tokens, 400)
    context = context_of(cfg.model, tokens.splits["valid"])
    text = sample_text(generator, trained.params, trained.vocab, context, n_sample, work_on)
    n_tokens = {split: len(tokens.splits[split]) - 1 for split in _SPLITS}
    return Results(trained.step, bits, n_tokens, text)


def save(logdir: Path, results: Results) -> None:
    """Writes the results into the run's folder, all at once."""
    with run_folder.writable(logdir):
        text = json.dumps(dataclasses.asdict(results), indent=2)
        storage.write_text(logdir / FILE, text + "\n")


def load(logdir: Path) -> Results | None:
    """The results of the run in logdir; None if there are none yet, or not whole."""
    try:
        return Results(**json.loads((logdir / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def show(logdir: Path | str, results: Results, measure: Measure) -> str:
    """The results as a small table, the sample, and how to see more."""
    lengths = list(next(iter(results.bits.values())))
    rows = [[measure.name, measure.tokens, *(f"memory {length}" for length in lengths)]]
    for split, values in results.bits.items():
        losses = (measure.text(bits * math.log(2)) for bits in values.values())
        rows.append([split, f"{results.tokens[split]}", *losses])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    sample = [f"    {line}" for line in results.sample.split("\n")]
    # Any bytes can be continued, but not any words: only those that the corpus has.
    prompt = " --prompt 'def main('" if measure is BITS_PER_BYTE else ""
    return "\n".join(
        [
            f"Step {results.step}, the best by validation loss:",
            "",
            *table,
            "",
            "How the model goes on after the beginning of valid:",
            "",
            *sample,
            "",
            f"Logs, samples and checkpoints: {logdir}",
            f"To see them: tensorboard --logdir {logdir}",
            f"To write more: python -m txl_jax.generate --logdir {logdir}{prompt}",
        ]
    )
