import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from txl_jax import corpora, data, vocab
from txl_jax.config import DataConfig
from txl_jax.corpora import SPLITS
from txl_jax.data import Streams, TokenFiles
from txl_jax.errors import UserError

N_FILES = 200


@pytest.fixture
def cfg(tmp_path) -> DataConfig:
    """A folder of text, and a data folder that does not exist yet."""
    root = tmp_path / "text"
    root.mkdir()
    for i in range(N_FILES):
        (root / f"{i}.txt").write_text(f"Datei {i}: Größe\n" * (i + 1))
    return DataConfig(dataset="text", text_dir=str(root), data_dir=str(tmp_path / "a" / "data"))


def text_of(files: TokenFiles, split: str) -> bytes:
    return files.vocab.decode(files.splits[split])


def expected_text(cfg: DataConfig, split: str) -> bytes:
    return b"".join(corpora.open_corpus(cfg).documents(split))


def assert_whole(files: TokenFiles, cfg: DataConfig) -> None:
    assert [text_of(files, split) for split in SPLITS] == [expected_text(cfg, s) for s in SPLITS]


def folders(cfg: DataConfig) -> list[Path]:
    return sorted(Path(cfg.data_dir).iterdir())


# --- prepare


def test_tokens_are_the_text_of_each_split(cfg):
    files = data.prepare(cfg)
    assert_whole(files, cfg)
    assert folders(cfg) == [files.folder]
    assert files.folder.name == f"text-bytes-{files.fingerprint[:12]}"
    assert sorted(path.name for path in files.folder.iterdir()) == [
        *("manifest.json", "test.npy", "train.npy", "valid.npy", "vocab.json")
    ]
    everything = b"".join(expected_text(cfg, split) for split in SPLITS)
    assert files.vocab.decode(range(len(files.vocab))) == bytes(sorted(set(everything)))
    assert vocab.load(files.folder / "vocab.json") == files.vocab
    for split in SPLITS:
        assert isinstance(files.splits[split], np.memmap)
        assert files.splits[split].dtype == np.uint8
        assert not files.splits[split].flags.writeable
        np.testing.assert_array_equal(np.load(files.folder / f"{split}.npy"), files.splits[split])


def test_the_manifest_counts_documents_and_tokens(cfg):
    files = data.prepare(cfg)
    manifest = json.loads((files.folder / "manifest.json").read_text())
    assert sum(manifest["splits"][split]["documents"] for split in SPLITS) == N_FILES
    for split in SPLITS:
        assert manifest["splits"][split]["tokens"] == len(expected_text(cfg, split))
    assert manifest["fingerprint"] == files.fingerprint
    assert manifest["vocab_size"] == len(files.vocab)


def test_a_survey_knows_the_tokens_and_writes_nothing(cfg):
    found = data.survey(cfg)
    assert not Path(cfg.data_dir).parent.exists()
    files = data.prepare(cfg)
    assert found.n_tokens == {split: len(files.splits[split]) for split in SPLITS}
    assert (found.vocab, found.fingerprint) == (files.vocab, files.fingerprint)
    assert data.survey(cfg).token_files().folder == files.folder


def test_prepared_files_are_used_again(cfg, monkeypatch):
    first = data.prepare(cfg)
    monkeypatch.delattr(vocab.BytesVocab, "encode")  # so that nothing can be made again
    second = data.prepare(cfg)
    assert second.folder == first.folder
    for split in SPLITS:
        np.testing.assert_array_equal(second.splits[split], first.splits[split])


def test_a_changed_corpus_never_uses_the_old_files(cfg):
    old = data.prepare(cfg)
    path = Path(cfg.text_dir, "0.txt")
    text = path.read_bytes()
    status = path.stat()
    path.write_bytes(text.replace(b"D", b"d"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    changed = data.prepare(cfg)
    assert changed.folder != old.folder
    assert_whole(changed, cfg)
    path.unlink()
    without = data.prepare(cfg)
    assert_whole(without, cfg)
    path.write_bytes(text)
    assert data.prepare(cfg).folder == old.folder
    assert folders(cfg) == sorted([old.folder, changed.folder, without.folder])


def test_text_that_moves_from_one_file_to_the_next_is_another_corpus(cfg):
    corpus = corpora.open_corpus(cfg)
    assert isinstance(corpus, corpora.Folder)
    first, second = (corpus.root / name for name in corpus.files["train"][:2])
    first.write_bytes(b"one\n\ftwo")
    second.write_bytes(b"three")
    old = data.prepare(cfg)
    first.write_bytes(b"one")
    second.write_bytes(b"two\n\fthree")
    assert data.prepare(cfg).fingerprint != old.fingerprint


@pytest.mark.parametrize("name", ["train.npy", "test.npy", "vocab.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer", "zeros"])
def test_damaged_files_are_made_again(cfg, name, damage):
    files = data.prepare(cfg)
    path = files.folder / name
    whole = path.read_bytes()
    path.unlink()
    match damage:
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "longer":
            path.write_bytes(whole + b"}")
        case "zeros":
            path.write_bytes(bytes(len(whole)))
    again = data.prepare(cfg)
    assert again.folder == files.folder
    assert path.read_bytes() == whole
    assert folders(cfg) == [files.folder]
    assert_whole(files, cfg)  # opened before the damage, and still whole
    assert_whole(again, cfg)


def test_files_of_another_corpus_under_this_name_are_not_used(cfg):
    files = data.prepare(cfg)
    Path(cfg.text_dir, "0.txt").unlink()
    other = data.prepare(cfg)
    for path in files.folder.iterdir():
        os.replace(path, other.folder / path.name)
    assert_whole(data.prepare(cfg), cfg)


def test_an_empty_folder_of_this_name_is_filled(cfg):
    folder = data.prepare(cfg).folder
    for path in folder.iterdir():
        path.unlink()
    assert_whole(data.prepare(cfg), cfg)


def test_a_corpus_that_changes_meanwhile_is_an_error(cfg, monkeypatch):
    def build(*args: object) -> vocab.Vocab:
        built = vocab.BytesVocab.build(args[1])  # type: ignore[arg-type]
        Path(cfg.text_dir, "0.txt").write_text("Date")
        return built

    monkeypatch.setattr(vocab, "build", build)
    with pytest.raises(UserError, match="changed while they were read: start again"):
        data.prepare(cfg)
    assert folders(cfg) == []


def test_nothing_is_written_for_a_corpus_that_cannot_be_used(cfg):
    Path(cfg.text_dir, "7.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"7\.txt is not UTF-8"):
        data.prepare(cfg)
    assert not Path(cfg.data_dir).exists()


def test_a_data_folder_that_cannot_be_written(cfg):
    Path(cfg.data_dir).parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write token files to .*; make room .*--data-dir"):
        data.prepare(cfg)


def test_a_file_where_the_prepared_folder_should_be(cfg):
    folder = data.prepare(cfg).folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write token files to .*: Not a directory"):
        data.prepare(cfg)
    assert folders(cfg) == [folder]


# --- prepare in processes of its own

CHILD = """
import os, resource, signal, sys
from txl_jax import data
from txl_jax.config import DataConfig
from txl_jax.errors import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
calls = 0

def pausing(function, call):
    def pause(*args):
        global calls
        calls += 1
        if calls == call:
            print("paused", flush=True)
            sys.stdin.readline()
        return function(*args)
    return pause

match sys.argv[1]:
    case "pause-while-writing":  # train.npy has its tokens, but not yet their number
        data._write_header = pausing(data._write_header, 2)
    case "pause-before-rename":
        os.rename = pausing(os.rename, 1)
    case "no-room" | "little-room" as room:
        size = 100_000 * (room == "little-room")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def main(args):
    cfg = DataConfig(dataset="text", text_dir=args[1], data_dir=args[2])
    print(data.prepare(cfg).folder)

run_command(main)
"""


def child(how: str, cfg: DataConfig) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CHILD, how, cfg.text_dir, cfg.data_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )


def wait_for_pause(process: subprocess.Popen[str]) -> None:
    assert process.stdout and process.stdout.readline() == "paused\n"


def test_two_processes_prepare_at_the_same_time(cfg):
    processes = [child("pause-before-rename", cfg) for _ in range(2)]
    for process in processes:
        wait_for_pause(process)
    assert len(folders(cfg)) == 2  # both have built, neither has given its folder the name
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    files = data.prepare(cfg)
    assert outputs == [(f"{files.folder}\n", "")] * 2
    assert folders(cfg) == [files.folder]
    assert_whole(files, cfg)


def test_the_second_process_keeps_the_files_of_the_first(cfg):
    process = child("pause-before-rename", cfg)
    wait_for_pause(process)
    files = data.prepare(cfg)
    before = (files.folder / "train.npy").stat().st_ino
    process.communicate("go\n")
    assert process.returncode == 0
    assert (files.folder / "train.npy").stat().st_ino == before
    assert folders(cfg) == [files.folder]


@pytest.mark.parametrize("moment", ["pause-while-writing", "pause-before-rename"])
def test_a_killed_preparation_leaves_nothing_that_counts_as_whole(cfg, moment):
    process = child(moment, cfg)
    wait_for_pause(process)
    process.kill()
    process.communicate()
    assert all(path.name.startswith(".") for path in folders(cfg))
    files = data.prepare(cfg)
    assert files.folder in folders(cfg)
    assert_whole(files, cfg)


@pytest.mark.parametrize("moment", ["pause-while-writing", "pause-before-rename"])
def test_an_interrupted_preparation_leaves_nothing(cfg, moment):
    process = child(moment, cfg)
    wait_for_pause(process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    # Python ends by the signal or with the shell's status for it, depending on its version.
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert folders(cfg) == []


@pytest.mark.parametrize("room", ["no-room", "little-room"])
def test_a_full_disk_is_one_line_and_leaves_nothing(cfg, room):
    process = child(room, cfg)
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert re.fullmatch(
        r"error: cannot write token files to \S+: File too large; make room there or name another "
        r"folder with --data-dir\n",
        errors,
    )
    if room == "no-room":
        assert not Path(cfg.data_dir).parent.exists()
    else:
        assert folders(cfg) == []


# --- Streams


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
