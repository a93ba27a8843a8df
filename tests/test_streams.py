import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from txl_jax import token_files
from txl_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from txl_jax.documents import END
from txl_jax.errors import UserError
from txl_jax.streams import Streams, training_streams
from txl_jax.token_files import TokenFiles


def original_segments(tokens: np.ndarray, batch: int, tgt_len: int):
    """The original's LMOrderedIterator, slowly: time-major columns, one token at a time."""
    steps = len(tokens) // batch
    columns = [[int(t) for t in tokens[b * steps : (b + 1) * steps]] for b in range(batch)]
    for i in range(0, steps - 1, tgt_len):
        inputs, targets = [], []
        for column in columns:
            inputs.append([0] * tgt_len)
            targets.append([-1] * tgt_len)
            for t in range(min(tgt_len, steps - 1 - i)):
                inputs[-1][t] = column[i + t]
                targets[-1][t] = column[i + t + 1]
        yield inputs, targets


sizes = st.integers(1, 12)


@given(st.integers(0, 150), sizes, sizes)
def test_trimmed_is_the_originals_order(n, batch, tgt_len):
    assume(n // batch > tgt_len)
    tokens = np.random.default_rng(0).integers(256, size=n).astype(np.uint8)
    streams = Streams.trimmed(tokens, batch, tgt_len)
    expected = list(original_segments(tokens, batch, tgt_len))
    assert len(streams) == len(expected)
    for i, (inputs, targets) in enumerate(expected):
        np.testing.assert_array_equal(streams.segment(i), (inputs, targets), strict=False)
    assert streams.n_tokens == sum(np.sum(np.array(t) >= 0) for _, t in expected)


@given(st.integers(2, 150), st.integers(1, 200), st.integers(1, 60))
def test_covering_makes_every_prediction_once_in_order(n, batch, tgt_len):
    streams = Streams.covering(np.arange(1000, 1000 + n, dtype=np.uint16), batch, tgt_len)
    segments = [streams.segment(i) for i in range(len(streams))]
    inputs = np.concatenate([inputs for inputs, _ in segments], axis=1)
    targets = np.concatenate([targets for _, targets in segments], axis=1)
    assert inputs.shape == targets.shape == (batch, len(streams) * tgt_len)
    counted = targets >= 0
    # Row after row, left to right: each token but the first, once.
    np.testing.assert_array_equal(targets[counted], np.arange(1001, 1000 + n))
    np.testing.assert_array_equal(inputs[counted], np.arange(1000, 1000 + n - 1))
    assert set(inputs[~counted]) <= {0} and set(targets[~counted]) <= {-1}
    # Padding stands at the end of a row only, and no segment is all padding.
    assert np.all(counted[:, :-1] >= counted[:, 1:])
    assert all(np.any(targets >= 0) for _, targets in segments)
    assert streams.n_tokens == n - 1


@given(st.integers(2, 200), sizes, st.integers(1, 20), st.integers(0, 8), st.integers(1, 4))
def test_seamless_streams_read_before_they_count(n, batch, tgt_len, context, together):
    tokens = np.arange(1000, 1000 + n, dtype=np.uint16)
    streams = Streams.seamless(tokens, batch, tgt_len, context, together)
    segments = [streams.segment(i) for i in range(len(streams))]
    inputs = np.concatenate([inputs for inputs, _ in segments], axis=1)
    targets = np.concatenate([targets for _, targets in segments], axis=1)
    counted = targets >= 0
    np.testing.assert_array_equal(targets[counted], np.arange(1001, 1000 + n))
    np.testing.assert_array_equal(inputs[counted], np.arange(1000, 1000 + n - 1))
    again = 0
    for row in range(batch):
        read = inputs[row][inputs[row] > 0]
        np.testing.assert_array_equal(np.diff(read), 1)
        if counted[row].any():
            # Segments are those of a single stream, and only the first begins without context.
            assert (read[0] - 1000) % (tgt_len * together) == 0
            before = int(np.argmax(counted[row]))
            assert before == (context * tgt_len if row else 0)
            again += before
    assert (streams.n_tokens, streams.n_context) == (n - 1, again)
    # In the fewest turns.
    one_stream = -(-(n - 1) // tgt_len)
    blocks = -(-max(1, one_stream - context) // (together * batch))
    assert len(streams) == min(one_stream, context + together * blocks)


@given(st.slices(7), st.sampled_from([Streams.trimmed, Streams.covering]))
def test_rows_of_a_segment_can_be_read_apart(rows, layout):
    streams = layout(np.arange(100, dtype=np.uint16), 7, 4)
    for i in range(len(streams)):
        inputs, targets = streams.segment(i)
        some_inputs, some_targets = streams.segment(i, rows)
        np.testing.assert_array_equal(some_inputs, inputs[rows])
        np.testing.assert_array_equal(some_targets, targets[rows])


@pytest.mark.parametrize("layout", [Streams.trimmed, Streams.covering])
def test_segments_are_int32_and_do_not_wrap(layout):
    inputs, targets = layout(np.full(20, 255, np.uint8), 2, 4).segment(0)
    assert inputs.dtype == targets.dtype == np.int32
    assert np.all(inputs == 255) and np.all(targets == 255)


def test_only_the_rows_asked_for_are_read():
    class Recorder:
        def __init__(self, tokens: np.ndarray):
            self.tokens, self.read = tokens, set()

        def __len__(self) -> int:
            return len(self.tokens)

        def __getitem__(self, key: slice) -> np.ndarray:
            self.read |= set(range(*key.indices(len(self))))
            return self.tokens[key]

    recorder = Recorder(np.arange(100))
    streams = Streams(recorder, batch=4, tgt_len=5, stride=25, length=24)  # type: ignore[arg-type]
    streams.segment(2, slice(1, 3))
    assert recorder.read == {*range(35, 41), *range(60, 66)}


@pytest.mark.parametrize("i", [-1, 3])
def test_there_is_no_segment_beyond_the_epoch(i):
    with pytest.raises(IndexError):
        Streams.trimmed(np.arange(10), 1, 4).segment(i)


@given(st.integers(0, 60), sizes, sizes)
def test_a_stream_too_short_says_what_would_fit(n, batch, tgt_len):
    assume(n // batch <= tgt_len)
    tokens = np.zeros(n, np.uint8)
    with pytest.raises(UserError) as caught:
        Streams.trimmed(tokens, batch, tgt_len)
    message = str(caught.value)
    assert message.startswith(
        f"{n} tokens in a batch of {batch} give streams of {n // batch} tokens, too short for a "
        f"tgt_len of {tgt_len} "
    )
    advice = {name: int(value) for name, value in re.findall(r"--([a-z-]+) (\d+) or less", message)}
    fits_tgt_len, fits_batch = advice.get("tgt-len", 0), advice.get("batch", 0)
    if fits_tgt_len:
        Streams.trimmed(tokens, batch, fits_tgt_len)
    with pytest.raises(UserError):
        Streams.trimmed(tokens, batch, fits_tgt_len + 1)
    if fits_batch:
        Streams.trimmed(tokens, fits_batch, tgt_len)
    with pytest.raises(UserError):
        Streams.trimmed(tokens, fits_batch + 1, tgt_len)


@pytest.mark.parametrize("n", [0, 1])
def test_covering_nothing_is_an_error(n):
    with pytest.raises(UserError, match="2 or more are needed"):
        Streams.covering(np.zeros(n, np.uint8), 1, 1)
    with pytest.raises(UserError, match="2 or more are needed"):
        Streams.seamless(np.zeros(n, np.uint8), 1, 1, context=1)


# --- what a run reads


@pytest.fixture
def files(tmp_path) -> TokenFiles:
    """The token files of a folder of text."""
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n")
    data_dir = str(tmp_path.with_name("data"))
    return token_files.prepare(DataConfig("text", text_dir=str(tmp_path), data_dir=data_dir))


def run(batch: int = 2, **data: Any) -> Config:
    return Config(
        model=ModelConfig(tgt_len=5), data=DataConfig(**data), train=TrainConfig(batch=batch)
    )


def test_a_run_reads_all_of_the_train_split(files):
    streams = training_streams(run(), files)
    np.testing.assert_array_equal(streams.tokens[:], files.splits["train"])
    assert (streams.batch, streams.tgt_len) == (2, 5)


@pytest.mark.parametrize("skip_files", [1.0, 3.0, 2.5])
def test_files_can_be_passed_over(files, skip_files):
    text = bytes(files.vocab.decode(files.splits["train"]))
    ends = [i + 1 for i, byte in enumerate(text) if byte == END[0]]
    whole = int(skip_files)
    begin = ends[whole - 1]
    begin += int((skip_files - whole) * (ends[whole] - begin))
    streams = training_streams(run(skip_files=skip_files), files)
    assert bytes(files.vocab.decode(streams.tokens[:])) == text[begin:]


@pytest.mark.parametrize("skip_files", [-0.5, 500, float("nan")])
def test_files_that_are_not_there_cannot_be_passed_over(files, skip_files):
    n = len(files.documents["train"]) - 1
    with pytest.raises(UserError, match=f"skip_files is .*; it has to be .* less than {n}, the"):
        training_streams(run(skip_files=skip_files), files)


@pytest.mark.usefixtures("any_size")
def test_sentences_of_one_billion_words_come_in_another_order_in_every_epoch(tmp_path):
    root = tmp_path / "one-billion-words"
    root.mkdir()
    (root / "1b_word_vocab.txt").write_text("<S>\n<UNK>\n" + "\n".join("abcdefghij") + "\n")
    lines = [f"{a} {b}\n" for a in "abcdefghij" for b in "abcdefghij"]
    for split in ("train", "valid", "test"):
        (root / f"{split}.txt").write_text("".join(lines))
    cfg = DataConfig("lm1b", vocab="words", data_dir=str(tmp_path))
    files = token_files.prepare(cfg)
    streams = training_streams(run(batch=1), files)
    epochs = []
    for epoch in range(2):
        read = np.concatenate(
            [streams.at(epoch * len(streams) + i)[0][0] for i in range(len(streams))]
        )
        text = files.vocab.decode(read[: streams.length]).decode()
        assert text.startswith("\n"), "the sign before the first sentence"
        epochs.append([f"{line.strip()}\n" for line in text.strip().split("\n")])
    assert epochs[0] != epochs[1]
    assert all(epoch != lines for epoch in epochs)
    for epoch in epochs:
        assert sorted(epoch) == lines
    assert files.splits["valid"].tolist() == files.splits["train"].tolist(), "in their own order"
