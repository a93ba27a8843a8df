import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_jax.sentences import Sentences
from txl_jax.streams import Streams

EOS = 9
texts = st.lists(st.lists(st.integers(0, 8), max_size=7), min_size=1, max_size=30)


def split(sentences: list[list[int]], first: bool) -> np.ndarray:
    """The sentences as they stand in a file, each ended by EOS, and one before them all."""
    tokens = [EOS] if first else []
    for sentence in sentences:
        tokens += [*sentence, EOS]
    return np.array(tokens, np.uint8)


def parts(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """The sentences in an array of tokens that ends with one."""
    found, rest = [], []
    for token in tokens.tolist():
        rest.append(token)
        if token == EOS:
            found.append(tuple(rest))
            rest = []
    assert not rest
    return found


@given(texts, st.booleans(), st.integers(1, 40), st.integers(0, 3))
def test_every_epoch_has_every_sentence_once(sentences, first, chunk_tokens, epoch):
    tokens = split(sentences, first)
    shuffled = Sentences(tokens, EOS, seed=1, chunk_tokens=chunk_tokens).epoch(epoch)[:]
    assert len(shuffled) == len(tokens)
    if first:
        assert shuffled[0] == EOS
    assert sorted(parts(shuffled[first:])) == sorted(parts(tokens[first:]))


@given(texts, st.booleans(), st.integers(1, 40), st.data())
def test_a_slice_is_that_of_the_whole(sentences, first, chunk_tokens, data):
    tokens = split(sentences, first)
    epoch = Sentences(tokens, EOS, seed=1, chunk_tokens=chunk_tokens).epoch(2)
    whole = epoch[:]
    start, stop = (data.draw(st.integers(0, len(tokens) + 2)) for _ in range(2))
    np.testing.assert_array_equal(epoch[start:stop], whole[start:stop])


def test_the_last_sentence_may_be_cut_off():
    tokens = np.array([1, EOS, 2, 3, EOS, 4], np.uint8)
    for epoch in range(6):
        shuffled = Sentences(tokens, EOS, seed=0).epoch(epoch)[:]
        assert sorted(shuffled) == sorted(tokens)


def test_the_order_follows_from_seed_and_epoch():
    tokens = split([[i % 8, i // 8] for i in range(64)], first=True)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(Sentences(tokens, EOS, seed, chunk_tokens=32).epoch(epoch)[:])

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert orders == [order(seed, epoch) for seed in range(3) for epoch in range(3)]


def test_sentences_move_far_and_stay_in_their_chunk():
    """Chunks change places, as the original's files do; what is in one stays together."""
    tokens = split([[i // 50] * 3 for i in range(400)], first=False)
    sentences = Sentences(tokens, EOS, seed=0, chunk_tokens=200)
    found = sentences.epoch(0)[:].reshape(8, 50, 4)
    assert (found[:, :, 0] == found[:, :1, 0]).all(), "a chunk is 50 sentences"
    assert sorted(found[:, 0, 0]) == list(range(8))
    assert list(found[:, 0, 0]) != list(range(8))
    within = split([[i // 8, i % 8] for i in range(64)], first=False)
    places = parts(Sentences(within, EOS, seed=0).epoch(0)[:])
    moved = [abs(8 * a + b - place) for place, (a, b, _) in enumerate(places)]
    assert np.mean(moved) > 10, "a third of the length is expected"


@pytest.mark.parametrize("tokens", [[], [EOS], [1], [EOS, EOS]])
def test_little_is_no_trouble(tokens):
    array = np.array(tokens, np.uint8)
    np.testing.assert_array_equal(Sentences(array, EOS, seed=0).epoch(1)[:], array)


def test_streams_are_cut_from_the_order_of_their_epoch():
    tokens = split([[i % 8, i // 8] for i in range(64)], first=True)
    sentences = Sentences(tokens, EOS, seed=3, chunk_tokens=50)
    streams = Streams.trimmed(sentences, batch=3, tgt_len=5)
    for epoch in range(2):
        plain = Streams.trimmed(sentences.epoch(epoch)[:], batch=3, tgt_len=5)
        for i in range(len(plain)):
            n = epoch * len(plain) + i
            for got, expected in zip(streams.at(n), plain.segment(i), strict=True):
                np.testing.assert_array_equal(got, expected)
            rows = slice(1, 3)
            for got, expected in zip(streams.at(n, rows), plain.segment(i, rows), strict=True):
                np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rows", [slice(None), slice(2, 5)])
def test_an_epoch_ends_with_what_takes_long_to_find_for_the_next(rows, monkeypatch):
    tokens = split([[i % 8, i // 8] for i in range(64)], first=True)
    streams = Streams.trimmed(Sentences(tokens, EOS, seed=3, chunk_tokens=20), 6, 3)
    assert len(streams) > 6
    found, find = [], Sentences._find_order

    def note(sentences: Sentences, epoch: int, chunk: int):
        found.append(epoch)
        return find(sentences, epoch, chunk)

    monkeypatch.setattr(Sentences, "_find_order", note)
    for i in range(len(streams)):
        before = found.count(1)
        streams.at(i, rows)
        assert found.count(1) <= before + 2
    assert found.count(1) >= 3
    found.clear()
    streams.at(len(streams), rows)
    assert found == []
