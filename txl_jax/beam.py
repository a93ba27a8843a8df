"""Beam search, with diverse groups if wanted: the likeliest continuations of a text.

Letters: G groups, W beams in a group, K = G W beams, V vocabulary, S states of the stop strings, n
steps.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from txl_jax import sharding
from txl_jax.config import ModelConfig
from txl_jax.decoder import Cache, Decoder, FixedLayer
from txl_jax.decoding import Beam
from txl_jax.generator import TOKENS_AT_ONCE, PromptReader
from txl_jax.model import Memory, TransformerXL, abstract
from txl_jax.stops import ENDED


class Beams(NamedTuple):
    """The K hypotheses that go on; those of a group stand together, the best first."""

    token: jax.Array
    """int32 [K]: the newest."""
    score: jax.Array
    """float32 [K]: what the search compares, the penalties of its group included; -inf: none."""
    log_prob: jax.Array
    """float32 [K]: sum of the log-probabilities of its tokens."""
    matched: jax.Array
    """int32 [K]: state of the stop strings, as in `StopStrings.table`."""

    @staticmethod
    def start(beam: Beam, token: jax.Array) -> "Beams":
        """The prompt, whose last token is `token` (int32 scalar), once in each group."""
        first = jnp.arange(beam.beam) % (beam.beam // beam.groups) == 0
        nothing = jnp.zeros(beam.beam, jnp.float32)
        return Beams(
            jnp.full(beam.beam, token),
            jnp.where(first, nothing, -jnp.inf),
            nothing,
            jnp.zeros(beam.beam, jnp.int32),
        )


class Chosen(NamedTuple):
    """Continuations that a step has chosen."""

    parent: Any
    """int32 [K]: the hypothesis that is continued."""
    token: Any
    """int32 [K]."""
    score: Any
    """float32 [K]; -inf: there was nothing to choose."""
    log_prob: Any
    """float32 [K]."""


class Step(NamedTuple):
    """What one step of the search did; stacked over steps, [n, K] each."""

    going: Chosen
    """Those that go on."""
    ended: Chosen
    """Those with which a stop string is complete."""


def grow(beams: Beams, log_probs: jax.Array, beam: Beam, table: jax.Array) -> tuple[Beams, Step]:
    """Continues every hypothesis by a token; each group keeps the W best that do not end.

    Of those that end, the ones among the W best of all are kept as well, outside the beam, as the
    fork's beam search does. Groups choose one after another (Vijayakumar et al. 2016, arXiv
    1610.02424, Hamming diversity): a token's score falls by `diversity` for each hypothesis of an
    earlier group that goes on with it at this step. As in the fork, the penalty stays in the score;
    the log-probability that is reported is without it.

    Args:
      log_probs: float32 [K, V], of the next token.
      table: int32 [S, V], from `StopStrings.table`.
    """
    width, n_token = beam.beam // beam.groups, log_probs.shape[1]
    ends = table[beams.matched] == ENDED
    taken = jnp.zeros(n_token, jnp.float32)
    going, ended = [], []
    for group in range(beam.groups):
        rows = slice(group * width, (group + 1) * width)
        total = beams.score[rows, None] + log_probs[rows] - beam.diversity * taken

        def best(total: jax.Array, first: int = rows.start) -> Chosen:
            score, place = jax.lax.top_k(total.reshape(-1), width)
            parent, token = first + place // n_token, place % n_token
            return Chosen(parent, token, score, beams.log_prob[parent] + log_probs[parent, token])

        chosen = best(total)
        is_end = ends[chosen.parent, chosen.token]
        ended.append(chosen._replace(score=jnp.where(is_end, chosen.score, -jnp.inf)))
        chosen = best(jnp.where(ends[rows], -jnp.inf, total))
        going.append(chosen)
        taken = taken.at[chosen.token].add((chosen.score > -jnp.inf).astype(jnp.float32))
    step = Step(*(jax.tree.map(lambda *parts: jnp.concatenate(parts), *x) for x in (going, ended)))
    parent, token, score, log_prob = step.going
    # Where nothing goes on, an end may stand in its place; its state must stay one of the table.
    matched = jnp.maximum(table[beams.matched[parent], token], 0)
    return Beams(token, score, log_prob, matched), step


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that the search has found."""

    tokens: list[int]
    """With those of the stop string, if one ended it."""
    log_prob: float
    """Sum of the model's log-probabilities of the tokens."""
    reason: Literal["stop", "length"]
    """Why it ended: a stop string was complete, or the search was over."""
    group: int
    """1 … G."""

    @property
    def score(self) -> float:
        """Log-probability of a token, on average: hypotheses of any length can be compared."""
        return self.log_prob / len(self.tokens)


def hypotheses(steps: Step, beam: Beam) -> list[Hypothesis]:
    """The W best of each group, the best first, from all that its search did (arrays [n, K]).

    They are compared by log-probability per token, the stop string's included. The fork's search
    says that it does so, though the line is commented out: it compares sums, which makes short
    hypotheses look good.
    """
    width, last = beam.beam // beam.groups, len(steps.going.token) - 1

    def collect(chosen: Chosen, at: int, reason: Literal["stop", "length"]) -> None:
        for k in np.flatnonzero(chosen.score[at] > -np.inf):
            tokens, row = [int(chosen.token[at, k])], chosen.parent[at, k]
            for before in range(at - 1, -1, -1):
                tokens.append(int(steps.going.token[before, row]))
                row = steps.going.parent[before, row]
            found[int(k) // width].append(
                Hypothesis(tokens[::-1], float(chosen.log_prob[at, k]), reason, int(k) // width + 1)
            )

    found: list[list[Hypothesis]] = [[] for _ in range(beam.groups)]
    for at in range(last + 1):
        collect(steps.ended, at, "stop")
    collect(steps.going, last, "length")

    def by_score(hypothesis: Hypothesis) -> float:
        return -hypothesis.score

    return sorted((h for group in found for h in sorted(group, key=by_score)[:width]), key=by_score)


class BeamSearch:
    """Searches for the likeliest continuations of a text; memory is reordered where it lies.

    Args:
      table: int32 [S, V], from `StopStrings.table`.

    Raises:
      UserError: a field of `beam` cannot work.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, beam: Beam, table: np.ndarray):
        beam.check()
        graphdef, _ = abstract(cfg)
        everywhere = sharding.repeated(mesh)
        self._beam = beam
        self._table = jax.device_put(table, everywhere)
        decoder = Decoder(cfg, TOKENS_AT_ONCE)
        self._read_prompt = PromptReader(cfg, mesh, decoder)

        def begin(cache: Cache | Memory, token: jax.Array) -> tuple[Any, Beams]:
            streams = decoder.take_streams(cache, jnp.zeros(beam.beam, jnp.int32))
            return streams, Beams.start(beam, token)

        def steps(
            params: Any, layers: list[FixedLayer], state: tuple[Any, Beams], table: jax.Array
        ):
            def step(state: tuple[Any, Beams], _: None) -> tuple[tuple[Any, Beams], Step]:
                xl: TransformerXL = nnx.merge(graphdef, params)
                cache, beams = state
                hidden, cache = decoder.read(xl, layers, cache, beams.token)
                beams, done = grow(beams, xl.log_probs(hidden), beam, table)
                return (decoder.take_streams(cache, done.going.parent), beams), done

            cache, beams = state
            return jax.lax.scan(step, (decoder.make_room(cache), beams), length=TOKENS_AT_ONCE)

        self._begin = jax.jit(begin, out_shardings=everywhere)
        self._fix = jax.jit(
            lambda params: decoder.fix(nnx.merge(graphdef, params)), out_shardings=everywhere
        )
        self._steps = jax.jit(steps, out_shardings=everywhere, donate_argnums=2)

    def __call__(self, params: Any, prompt: np.ndarray, tokens: int) -> list[Hypothesis]:
        """The best continuations of `prompt` [n ≥ 1] by `tokens` tokens or fewer, the best first.

        There are K of them, unless there are not as many texts of this length.
        """
        layers = self._fix(params)
        cache = self._read_prompt(params, layers, prompt)
        state = self._begin(cache, np.int32(prompt[-1]))
        parts: list[Step] = []
        for _ in range(0, tokens, TOKENS_AT_ONCE):
            state, done = self._steps(params, layers, state, self._table)
            parts.append(jax.device_get(done))
            if not (parts[-1].going.score[-1] > -np.inf).any():
                break
        done = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:tokens], *parts)
        return hypotheses(done, self._beam)
