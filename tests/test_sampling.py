import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txl_jax.decoding import Sampling
from txl_jax.errors import UserError
from txl_jax.sampling import discourage, sample

LOGITS = np.log(np.asarray([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)) + 3


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(temperature=0.5), np.square([0.1, 0.4, 0.05, 0.3, 0.15]) / 0.285),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=5), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_k=9), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_p=0.39), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.41), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.8), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (Sampling(top_p=0.99), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=0.5, top_p=0.57), [0, 16 / 25, 0, 9 / 25, 0]),
    ],
    ids=str,
)
def test_tokens_are_as_frequent_as_they_are_probable(sampling, expected):
    n = 20_000
    draw = jax.jit(jax.vmap(lambda key: sample(jnp.asarray(LOGITS), sampling, key)))
    tokens = draw(jax.random.split(jax.random.key(0), n))
    assert tokens.dtype == jnp.int32
    frequency = np.bincount(tokens, minlength=5) / n
    probability = np.asarray(expected)
    deviation = np.sqrt(probability * (1 - probability) / n)
    assert (np.abs(frequency - probability) <= 4 * deviation).all(), frequency


def discouraged(log_probs: np.ndarray, text: list[int], sampling: Sampling) -> np.ndarray:
    """As `discourage`, for all of a text, written out."""
    recent, n = text[-sampling.repeat_window :], sampling.no_repeat_ngram
    new = log_probs.copy()
    for token in set(recent):
        new[token] *= sampling.repetition_penalty
    if n:
        ngrams = {tuple(recent[i : i + n]) for i in range(len(recent) - n + 1)}
        ending = tuple(recent[len(recent) - n + 1 :])
        banned = [token for token in range(len(new)) if (*ending, token) in ngrams]
        if len(banned) < len(new):
            new[banned] = -np.inf
    return new


@pytest.mark.parametrize("penalty, n", [(1.3, 0), (0.5, 0), (1.0, 1), (1.0, 2), (1.2, 3), (2, 4)])
@pytest.mark.parametrize("window", [4, 9, 40])
def test_repetition_is_discouraged_as_it_is_written_out(penalty, n, window):
    sampling = Sampling(repetition_penalty=penalty, no_repeat_ngram=n, repeat_window=window)
    assert sampling.remembered == window
    changed = jax.jit(lambda log_probs, recent: discourage(log_probs, recent, sampling))
    draw = np.random.default_rng(0)
    differs = 0
    for length, n_token in itertools.product([1, 2, 3, 8, 12, 30, 60], [4, 7]):
        text = draw.integers(n_token, size=length).tolist()
        log_probs = np.log(draw.dirichlet(np.ones(n_token))).astype(np.float32)
        recent = np.asarray(([n_token] * window + text)[-window:], np.int32)
        found = np.asarray(changed(log_probs, recent))
        np.testing.assert_allclose(found, discouraged(log_probs, text, sampling), rtol=1e-6)
        differs += bool((found != log_probs).any())
    assert differs >= 5


def test_a_log_probability_falls_by_the_penalty_whatever_it_is():
    """Were it divided, as CTRL divides positive scores, repetition would become likelier."""
    log_probs = jnp.log(jnp.asarray([0.7, 0.2, 0.1]))
    recent = jnp.asarray([0, 2])
    found = jnp.exp(discourage(log_probs, recent, Sampling(repetition_penalty=2)))
    np.testing.assert_allclose(found, [0.49, 0.2, 0.01], rtol=1e-5)


def test_where_no_token_is_left_all_are_allowed():
    log_probs = np.log(np.asarray([0.7, 0.2, 0.1], np.float32))
    sampling = Sampling(no_repeat_ngram=1)
    for text, left in (([0, 1], [2]), ([0, 2, 1], [0, 1, 2])):
        recent = np.asarray(text, np.int32)
        found = np.asarray(discourage(jnp.asarray(log_probs), jnp.asarray(recent), sampling))
        assert np.flatnonzero(np.isfinite(found)).tolist() == left


def test_without_control_of_repetition_nothing_is_remembered():
    assert Sampling(temperature=2, top_k=3, repeat_window=7).remembered == 0


@pytest.mark.parametrize(
    "sampling, complaint",
    [
        (Sampling(temperature=-1), "temperature is -1"),
        (Sampling(top_k=-1), "top_k is -1"),
        (Sampling(top_p=0), "top_p is 0"),
        (Sampling(repetition_penalty=-1.2), r"repetition_penalty is -1.2; .* above 0 \(1: none"),
        (Sampling(repetition_penalty=0), "repetition_penalty is 0"),
        (Sampling(no_repeat_ngram=-1), "no_repeat_ngram is -1"),
        (Sampling(repeat_window=0), "repeat_window is 0; it has to be at least 1"),
        (Sampling(no_repeat_ngram=5, repeat_window=4), "repeat_window is 4; .* at least 5"),
    ],
)
def test_what_cannot_work_is_refused(sampling, complaint):
    with pytest.raises(UserError, match=complaint):
        sampling.check()
