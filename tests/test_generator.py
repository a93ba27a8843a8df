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
from tests.test_sampling import discouraged
from txl_jax.config import ModelConfig
from txl_jax.decoding import Sampling
from txl_jax.generator import Generator
from txl_jax.model import TransformerXL, abstract

pytest_plugins = ["tests.tiny_runs"]

MODEL = ModelConfig(
    **{"n_token": 50, "n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
    **{"tgt_len": 6, "mem_len": 64, "tie_weight": False},
)
GREEDY = Sampling(temperature=0)
PROMPT = np.asarray([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32, 3, 8, 46, 2, 6], np.uint8)


@pytest.fixture(scope="module")
def params(compiled: None):
    """Weights so large that what the model says next depends on all that it has read."""
    initial = nnx.to_pure_dict(nnx.state(TransformerXL(MODEL, rngs=nnx.Rngs(1))))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "norm" in jax.tree_util.keystr(path) else 30 * leaf, initial
    )


@functools.cache
def generator(sampling: Sampling, samples: int, at_once: int, **changes) -> Generator:
    cfg = dataclasses.replace(MODEL, **changes)
    return Generator(cfg, tiny.one_device(), sampling, samples, at_once)


def drawn(
    params,
    sampling: Sampling,
    prompt: np.ndarray = PROMPT,
    seed: int = 0,
    samples: int = 1,
    at_once: int = 4,
    **changes,
) -> tuple[np.ndarray, np.ndarray]:
    """The first 30 tokens of each sample with which a generator continues `prompt`."""
    parts = list(generator(sampling, samples, at_once, **changes)(params, prompt, seed, 30))
    assert [part.tokens.shape for part in parts[:-1]] == [(samples, at_once)] * (29 // at_once)
    tokens, log_probs = (np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True))
    assert tokens.shape == log_probs.shape == (samples, 30)
    return tokens, log_probs


def continued(params, sampling: Sampling, *args, **changes) -> list[int]:
    """The tokens of the only sample."""
    return drawn(params, sampling, *args, **changes)[0][0].tolist()


@pytest.fixture(scope="module")
def predicted(params) -> Callable[[list[int]], np.ndarray]:
    """Log-probabilities [V] of what follows a text, all of which is read again, without memory."""
    xl = nnx.merge(abstract(dataclasses.replace(MODEL, mem_len=0))[0], params)

    @jax.jit
    def read(text: jax.Array) -> jax.Array:
        hidden, _ = xl.hidden(text, xl.init_memory(1))
        return xl.log_probs(hidden)[0]

    def predicted(text: list[int]) -> np.ndarray:
        padded = np.zeros((1, MODEL.mem_len), np.int32)  # what comes later is not seen
        padded[0, : len(text)] = text
        return np.asarray(read(jnp.asarray(padded)))[len(text) - 1]

    return predicted


@pytest.mark.parametrize("length", [1, 5, 6, 7, 13, 20])
def test_greedy_through_memory_equals_greedy_by_full_recomputation(params, predicted, length):
    text, sums = PROMPT[:length].tolist(), []
    for _ in range(30):
        text.append(int(predicted(text).argmax()))
        sums.append(predicted(text[:-1])[text[-1]])
    expected = text[length:]
    assert len(set(expected)) > 5, "a text that repeats itself would show little"
    tokens, log_probs = drawn(params, GREEDY, PROMPT[:length])
    assert tokens[0].tolist() == expected
    np.testing.assert_allclose(log_probs[0], sums, atol=2e-4)


def test_log_probabilities_are_the_models_whatever_the_sampling(params, predicted):
    sampling = Sampling(temperature=2, top_k=20, repetition_penalty=1.5)
    tokens, log_probs = drawn(params, sampling, samples=2)
    for row in range(2):
        text = PROMPT.tolist()
        for token, log_prob in zip(tokens[row], log_probs[row], strict=True):
            assert log_prob == pytest.approx(predicted(text)[token], abs=5e-4)
            text.append(int(token))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0, repetition_penalty=1.4),
        Sampling(0, repetition_penalty=1.4, repeat_window=8),
        Sampling(0, no_repeat_ngram=1, repeat_window=25),
        Sampling(0, repetition_penalty=1.1, no_repeat_ngram=2),
    ],
    ids=str,
)
def test_repetition_is_controlled_over_prompt_and_text(params, predicted, sampling):
    text = PROMPT.tolist()
    for _ in range(30):
        text.append(int(discouraged(predicted(text), text, sampling).argmax()))
    assert continued(params, sampling) == text[len(PROMPT) :] != continued(params, GREEDY)


@pytest.mark.parametrize("n", [1, 3])
def test_no_ngram_is_written_twice(params, n):
    """With few tokens to choose from, which would repeat themselves otherwise."""

    def repeated(sampling: Sampling) -> int:
        times = 0
        for row in drawn(params, sampling, samples=4)[0]:
            text = [*PROMPT.tolist(), *row.tolist()]
            ngrams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
            first_written = len(PROMPT) - n + 1
            times += sum(ngrams[i] in ngrams[:i] for i in range(first_written, len(ngrams)))
        return times

    assert repeated(Sampling(temperature=0.1)) > 0
    assert repeated(Sampling(temperature=0.1, no_repeat_ngram=n)) == 0


def test_a_sample_is_the_same_however_many_there_are(params):
    sampling = Sampling(0.9, 30, 0.99, 1.2, 3)
    tokens, log_probs = drawn(params, sampling, samples=5, seed=3)
    assert len({tuple(row) for row in tokens}) == 5
    for samples in (1, 2):
        fewer = drawn(params, sampling, samples=samples, seed=3)
        np.testing.assert_array_equal(fewer[0], tokens[:samples])
        np.testing.assert_allclose(fewer[1], log_probs[:samples], atol=2e-4)


def test_it_does_not_matter_how_many_tokens_are_drawn_at_once(params):
    sampling = Sampling(no_repeat_ngram=2)
    one, *others = (continued(params, sampling, at_once=k) for k in (1, 7, 64))
    assert others == [one, one]


def test_a_prompt_in_segments_is_read_as_in_one_go(params):
    """Six tokens at a time, nineteen at once, or each on its own."""
    for sampling in (GREEDY, Sampling()):
        first, *others = (
            continued(params, sampling, tgt_len=tgt_len) for tgt_len in (6, len(PROMPT) - 1, 1)
        )
        assert others == [first, first]
    assert continued(params, GREEDY, PROMPT[1:]) != continued(params, GREEDY)


def test_memory_as_short_as_it_is_given(params):
    """Without memory the last token alone decides, and with it those before it."""
    alone = continued(params, GREEDY, mem_len=0)
    assert alone == continued(params, GREEDY, PROMPT[-1:], mem_len=0)
    assert alone != continued(params, GREEDY)
    following = dict(itertools.pairwise([int(PROMPT[-1]), *alone]))
    assert all(following[a] == b for a, b in itertools.pairwise(alone))


def test_a_seed_fixes_the_text(params):
    texts = [continued(params, Sampling(), seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3
    assert len(set(texts[0])) > 5


def test_the_narrowest_choice_is_the_greedy_one(params):
    greedy = continued(params, GREEDY)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(1.5, top_k=1, top_p=0.5)):
        assert continued(params, sampling, seed=7) == greedy


def test_nothing_is_compiled_anew_for_another_prompt_or_a_later_token(params, caplog):
    continue_text = generator(Sampling(no_repeat_ngram=2), 2, 4)
    list(continue_text(params, PROMPT, 0, 5))
    with jax.log_compiles():
        list(continue_text(params, PROMPT[3:], 1, 30))
    assert "ompil" not in caplog.text
