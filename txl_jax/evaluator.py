"""How well parameters predict whole texts.

Letters: B batch, T tgt_len, L layers, M mem_len, D d_model, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray
from tqdm import tqdm

from txl_jax import sharding
from txl_jax.checks import check_batch
from txl_jax.config import ModelConfig
from txl_jax.errors import UserError
from txl_jax.model import Memory, Recalled, TransformerXL, abstract, recalls
from txl_jax.streams import Streams


@dataclass(frozen=True)
class Ranking:
    """Where the tokens of a text stand among all of the vocabulary, as in the fork's eval.py.

    Tokens that are equally likely share the best of their places.
    """

    accuracy_1: float
    """Part of the tokens that were held to be the likeliest."""
    accuracy_5: float
    """Part of the tokens that were among the five likeliest."""
    mrr_5: float
    """Mean of 1 / place, of 0 beyond the fifth place."""


@dataclass(frozen=True)
class Score:
    """Means over the tokens of a text."""

    loss: float
    """Nats for each token."""
    tokens: int
    """How many tokens were predicted, each once."""
    ranking: Ranking | None = None
    """None where it was not asked for."""
    context: int = 0
    """How many tokens were read once more, for the sake of memory."""

    @property
    def bits(self) -> float:
        """Bits for each token: bits per byte where tokens are bytes."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def context_segments(cfg: ModelConfig) -> int:
    """Segments before a segment on which its losses depend: L x ceil(M / T).

    Memory holds the inputs of a layer at M earlier positions, and each of these depends on the M
    positions before the segment in which it was computed, one layer below.
    """
    return cfg.n_layer * -(-cfg.mem_len // cfg.tgt_len)


class Evaluator:
    """Computes the score of parameters on whole texts, with the settings of one config.

    Calling it is quick: the text is cut into `batch` streams, memory starts empty in each and is
    carried to its end. `exact` gives what one stream would give.

    Args:
      cfg: may differ from the training's in tgt_len, mem_len, clamp_len and same_length.
      option: what the command line calls `batch`.
      ranks: compute the ranking too, which takes the probabilities of the whole vocabulary.
      reset_every: empty memory before every n-th segment (the fork's short-memory evaluations,
        `reset_mems_interval`); None: never.
      on_segment: called when a segment has been computed, on every process alike.

    Raises:
      UserError: the devices do not divide `batch`, or the config or `reset_every` cannot work.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: Mesh,
        batch: int,
        option: str = "batch",
        ranks: bool = False,
        reset_every: int | None = None,
        on_segment: Callable[[], object] = lambda: None,
    ):
        if reset_every is not None and reset_every < 1:
            raise UserError(f"reset_every is {reset_every}; it has to be at least 1")
        check_batch(mesh.devices.size, option, batch)
        graphdef, _ = abstract(cfg)
        self.cfg, self.batch, self.reset_every = cfg, batch, reset_every
        self._on_segment = on_segment
        self._rows = sharding.local_rows(mesh, batch)
        self._by_row = sharding.split(mesh, axis=0)
        rows, whole = sharding.split_spec(0), PartitionSpec()
        memory: Any = Memory(sharding.split_spec(1), whole)  # pyright: ignore[reportArgumentType]
        recalled: Any = Recalled(memory.hidden, whole, whole) if recalls(cfg) else memory  # pyright: ignore[reportArgumentType]

        def begin(params: Any, memory: Memory) -> Memory | Recalled:
            return nnx.merge(graphdef, params).recall(memory, cfg.tgt_len)

        def segment(params: Any, memory: Any, inputs: jax.Array, targets: jax.Array):
            xl: TransformerXL = nnx.merge(graphdef, params)
            hidden, memory = xl.hidden(inputs, memory)
            sums = {"loss": xl.loss(hidden, targets).sum()}
            if ranks:
                place = 1.0 + xl.ranks(hidden, targets).astype(jnp.float32)
                place = jnp.where(targets < 0, jnp.inf, place)
                sums["accuracy_1"] = (place <= 1).sum()
                sums["accuracy_5"] = (place <= 5).sum()
                sums["mrr_5"] = jnp.where(place <= 5, 1 / place, 0.0).sum()
            return jax.lax.psum(sums, sharding.DATA), memory

        self._empty = jax.jit(
            lambda: Memory.empty(cfg, batch),
            out_shardings=jax.tree.map(partial(NamedSharding, mesh), memory),
        )
        self._begin = jax.jit(
            jax.shard_map(begin, mesh=mesh, in_specs=(whole, memory), out_specs=recalled)
        )
        self._segment = jax.jit(
            jax.shard_map(
                segment,
                mesh=mesh,
                in_specs=(whole, recalled, rows, rows),
                out_specs=(whole, recalled),
                # The checker does not see through a loop whose length is known to the device only.
                check_vma=False,
            ),
            donate_argnums=1,
        )

    def __call__(self, params: Any, tokens: NDArray[np.integer], what: str = "evaluating") -> Score:
        """The score of `params` on `tokens` [n]: n - 1 predictions, each made once.

        A larger batch is faster, and a little worse, as more streams begin without memory.
        """
        return self.over(params, Streams.covering(tokens, self.batch, self.cfg.tgt_len), what)

    def exact(self, params: Any, tokens: NDArray[np.integer], what: str = "evaluating") -> Score:
        """As a call, but the score is that of batch 1, up to rounding.

        Every stream but the first reads what its memory depends on once more: L x ceil(M / T) x T
        tokens. With a larger batch these add up, and the score tells how many there were. With
        `reset_every`, streams begin where memory is emptied, and nothing is read again.
        """
        reset = self.reset_every
        context = 0 if reset else context_segments(self.cfg)
        streams = Streams.seamless(tokens, self.batch, self.cfg.tgt_len, context, reset or 1)
        return self.over(params, streams, what)

    def over(self, params: Any, streams: Streams, what: str = "evaluating") -> Score:
        """The score of `params` on streams of this evaluator's batch and tgt_len."""
        memory = self._start(params)
        found = []
        for i in tqdm(
            range(len(streams)), desc=what, unit="segment", delay=2, leave=False, disable=None
        ):
            if self.reset_every and i % self.reset_every == 0:
                memory = self._start(params)
            inputs, targets = (
                jax.make_array_from_process_local_data(self._by_row, rows)
                for rows in streams.segment(i, self._rows)
            )
            sums, memory = self._segment(params, memory, inputs, targets)
            # At most two segments are under way, so that the bar tells what has been computed.
            jax.block_until_ready(found[-1:])
            found.append(sums)
            self._on_segment()
        host = jax.device_get(found)
        means = {
            name: float(np.sum([sums[name] for sums in host], dtype=np.float64) / streams.n_tokens)
            for name in host[0]
        }
        loss = means.pop("loss")
        ranking = Ranking(**means) if means else None
        return Score(loss, streams.n_tokens, ranking, streams.n_context)

    def _start(self, params: Any) -> Any:
        memory = self._empty()
        # Where an argument without elements is split, XLA's compiler crashes.
        return self._begin(params, memory) if recalls(self.cfg) else memory
