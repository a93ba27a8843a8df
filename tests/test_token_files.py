import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from txl_jax import corpora, token_files, vocab
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError
from txl_jax.folders import Folder
from txl_jax.token_files import TokenFiles

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
    files = token_files.prepare(cfg)
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
    files = token_files.prepare(cfg)
    manifest = json.loads((files.folder / "manifest.json").read_text())
    assert sum(manifest["splits"][split]["documents"] for split in SPLITS) == N_FILES
    for split in SPLITS:
        assert manifest["splits"][split]["tokens"] == len(expected_text(cfg, split))
    assert manifest["fingerprint"] == files.fingerprint
    assert manifest["vocab_size"] == len(files.vocab)


def test_a_survey_knows_the_tokens_and_writes_nothing(cfg):
    found = token_files.survey(cfg)
    assert not Path(cfg.data_dir).parent.exists()
    files = token_files.prepare(cfg)
    assert found.n_tokens == {split: len(files.splits[split]) for split in SPLITS}
    assert (found.vocab, found.fingerprint) == (files.vocab, files.fingerprint)
    assert token_files.survey(cfg).token_files().folder == files.folder


def test_prepared_files_are_used_again(cfg, monkeypatch):
    first = token_files.prepare(cfg)
    monkeypatch.delattr(vocab.BytesVocab, "encode")  # so that nothing can be made again
    second = token_files.prepare(cfg)
    assert second.folder == first.folder
    for split in SPLITS:
        np.testing.assert_array_equal(second.splits[split], first.splits[split])


def test_a_changed_corpus_never_uses_the_old_files(cfg):
    old = token_files.prepare(cfg)
    path = Path(cfg.text_dir, "0.txt")
    text = path.read_bytes()
    status = path.stat()
    path.write_bytes(text.replace(b"D", b"d"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    changed = token_files.prepare(cfg)
    assert changed.folder != old.folder
    assert_whole(changed, cfg)
    path.unlink()
    without = token_files.prepare(cfg)
    assert_whole(without, cfg)
    path.write_bytes(text)
    assert token_files.prepare(cfg).folder == old.folder
    assert folders(cfg) == sorted([old.folder, changed.folder, without.folder])


def test_text_that_moves_from_one_file_to_the_next_is_another_corpus(cfg):
    corpus = corpora.open_corpus(cfg)
    assert isinstance(corpus, Folder)
    first, second = (corpus.root / name for name in corpus.files["train"][:2])
    first.write_bytes(b"one\n\ftwo")
    second.write_bytes(b"three")
    old = token_files.prepare(cfg)
    first.write_bytes(b"one")
    second.write_bytes(b"two\n\fthree")
    assert token_files.prepare(cfg).fingerprint != old.fingerprint


@pytest.mark.parametrize("name", ["train.npy", "test.npy", "vocab.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer", "zeros"])
def test_damaged_files_are_made_again(cfg, name, damage):
    files = token_files.prepare(cfg)
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
    again = token_files.prepare(cfg)
    assert again.folder == files.folder
    assert path.read_bytes() == whole
    assert folders(cfg) == [files.folder]
    assert_whole(files, cfg)  # opened before the damage, and still whole
    assert_whole(again, cfg)


def test_files_of_another_corpus_under_this_name_are_not_used(cfg):
    files = token_files.prepare(cfg)
    Path(cfg.text_dir, "0.txt").unlink()
    other = token_files.prepare(cfg)
    for path in files.folder.iterdir():
        os.replace(path, other.folder / path.name)
    assert_whole(token_files.prepare(cfg), cfg)


def test_an_empty_folder_of_this_name_is_filled(cfg):
    folder = token_files.prepare(cfg).folder
    for path in folder.iterdir():
        path.unlink()
    assert_whole(token_files.prepare(cfg), cfg)


def test_a_corpus_that_changes_meanwhile_is_an_error(cfg, monkeypatch):
    def build(*args: object) -> vocab.Vocab:
        built = vocab.BytesVocab.build(args[1])  # type: ignore[arg-type]
        Path(cfg.text_dir, "0.txt").write_text("Date")
        return built

    monkeypatch.setattr(vocab, "build", build)
    with pytest.raises(UserError, match="changed while they were read: start again"):
        token_files.prepare(cfg)
    assert folders(cfg) == []


def test_nothing_is_written_for_a_corpus_that_cannot_be_used(cfg):
    Path(cfg.text_dir, "7.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"7\.txt is not UTF-8"):
        token_files.prepare(cfg)
    assert not Path(cfg.data_dir).exists()


def test_a_data_folder_that_cannot_be_written(cfg):
    Path(cfg.data_dir).parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write token files to .*; make room .*--data-dir"):
        token_files.prepare(cfg)


def test_a_file_where_the_prepared_folder_should_be(cfg):
    folder = token_files.prepare(cfg).folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write token files to .*: Not a directory"):
        token_files.prepare(cfg)
    assert folders(cfg) == [folder]


# --- prepare in processes of its own

CHILD = """
import os, resource, signal, sys
from txl_jax import token_files
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
        token_files._write_header = pausing(token_files._write_header, 2)
    case "pause-before-rename":
        os.rename = pausing(os.rename, 1)
    case "no-room" | "little-room" as room:
        size = 100_000 * (room == "little-room")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def main(args):
    cfg = DataConfig(dataset="text", text_dir=args[1], data_dir=args[2])
    print(token_files.prepare(cfg).folder)

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
    files = token_files.prepare(cfg)
    assert outputs == [(f"{files.folder}\n", "")] * 2
    assert folders(cfg) == [files.folder]
    assert_whole(files, cfg)


def test_the_second_process_keeps_the_files_of_the_first(cfg):
    process = child("pause-before-rename", cfg)
    wait_for_pause(process)
    files = token_files.prepare(cfg)
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
    files = token_files.prepare(cfg)
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
