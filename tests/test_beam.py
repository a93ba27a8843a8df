import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from txl_jax.beam import Beams, BeamSearch, Hypothesis, Step, grow, hypotheses
from txl_jax.config import ModelConfig
from txl_jax.decoding import Beam, Sampling
from txl_jax.errors import UserError
from txl_jax.generator import Generator
from txl_jax.model import TransformerXL, abstract
from txl_jax.stops import StopStrings
from txl_jax.vocab import BytesVocab

pytest_plugins = ["tests.tiny_runs"]

LETTERS = BytesVocab(b"abcdef")
MODEL = ModelConfig(
    **{"n_token": len(LETTERS), "n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 8},
    **{"d_inner": 32, "tgt_len": 4, "mem_len": 32, "tie_weight": False},
)
PROMPT = LETTERS.encode(b"abbaceb")
NO_STOPS = StopStrings([]).table(LETTERS)


def best_first(found: list[Hypothesis]) -> list[Hypothesis]:
    return sorted(found, key=lambda hypothesis: -hypothesis.score)


def same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    def but_numbers(hypotheses: list[Hypothesis]) -> list:
        return [(h.tokens, h.reason, h.group) for h in hypotheses]

    assert but_numbers(found) == but_numbers(expected)
    np.testing.assert_allclose(
        [h.log_prob for h in found], [h.log_prob for h in expected], atol=1e-4
    )


def search_slowly(
    next_token: Callable[[list[int]], np.ndarray], beam: Beam, n: int, stops: list[bytes]
) -> list[Hypothesis]:
    """Diverse beam search over lists, as its paper and the fork describe it."""

    def ended(tokens: list[int]) -> bool:
        text = LETTERS.decode(tokens)
        return any(text.endswith(stop) for stop in stops)

    width = beam.beam // beam.groups
    going = [[([], 0.0, 0.0)] for _ in range(beam.groups)]  # tokens, score, log-probability
    found: list[list[Hypothesis]] = [[] for _ in range(beam.groups)]
    for _ in range(n):
        taken = np.zeros(len(LETTERS))
        for group in range(beam.groups):
            candidates = []
            for tokens, score, log_prob in going[group]:
                for token, own in enumerate(next_token(tokens)):
                    new = score + own - beam.diversity * taken[token]
                    candidates.append(([*tokens, token], new, log_prob + own))
            candidates.sort(key=lambda candidate: -candidate[1])
            for tokens, _, log_prob in candidates[:width]:
                if ended(tokens):
                    found[group].append(Hypothesis(tokens, float(log_prob), "stop", group + 1))
            going[group] = [c for c in candidates if not ended(c[0])][:width]
            for tokens, _, _ in going[group]:
                taken[tokens[-1]] += 1
    for group in range(beam.groups):
        for tokens, _, log_prob in going[group]:
            found[group].append(Hypothesis(tokens, float(log_prob), "length", group + 1))
    return best_first([h for group in found for h in best_first(group)[:width]])


@pytest.mark.parametrize("stops", [[], [b"ab", b"cc", b"e"], [b"a", b"b", b"c", b"de"]])
@pytest.mark.parametrize(
    "beam",
    [Beam(1), Beam(5), Beam(6, 3, 0.0), Beam(6, 3, 0.7), Beam(4, 4, 2.0), Beam(8, 2, 0.1)],
    ids=str,
)
def test_search_in_a_table_of_next_tokens_is_as_it_is_written_out(beam, stops):
    """The toy's next token depends on the two before it, so that order matters."""
    n, n_token = 6, len(LETTERS)
    draw = np.random.default_rng(1)
    likely = np.log(draw.dirichlet(np.full(n_token, 0.6), (n_token, n_token))).astype(np.float32)

    def next_token(tokens: list[int]) -> np.ndarray:
        before = [0, 0, *tokens]
        return likely[before[-2], before[-1]]

    table = jnp.asarray(StopStrings(stops).table(LETTERS))
    step = jax.jit(lambda beams, log_probs: grow(beams, log_probs, beam, table))
    beams, older, steps = Beams.start(beam, jnp.int32(0)), np.zeros(beam.beam, int), []
    for _ in range(n):
        newer = np.asarray(beams.token)
        beams, done = step(beams, jnp.asarray(likely[older, newer]))
        older = newer[np.asarray(done.going.parent)]
        steps.append(jax.device_get(done))
    stacked: Step = jax.tree.map(lambda *arrays: np.stack(arrays), *steps)
    expected = search_slowly(next_token, beam, n, stops)
    assert len(expected) > 0
    same(hypotheses(stacked, beam), expected)


@pytest.fixture(scope="module")
def params(compiled: None):
    """Weights so large that what the model says next depends on all that it has read."""
    initial = nnx.to_pure_dict(nnx.state(TransformerXL(MODEL, rngs=nnx.Rngs(1))))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "norm" in jax.tree_util.keystr(path) else 20 * leaf, initial
    )


@pytest.fixture(scope="module")
def next_token(params) -> Callable[[list[int]], np.ndarray]:
    """Log-probabilities [V] of what follows the prompt and some tokens; without memory."""
    xl = nnx.merge(abstract(dataclasses.replace(MODEL, mem_len=0))[0], params)

    @jax.jit
    def read(text: jax.Array) -> jax.Array:
        hidden, _ = xl.hidden(text, xl.init_memory(1))
        return xl.log_probs(hidden)[0]

    def next_token(tokens: list[int]) -> np.ndarray:
        text = [*PROMPT.tolist(), *tokens]
        padded = np.zeros((1, MODEL.mem_len), np.int32)  # what comes later is not seen
        padded[0, : len(text)] = text
        return np.asarray(read(jnp.asarray(padded)))[len(text) - 1]

    return next_token


@functools.cache
def unstopped(beam: Beam) -> BeamSearch:
    return BeamSearch(MODEL, tiny.one_device(), beam, NO_STOPS)


def search(params, beam: Beam, tokens: int, table: np.ndarray = NO_STOPS) -> list[Hypothesis]:
    if table is not NO_STOPS:
        return BeamSearch(MODEL, tiny.one_device(), beam, table)(params, PROMPT, tokens)
    return unstopped(beam)(params, PROMPT, tokens)


@pytest.mark.parametrize("stops", [[], [b"b", b"ca"]])
def test_a_beam_as_wide_as_there_are_texts_finds_them_in_their_order(params, next_token, stops):
    texts: list[Hypothesis] = []
    waiting: list[tuple[list[int], float]] = [([], 0.0)]
    for tokens, log_prob in waiting:  # it grows
        if any(LETTERS.decode(tokens).endswith(stop) for stop in stops):
            texts.append(Hypothesis(tokens, log_prob, "stop", 1))
        elif len(tokens) == 3:
            texts.append(Hypothesis(tokens, log_prob, "length", 1))
        else:
            likely = next_token(tokens)
            waiting += [([*tokens, t], log_prob + float(likely[t])) for t in range(len(LETTERS))]
    found = search(params, Beam(6**3), 3, StopStrings(stops).table(LETTERS))
    assert len(found) == len(texts) <= 6**3
    same(found[:40], best_first(texts)[:40])
    narrow = search(params, Beam(1), 3)
    if not stops:
        assert narrow[0].log_prob < found[0].log_prob - 0.1, (
            "it should take a search to find the best"
        )


@pytest.mark.parametrize("beam", [Beam(4), Beam(4, 2, 1.0)], ids=str)
def test_each_hypothesis_is_predicted_by_what_itself_has_read(params, next_token, beam):
    """Twenty tokens, in two parts: memory has to go where the hypotheses go."""
    found = search(params, beam, 20)
    same(found, search_slowly(next_token, beam, 20, []))
    for before, after in itertools.pairwise(found):
        assert before.score >= after.score


def test_a_beam_of_one_is_greedy(params):
    generator = Generator(MODEL, tiny.one_device(), Sampling(temperature=0))
    greedy = [part.tokens[0] for part in generator(params, PROMPT, 0, 18)]
    (found,) = search(params, Beam(1), 18)
    assert found.tokens == np.concatenate(greedy).tolist()
    assert len(set(found.tokens)) > 2


def test_without_diversity_every_group_searches_as_it_would_alone(params):
    alone = search(params, Beam(2), 9)
    together = search(params, Beam(6, 3, 0.0), 9)
    for group in (1, 2, 3):
        own = [h for h in together if h.group == group]
        same([dataclasses.replace(h, group=1) for h in own], alone)


def test_with_diversity_later_groups_find_other_texts(params):
    found = search(params, Beam(6, 3, 1.5), 9)
    assert len({tuple(h.tokens) for h in found}) == 6
    first = [h for h in found if h.group == 1]
    same(first, search(params, Beam(2), 9))


@pytest.mark.parametrize(
    "beam, complaint",
    [
        (Beam(-1), r"beam is -1; it has to be 0 \(draw samples\) or more"),
        (Beam(4, 0), "groups is 0"),
        (Beam(0, 2), "groups divide a beam, and there is none; add --beam"),
        (Beam(4, 3), "beam is 4, which 3 groups cannot divide; use a multiple of 3"),
        (Beam(4, 2, -0.1), "diversity is -0.1"),
    ],
)
def test_what_cannot_work_is_refused(beam, complaint):
    with pytest.raises(UserError, match=complaint):
        beam.check()
