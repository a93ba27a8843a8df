"""Times the adaptive softmax beside its dense form, and beside the original's code.

    python -m bench.adaptive_softmax [--original FILE] [--rounds 5]

The output layer of the fork's SMALL model (d_model 512, 267,736 words cut at 20,000, 40,000 and
200,000, weights tied, div_val 1) for 2,048 tokens, forward and backward, float32. Targets fall into
the four clusters as 94.9, 2.2, 2.7 and 0.2 %, about as in WikiText-103, evenly within each.

The dense form computes every cluster for every token and masks. FILE is the original's
`proj_adaptive_softmax.py`, for which this Python needs torch; it is not part of this repository.
Each form runs in processes of its own, in turn, so that one line's peak memory is its own.
"""

import importlib.util
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from txl_jax.config import ModelConfig, parse_words
from txl_jax.errors import UserError, run_command

CFG = ModelConfig(n_token=267_736, d_model=512, cutoffs=(20_000, 40_000, 200_000))
N_TOKENS = 2048
SHARES = (0.949, 0.022, 0.027, 0.002)
"""Of tokens in each cluster; counted back from the word counts at the cutoffs of WikiText-103."""


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    original: str = ""
    """The original's proj_adaptive_softmax.py; empty: only our own two forms."""
    rounds: int = 5
    """Processes for each form."""
    only: Literal["", "ours", "dense", "original"] = ""
    """Time one form in this process and print JSON (what the others are started with)."""


def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hidden [N, D], targets [N], and the tables of all clusters [V, D]."""
    rng = np.random.default_rng(0)
    edges = [0, *CFG.cutoffs, CFG.n_token]
    cluster = rng.choice(len(SHARES), size=N_TOKENS, p=SHARES)
    targets = rng.integers(np.take(edges, cluster), np.take(edges, cluster + 1))
    hidden = rng.standard_normal((N_TOKENS, CFG.d_model), np.float32)
    table = 0.02 * rng.standard_normal((CFG.n_token, CFG.d_model), np.float32)
    return hidden, targets, table


def time_jax(form: str) -> tuple[float, list[float]]:
    """Mean loss, and seconds of each of some forward and backward passes, the first left out."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from txl_jax.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, clusters

    class Both(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embedding = AdaptiveEmbedding(CFG, rngs)
            self.output = AdaptiveSoftmax(CFG, rngs)

    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Both(nnx.Rngs(0))))
    hidden, targets, table = draw()
    params: Any = jax.tree.map(lambda x: jnp.zeros(x.shape), nnx.to_pure_dict(shapes))
    for i, part in enumerate(clusters(CFG)):
        params["embedding"]["tables"][i] = jnp.array(table[part.start : part.stop])
    del table  # not part of what the softmax needs

    def mean_loss(params, hidden, targets):
        both = nnx.merge(graphdef, params)
        if form == "ours":
            return both.output(hidden[None], targets[None], both.embedding).mean()
        log_p = both.output.log_probs(hidden, both.embedding)
        return -jnp.take_along_axis(log_p, targets[:, None], axis=1).mean()

    run = jax.jit(jax.value_and_grad(mean_loss, argnums=(0, 1)))
    args = (params, jnp.asarray(hidden), jnp.asarray(targets, jnp.int32))

    def once() -> float:
        loss, gradients = run(*args)
        jax.block_until_ready(gradients)
        return float(loss)

    return timed(once)


def time_original(file: str) -> tuple[float, list[float]]:
    import torch  # pyright: ignore[reportMissingImports]

    if torch.version.cuda is None:
        torch.version.cuda = "0.0"  # the file reads its parts at import
    spec = importlib.util.spec_from_file_location("original", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(2)
    softmax = module.ProjectedAdaptiveLogSoftmax(
        CFG.n_token, CFG.d_model, CFG.d_model, list(CFG.cutoffs), 1, keep_order=True
    )
    hidden, targets, table = (torch.from_numpy(array) for array in draw())
    softmax.out_layers[0].weight.data = table
    torch.nn.init.zeros_(softmax.out_layers[0].bias)
    hidden.requires_grad_()

    def once() -> float:
        softmax.zero_grad(set_to_none=True)
        hidden.grad = None
        loss = softmax(hidden, targets).mean()
        loss.backward()
        return float(loss)

    return timed(once)


def timed(once) -> tuple[float, list[float]]:
    loss = once()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    return loss, seconds


def main(words: list[str]) -> None:
    args = parse_words(Arguments, Arguments(), "bench.adaptive_softmax", __doc__ or "", words)
    if args.original and not Path(args.original).is_file():
        raise UserError(f"--original {args.original} is not a file; name proj_adaptive_softmax.py")
    if args.only:
        original = args.only == "original"
        loss, seconds = time_original(args.original) if original else time_jax(args.only)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"loss": loss, "seconds": seconds, "peak_mib": peak}))
        return
    forms = ["ours", "dense", *(["original"] if args.original else [])]
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in forms}
    for _ in range(args.rounds):
        for form in forms:
            command = [sys.executable, "-m", "bench.adaptive_softmax", "--only", form]
            command += ["--original", args.original] if args.original else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[form].append(json.loads(done.stdout))
    print(f"{N_TOKENS} tokens, {CFG.n_token} words, forward and backward, float32")
    print("form      loss     ms (least … median … most)   times ours   peak MiB")
    best = [min(run["seconds"]) for run in found["ours"]]
    for form, runs in found.items():
        least = [min(run["seconds"]) for run in runs]
        ratio = median(a / b for a, b in zip(least, best, strict=True))
        ms = " … ".join(f"{1000 * x:.0f}" for x in (min(least), median(least), max(least)))
        peak = median(run["peak_mib"] for run in runs)
        print(f"{form:9} {runs[0]['loss']:.5f}  {ms:28} {ratio:10.2f} {peak:10.0f}")


if __name__ == "__main__":
    run_command(main)
