import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.archives import write
from tests.test_wiki import as_json, tagged
from tests.texts import documents
from txl_jax import corpora, layouts, pieces, text_files, token_files, vocab
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError
from txl_jax.folders import Folder
from txl_jax.layouts import Named
from txl_jax.token_files import Counts, TokenFiles
from txl_jax.words_vocab import WordsVocab

pytestmark = pytest.mark.usefixtures("any_size")

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
    return b"".join(documents(corpora.open_corpus(cfg), split))


def assert_whole(files: TokenFiles, cfg: DataConfig) -> None:
    assert [text_of(files, split) for split in SPLITS] == [expected_text(cfg, s) for s in SPLITS]


def folders(cfg: DataConfig) -> list[Path]:
    """What is in the data folder; locks stay there."""
    return sorted(path for path in Path(cfg.data_dir).iterdir() if path.suffix != ".lock")


# --- prepare


def test_tokens_are_the_text_of_each_split(cfg):
    files = token_files.prepare(cfg)
    assert_whole(files, cfg)
    assert folders(cfg) == [files.folder]
    assert files.folder.name == f"text-bytes-{files.fingerprint[:12]}"
    assert sorted(path.name for path in files.folder.iterdir()) == [
        *("manifest.json", "test.documents.npy", "test.npy", "train.documents.npy", "train.npy"),
        *("valid.documents.npy", "valid.npy", "vocab.json"),
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


def test_documents_begin_where_their_files_do(cfg):
    files, corpus = token_files.prepare(cfg), corpora.open_corpus(cfg)
    for split in SPLITS:
        ends = np.cumsum([len(text) for text in documents(corpus, split)])
        assert files.documents[split].dtype == np.int64
        assert files.documents[split].tolist() == [0, *ends.tolist()]


def test_what_was_found_is_counted(cfg):
    files = token_files.prepare(cfg)
    text = expected_text(cfg, "train")
    common = sorted(set(text), key=lambda value: (-text.count(value), value))
    expected = [(repr(bytes([value])), text.count(value)) for value in common[:20]]
    assert sorted(files.commonest) == sorted(expected)
    assert [files.counts[split].tokens for split in SPLITS] == [
        len(files.splits[split]) for split in SPLITS
    ]


def test_prepared_files_are_used_again_and_the_text_is_not_read(cfg, monkeypatch):
    first = token_files.prepare(cfg)
    assert first.new
    monkeypatch.delattr(Folder, "documents")
    second = token_files.prepare(cfg)
    assert not second.new
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert (second.counts, second.commonest) == (first.counts, first.commonest)
    for split in SPLITS:
        np.testing.assert_array_equal(second.splits[split], first.splits[split])
        np.testing.assert_array_equal(second.documents[split], first.documents[split])


def test_files_that_were_touched_are_read_once_more(cfg, monkeypatch):
    first = token_files.prepare(cfg)
    os.utime(Path(cfg.text_dir, "3.txt"))
    with monkeypatch.context() as patch:
        patch.delattr(vocab.BytesVocab, "encode")  # so that nothing can be made again
        again = token_files.prepare(cfg)
        assert again.folder == first.folder and not again.new
        patch.delattr(Folder, "documents")
        assert token_files.prepare(cfg).folder == first.folder


def test_copies_of_a_text_are_known_side_by_side(cfg, monkeypatch, tmp_path):
    copies = [cfg]
    for i in range(token_files._SIGNATURES):
        copy = shutil.copytree(cfg.text_dir, tmp_path / f"copy {i}")
        copies.append(dataclasses.replace(cfg, text_dir=str(copy)))
    first, *others = [token_files.prepare(copy).folder for copy in copies]
    assert {first, *others} == {first}
    with monkeypatch.context() as patch:
        patch.delattr(Folder, "documents")
        assert {token_files.prepare(copy).folder for copy in copies[1:]} == {first}
        with pytest.raises(AttributeError, match="documents"):
            token_files.prepare(copies[0])  # of the oldest nothing is noted any more
    assert token_files.prepare(copies[0]).folder == first
    signatures = json.loads((first / "manifest.json").read_text())["signatures"]
    assert len(set(signatures)) == len(signatures) == token_files._SIGNATURES


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"signatures": 1', "\xff"])
def test_a_damaged_or_foreign_manifest_is_ignored(cfg, damage):
    other = Path(cfg.data_dir) / "text-bytes-0123456789ab"
    other.mkdir(parents=True)
    (other / "manifest.json").write_text(damage, "latin1")
    files = token_files.prepare(cfg)
    assert_whole(files, cfg)
    manifest = (files.folder / "manifest.json").read_bytes()
    (other / "manifest.json").write_bytes(manifest)
    assert token_files.prepare(cfg).folder == files.folder
    shutil.copytree(files.folder, other, dirs_exist_ok=True)
    assert token_files.prepare(cfg).folder == files.folder
    (files.folder / "manifest.json").unlink()
    assert_whole(token_files.prepare(cfg), cfg)


def wikitext(folder: Path, **splits: str) -> DataConfig:
    """A folder with files of WikiText-103, and the config that names it."""
    root = folder / "wikitext-103"
    root.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (root / f"{split}.txt").write_text(splits.get(split, " a b <unk> \n"))
    return DataConfig(dataset="wikitext-103", vocab="words", data_dir=str(folder))


def test_how_a_text_is_cut_into_blocks_changes_nothing(tmp_path, monkeypatch):
    text = "".join(f" = {i} = \n \n Größe , {i % 7} @-@ <unk> \r\n" for i in range(3000))
    cfg = wikitext(tmp_path, train=text)
    whole = token_files.prepare(cfg)
    for block, size in ((1 << 20, 64), (100, 64), (100, 1 << 20), (4000, 1000)):
        monkeypatch.setattr(layouts, "_BLOCK", block)
        monkeypatch.setattr(pieces, "SIZE", size)
        shutil.rmtree(whole.folder)
        again = token_files.prepare(cfg)
        assert again.folder == whole.folder
        np.testing.assert_array_equal(again.splits["train"], whole.splits["train"])
        assert again.documents["train"].tolist() == [0, len(whole.splits["train"])]


ARTICLES = [("Anarchism", "Anarchism is old.\n\nIt is."), ("Ålesund", "Ø.")]
FILES = {
    "text": {
        "asyncio/coroutines.py": "if é:\r\n\n    pass   \nno end".encode(),
        "asyncio/queues.py": b"\n x = 1\n<unk>\n",
        "typing.py": "日本\n\f\n\n".encode(),
        "empty.py": b"",
        "binary.py": b"a\0b",
    },
    "wiki": {
        "AA/wiki_00": tagged(*ARTICLES),
        "AC/wiki_88": as_json(*ARTICLES),
        "AA/wiki_44": tagged(*ARTICLES[1:]),
    },
}


@pytest.mark.parametrize("block", [5, 1 << 20])
@pytest.mark.parametrize(
    ("dataset", "kind", "fingerprint", "documents"),
    [
        ("text", "bytes", "06b8deb4fbe3", [0, 29]),
        ("text", "words", "d8e295e2d33e", [0, 9]),
        ("code", "bytes", "76d794d2d7cd", [0, 58]),
        ("code", "words", "ab34473f67bc", [0, 15]),
        ("wiki", "bytes", "be5e773434c1", [0, 38, 53]),
        ("wiki", "words", "28cdb596a4c8", [0, 11, 16]),
    ],
)
def test_the_same_text_has_the_same_fingerprint_as_ever(
    tmp_path, monkeypatch, dataset, kind, fingerprint, documents, block
):
    # Others would make every user prepare every corpus anew.
    monkeypatch.setattr(text_files, "_BLOCK", block)
    root = write(tmp_path / "text", FILES.get(dataset, FILES["text"]))
    files = token_files.prepare(
        DataConfig(dataset, str(root), vocab=kind, data_dir=str(tmp_path / "data"))
    )
    assert files.fingerprint[:12] == fingerprint
    assert files.documents["train"].tolist() == documents


def test_memory_does_not_grow_with_a_file(tmp_path):
    names = ("asyncio/coroutines.py", "asyncio/queues.py", "typing.py")
    root = write(tmp_path / "text", {name: b"a few words, and\n" for name in names})
    (root / names[0]).write_bytes(b"a few words, and\n" * 2_000_000)  # 34 MB
    for dataset in ("text", "code"):
        cfg = DataConfig(dataset, str(root), data_dir=str(tmp_path / "data"))
        tracemalloc.start()
        token_files.prepare(cfg)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 17_000_000


def test_text_that_moves_from_one_split_to_the_next_is_another_corpus(tmp_path):
    first = token_files.prepare(wikitext(tmp_path, train=" a <unk> \n c \n", valid=" a \n"))
    other = token_files.prepare(wikitext(tmp_path, train=" a <unk> \n", valid=" c \n a \n"))
    assert first.fingerprint != other.fingerprint


def test_several_processes_make_the_same_files_as_one(tmp_path, monkeypatch):
    lines = [f" w{i * i % 977} x{i % 389} y{i} <unk> \n" for i in range(20_000)]
    cfg = wikitext(tmp_path, train="".join(lines), valid=" y7 nowhere \n")
    one = token_files.prepare(cfg)
    contents = {path.name: path.read_bytes() for path in one.folder.glob("*.npy")}
    shutil.rmtree(one.folder)
    started = []

    def popen(*args, **kwargs):
        started.append(real(*args, **kwargs))
        return started[-1]

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(token_files, "_FOR_EACH_PROCESS", 1000)
    monkeypatch.setattr(pieces, "SIZE", 1000)
    several = token_files.prepare(cfg)
    assert len(started) == 3 * 4  # for the vocabulary, and for each split
    assert all(process.poll() is not None for process in started)
    assert several.folder == one.folder and several.vocab == one.vocab
    assert {path.name: path.read_bytes() for path in several.folder.glob("*.npy")} == contents
    assert several.counts == one.counts
    assert several.counts["valid"] == Counts(documents=1, tokens=3, unknown=1)


def test_a_process_that_is_killed_is_reported_in_one_line(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        process = real(*args, **kwargs)
        process.kill()
        return process

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", killed)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(token_files, "_FOR_EACH_PROCESS", 10)
    with pytest.raises(UserError, match="process that turned text into tokens was killed"):
        token_files.prepare(wikitext(tmp_path))
    assert folders(DataConfig(data_dir=str(tmp_path))) == [tmp_path / "wikitext-103"]


def test_lines_that_stand_between_two_signs(tmp_path):
    root = tmp_path / "one-billion-words"
    root.mkdir()
    (root / "1b_word_vocab.txt").write_text("<S>\n<UNK>\nthe\nday\n")
    for split in SPLITS:
        (root / f"{split}.txt").write_text("the day\nDay the\n")
    files = token_files.prepare(DataConfig(dataset="lm1b", vocab="words", data_dir=str(tmp_path)))
    # As Vocab.tokenize of the original: ['<S>'] + words + ['<S>'], one sign for two that meet.
    assert files.splits["train"].tolist() == [0, 2, 3, 0, 1, 2, 0]
    assert files.documents["train"].tolist() == [0, 7]
    assert files.counts["train"].unknown == 1


def test_capitals_are_small_letters_where_the_corpus_says_so(tmp_path, monkeypatch):
    cfg = wikitext(tmp_path, train=" The the N <unk> \n")
    kept = token_files.prepare(cfg)
    monkeypatch.setattr(Named, "lower_case", True)
    small = token_files.prepare(cfg)
    assert isinstance(kept.vocab, WordsVocab) and isinstance(small.vocab, WordsVocab)
    assert kept.vocab.words == ("<eos>", "The", "the", "N", "<unk>")
    assert small.vocab.words == ("<eos>", "the", "n", "<unk>")
    assert small.splits["train"].tolist() == [1, 1, 2, 3, 0]
    assert small.fingerprint != kept.fingerprint
    assert vocab.load(small.folder / "vocab.json") == small.vocab


# --- Bad input


@pytest.mark.parametrize("split", SPLITS)
def test_empty_lines_only(tmp_path, split):
    cfg = wikitext(tmp_path, **{split: "\n \n\t\r\n"})
    with pytest.raises(UserError, match=f"nothing but empty lines for the split '{split}': add"):
        token_files.prepare(cfg)
    assert folders(cfg) == [tmp_path / "wikitext-103"]


def test_a_missing_split(tmp_path):
    cfg = wikitext(tmp_path)
    (tmp_path / "wikitext-103" / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"lacks valid\.txt or wiki\.valid\.tokens of wikitext-103"):
        token_files.prepare(cfg)


def test_a_vocabulary_of_another_corpus(tmp_path):
    cfg = wikitext(tmp_path)
    path = tmp_path / "vocab.json"
    vocab.build("words", [b"x y <unk>\n"]).save(path)
    given = dataclasses.replace(cfg, vocab_file=str(path))
    with pytest.raises(UserError, match=r"vocab\.json is the vocabulary of another corpus: of the"):
        token_files.prepare(given)
    vocab.build("words", [b"a b c\n"]).save(path)
    with pytest.raises(UserError, match=r"'<unk>' is not among the vocabulary's 4 words"):
        token_files.prepare(given)
    with pytest.raises(UserError, match=r"is a vocabulary of words: add --vocab words"):
        token_files.prepare(dataclasses.replace(given, vocab="bytes"))
    with pytest.raises(UserError, match="--vocab-size is for an encoding that is made here"):
        token_files.prepare(dataclasses.replace(cfg, vocab_size=300))
    with pytest.raises(UserError, match="--vocab-size is 0, and byte-pair encoding needs 256"):
        token_files.prepare(dataclasses.replace(cfg, vocab="bpe"))
    assert folders(cfg) == [path, tmp_path / "wikitext-103"]


def test_a_list_of_words(cfg, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("<unk>\nGröße\nDatei\n")
    cfg = dataclasses.replace(cfg, vocab="words", vocab_file=str(path))
    files = token_files.prepare(cfg)
    counts = files.counts["train"]
    assert isinstance(files.vocab, WordsVocab)
    assert files.vocab.words == ("<eos>", "<unk>", "Größe", "Datei")
    assert files.splits["train"][:4].tolist() == [3, 1, 2, 0] and counts.unknown > 0
    assert counts.unknown == counts.tokens // 4
    assert token_files.prepare(cfg).folder == files.folder
    path.write_text("<unk>\nx\ny\n")
    with pytest.raises(UserError, match=r"words\.txt is the vocabulary of another corpus: of the"):
        token_files.prepare(cfg)


def test_a_list_of_words_for_a_corpus_of_small_letters(tmp_path):
    write(tmp_path / "penn", {f"{split}.txt": b" The N <unk> \n" for split in SPLITS})
    (tmp_path / "words.txt").write_text("n\n<unk>\nThe\nthe\n")
    cfg = DataConfig("ptb", vocab="words", data_dir=str(tmp_path))
    files = token_files.prepare(dataclasses.replace(cfg, vocab_file=str(tmp_path / "words.txt")))
    assert files.splits["train"].tolist() == [4, 1, 2, 0]


def test_bpe_is_prepared_as_others_are(cfg):
    cfg = dataclasses.replace(cfg, vocab="bpe", vocab_size=300)
    files = token_files.prepare(cfg)
    assert len(files.vocab) == 300 and files.splits["train"].dtype == np.uint16
    assert_whole(files, cfg)
    lengths = files.documents["train"]
    for start, end in itertools.pairwise(lengths):
        assert files.vocab.decode(files.splits["train"][start:end]).endswith(b"\n\f")
    given = dataclasses.replace(cfg, vocab_size=0, vocab_file=str(files.folder / "vocab.json"))
    again = token_files.prepare(given)
    np.testing.assert_array_equal(again.splits["train"], files.splits["train"])


# --- Changes


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
    def build(*args: Any) -> vocab.Vocab:
        built = vocab.BytesVocab.build(args[1])
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
    assert folders(cfg) == []


def test_a_data_folder_that_cannot_be_written(cfg):
    Path(cfg.data_dir).parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write token files to .*; make room .*--data-dir"):
        token_files.prepare(cfg)


@pytest.mark.parametrize("change", ["none", "touched", "other text", "nothing there"])
def test_a_data_folder_that_can_only_be_read(cfg, change):
    made = token_files.prepare(cfg).folder
    path = Path(cfg.text_dir, "3.txt")
    match change:
        case "touched":
            os.utime(path)
        case "other text":
            path.write_text("another text\n")
        case "nothing there":
            shutil.rmtree(made)
    before = sorted(Path(cfg.data_dir).rglob("*"))
    process = child("", cfg, before=read_only(Path(cfg.data_dir)))
    output, errors = process.communicate()
    if change in ("none", "touched"):
        assert (process.returncode, output, errors) == (0, f"{made}\n", "")
    else:
        says = (
            f"error: cannot write token files to {cfg.data_dir}: Read-only file system; make room"
        )
        assert process.returncode == 2 and errors.startswith(says) and errors.count("\n") == 1
    assert sorted(Path(cfg.data_dir).rglob("*")) == before


def test_processes_that_cannot_be_started_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(token_files, "_FOR_EACH_PROCESS", 10)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    with pytest.raises(
        UserError, match=r"^cannot start a process that turns .*No such file or dir"
    ):
        token_files.prepare(wikitext(tmp_path))
    assert folders(DataConfig(data_dir=str(tmp_path))) == [tmp_path / "wikitext-103"]


def test_a_file_where_the_prepared_folder_should_be(cfg):
    folder = token_files.prepare(cfg).folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write token files to .*: Not a directory"):
        token_files.prepare(cfg)
    assert folders(cfg) == [folder]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    program = (
        "import re, sys; from txl_jax import known_sizes, token_files\n"
        "from txl_jax.config import DataConfig\n"
        "known_sizes.check = lambda *found: None\n"
        "token_files.prepare(DataConfig('wikitext-103', vocab='words', data_dir=sys.argv[1]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    part = "".join(f" w{i * i % 9973} x{i % 389} <unk> \n" for i in range(60_000))
    peaks = []
    for n in (40, 160):
        cfg = wikitext(tmp_path / str(n), train=part * n)
        output = subprocess.check_output(
            [sys.executable, "-W", "ignore", "-c", program, cfg.data_dir],
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
        peaks.append(int(output) / 1024)
    assert peaks[1] < peaks[0] + 60  # while the text grew by 110 MB


# --- prepare in processes of its own

CHILD = """
import errno, fcntl, os, resource, signal, sys
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

how = sys.argv[1].removeprefix("unlocked-")
if how != sys.argv[1]:
    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks available")
    fcntl.flock = flock
match how:
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


def read_only(folder: Path) -> tuple[str, ...]:
    """Words before a command that can read a folder, but not write it."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    words = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(folder))
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let its users mount a folder of their own")
    return words


def child(how: str, cfg: DataConfig, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-W", "error", "-c", CHILD, how, cfg.text_dir, cfg.data_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )


def wait_for_pause(process: subprocess.Popen[str]) -> None:
    assert process.stdout and process.stdout.readline() == "paused\n"


def test_of_two_processes_at_once_one_prepares(cfg):
    first = child("pause-before-rename", cfg)
    wait_for_pause(first)
    second = child("", cfg)
    assert second.stderr
    assert second.stderr.readline().startswith("waiting for another process that prepares ")
    assert len(folders(cfg)) == 1  # what the first makes, as yet without its name
    outputs = [first.communicate("go\n"), second.communicate()]
    assert [first.returncode, second.returncode] == [0, 0]
    files = token_files.prepare(cfg)
    assert outputs == [(f"{files.folder}\n", "")] * 2
    assert folders(cfg) == [files.folder]


def test_who_waits_goes_on_when_the_first_is_killed(cfg):
    first = child("pause-before-rename", cfg)
    wait_for_pause(first)
    second = child("", cfg)
    assert second.stderr and second.stderr.readline().startswith("waiting for ")
    first.kill()
    first.communicate()
    output, _ = second.communicate()
    assert second.returncode == 0
    assert output == f"{token_files.prepare(cfg).folder}\n"


def test_two_processes_prepare_at_the_same_time_where_there_are_no_locks(cfg):
    processes = [child("unlocked-pause-before-rename", cfg) for _ in range(2)]
    for process in processes:
        wait_for_pause(process)
    assert len(folders(cfg)) == 2  # both have built, neither has given its folder the name
    outputs = [process.communicate("go\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    files = token_files.prepare(cfg)
    assert outputs == [(f"{files.folder}\n", "")] * 2
    assert folders(cfg) == [files.folder]
    assert_whole(files, cfg)


def test_the_second_process_keeps_the_files_of_the_first(cfg):
    process = child("unlocked-pause-before-rename", cfg)
    wait_for_pause(process)
    files = token_files.prepare(cfg)
    before = (files.folder / "train.npy").stat().st_ino
    process.communicate("go\n")
    assert process.returncode == 0
    assert (files.folder / "train.npy").stat().st_ino == before
    assert folders(cfg) == [files.folder]


def test_what_a_killed_preparation_left_goes_when_it_is_old(cfg):
    process = child("pause-while-writing", cfg)
    wait_for_pause(process)
    process.kill()
    process.communicate()
    (left,) = Path(cfg.data_dir).glob(".*.new.*")
    for path in (*left.iterdir(), left):
        os.utime(path, (1, 1))
    (Path(cfg.data_dir) / ".other.new.1").mkdir()
    files = token_files.prepare(cfg)
    assert not left.exists()
    assert {path.name for path in Path(cfg.data_dir).glob("*.new.*")} == {".other.new.1"}
    assert_whole(files, cfg)


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
