"""The learning rate range test (Smith 2017, arXiv 1506.01186); `lr_finder.py` is the command."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure
from tqdm import tqdm

from txl_jax import (
    compilation_cache,
    distributed,
    host_memory,
    sharding,
    storage,
    token_files,
    warm_start,
)
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.lr_finder_arguments import SMOOTHING, WARM, Arguments
from txl_jax.peers import Peers, facts
from txl_jax.preflight import check, with_vocabulary
from txl_jax.step import Totals, TrainState, init_state, make_train_step, place_batch
from txl_jax.streams import Streams, training_streams
from txl_jax.token_files import TokenFiles

PICTURE, POINTS = "lr_finder.png", "lr_finder.json"
DIVERGED = 4.0
"""The sweep ends where the smoothed loss is this many times the lowest it has been (fastai's)."""


@dataclass(frozen=True)
class Sweep:
    """Losses of successive steps at growing rates, all of them finite."""

    lr: list[float]
    """Rates as they are applied, scaled by the batch where the config says so (`lr_batch`)."""
    loss: list[float]
    """Mean loss of each step's tokens in nats, before its update."""
    diverged: bool
    """Whether it ended before the highest rate because the loss had grown too far."""


@dataclass(frozen=True)
class Suggestion:
    """Where the smoothed loss falls fastest over the logarithm of the rate, and where it ends."""

    steepest: float
    """Rate at which it falls fastest."""
    lowest: float
    """Rate at which it is lowest; a tenth of it is the other rate that practice goes by."""


def smooth(losses: list[float]) -> list[float]:
    """Decaying means of the losses so far, without the pull to the zero that they begin with."""
    mean, smoothed = 0.0, []
    for n, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**n))
    return smoothed


def suggest(sweep: Sweep) -> Suggestion | None:
    """Where the loss falls fastest and where it is lowest; None if it does not fall.

    The first `WARM` steps are not looked at.
    """
    rates, losses = np.log(sweep.lr[WARM:]), np.asarray(smooth(sweep.loss)[WARM:])
    lowest = int(np.argmin(losses)) if len(losses) else 0
    if lowest < 2:
        return None
    slopes = np.gradient(losses[: lowest + 1], rates[: lowest + 1])
    steepest = int(np.argmin(slopes))
    return Suggestion(sweep.lr[WARM + steepest], sweep.lr[WARM + lowest])


def first_state(cfg: Config, mesh: Mesh, tokens: TokenFiles) -> TrainState:
    """The state in which a run of `cfg` begins; UserError as `warm_start.load`."""
    state = init_state(cfg, mesh)
    if start := warm_start.load(cfg, mesh, tokens):
        state = state._replace(params=start.params(state.params))
    return state


def run_sweep(
    cfg: Config,
    mesh: Mesh,
    streams: Streams,
    state: TrainState,
    lr_from: float,
    lr_to: float,
    steps: int,
) -> Sweep:
    """Trains `state` for `steps` steps at rates from lr_from to lr_to, or until the loss diverges.

    The state is donated to the first step.
    """
    rows = sharding.local_rows(mesh, cfg.train.batch)
    last = (steps - 1) * cfg.train.batch * cfg.model.tgt_len

    def rate(tokens: jax.Array) -> jax.Array:
        return lr_from * jnp.exp(math.log(lr_to / lr_from) * tokens / last)

    train_step = make_train_step(cfg, mesh, len(streams), rate)
    rates: list[float] = []
    losses: list[float] = []
    for n in tqdm(range(steps), desc="sweeping", unit="step", delay=2, leave=False, disable=None):
        inputs, targets = place_batch(cfg, mesh, streams.at(n, rows))
        state, _ = train_step(state, inputs, targets)
        totals = jax.device_get(state.totals)
        if totals.non_finite_step >= 0:
            return Sweep(rates, losses, diverged=True)
        if totals.steps:  # a step that overflowed float16 has no loss
            rates.append(float(totals.learning_rate))
            losses.append(float(totals.loss / totals.tokens))
            smoothed = smooth(losses)
            if smoothed[-1] > DIVERGED * min(smoothed):
                return Sweep(rates, losses, diverged=True)
        zero = jax.device_put(Totals.zero(), sharding.repeated(mesh))
        state = state._replace(totals=zero)
    return Sweep(rates, losses, diverged=False)


def draw(sweep: Sweep, suggestion: Suggestion | None, title: str, path: Path) -> None:
    """Writes a PNG of loss against learning rate; raises OSError."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        title=title, xlabel="learning rate", ylabel="loss (nats per token)", xscale="log"
    )
    axes.plot(sweep.lr, sweep.loss, color="0.8", label="each step")
    axes.plot(sweep.lr, smooth(sweep.loss), color="C0", label="smoothed")
    if suggestion:
        for name, lr, style in (
            ("steepest descent", suggestion.steepest, "--"),
            ("lowest", suggestion.lowest, ":"),
        ):
            axes.axvline(lr, color="C1", linestyle=style, label=f"{name}: {lr:.2g}")
    if sweep.lr:
        # A loss that explodes would press the rest into a line.
        top = min(1.05 * max(sweep.loss), 2 * sweep.loss[0])
        axes.set_ylim(0.95 * min(sweep.loss), top)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def advice(sweep: Sweep, suggestion: Suggestion | None, cfg: Config) -> str:
    """What the sweep says about --lr, in a few lines."""
    ended = "diverged" if sweep.diverged else "had not diverged"
    at = f" at {sweep.lr[-1]:.2g}" if sweep.lr else ""
    lines = [f"{len(sweep.lr)} steps; the loss {ended}{at}"]
    if suggestion is None:
        lines.append("it did not fall before that: try a lower --lr-from or more --steps")
        return "\n".join(lines)
    # The schedule multiplies lr by this.
    scale = cfg.train.batch / cfg.optim.lr_batch if cfg.optim.lr_batch else 1.0
    of = f" (for a batch of {cfg.optim.lr_batch})" if cfg.optim.lr_batch else ""
    lines += [
        f"it falls fastest at {suggestion.steepest:.2g} and is lowest at {suggestion.lowest:.2g}",
        f"try --lr {suggestion.steepest / scale:.2g}{of}: the steepest descent; or "
        f"--lr {suggestion.lowest / 10 / scale:.2g}: a tenth of where it is lowest",
        "(range test: Smith 2017, arXiv 1506.01186; the two rules: fastai)",
    ]
    if not sweep.diverged and suggestion.lowest == sweep.lr[-1]:
        lines.append("the loss was still falling at the end: try a higher --lr-to")
    return "\n".join(lines)


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; take an --out that is writable and "
            "has space"
        ) from error


def run(args: Arguments) -> None:
    """Sweeps, and says what to try; UserError where that cannot work, as `train` raises it."""
    with Peers.join(distributed.find(args.local)) as peers:
        _find(args, args.folder, peers)


def _find(args: Arguments, out: Path, peers: Peers) -> None:
    peers.check_same(facts(args.experiment))
    if not peers.several:
        compilation_cache.keep_programs()
    mesh = sharding.make_mesh()
    host_memory.keep_freed(mesh)
    peers.connect(mesh)
    check(args.experiment, mesh)
    tokens = token_files.prepare(args.experiment.data)
    peers.check_same({"token files": tokens.fingerprint})
    cfg = with_vocabulary(args.experiment, tokens.vocab)
    streams = training_streams(cfg, tokens)
    state = first_state(cfg, mesh, tokens)
    primary = jax.process_index() == 0
    if primary:
        with _writable(out):
            out.mkdir(parents=True, exist_ok=True)
    sweep = run_sweep(cfg, mesh, streams, state, args.lr_from, args.lr_to, args.steps)
    if not primary:
        return
    suggestion = suggest(sweep)
    found = dataclasses.asdict(sweep) | {
        "smoothed": smooth(sweep.loss),
        "suggestion": suggestion and dataclasses.asdict(suggestion),
        "config": dataclasses.asdict(cfg),
    }
    with _writable(out):
        storage.write_text(out / POINTS, json.dumps(found, indent=2) + "\n")
        draw(sweep, suggestion, args.config, out / PICTURE)
    print(advice(sweep, suggestion, cfg))
    print(f"{out / PICTURE} shows it, {out / POINTS} has the points")
