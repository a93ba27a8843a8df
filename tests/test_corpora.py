import dataclasses
import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.texts import documents
from txl_jax import corpora, layouts, text_files, token_files
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS, Corpus
from txl_jax.errors import UserError
from txl_jax.folders import Folder
from txl_jax.layouts import LAYOUTS

pytestmark = pytest.mark.usefixtures("any_size")


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def folder(**settings) -> Folder:
    corpus = corpora.open_corpus(DataConfig(**settings))
    assert isinstance(corpus, Folder)
    return corpus


def text_corpus(root: Path) -> Folder:
    return folder(dataset="text", text_dir=str(root))


def all_files(corpus: Folder) -> list[str]:
    return sorted(name for split in SPLITS for name in corpus.files[split])


# The split of a name is part of the format: these are in every user's prepared data.
TRAIN, VALID, TEST = "asyncio/coroutines.py", "asyncio/queues.py", "typing.py"


def test_documents_are_the_bytes_of_the_files_each_ended_by_a_form_feed(tmp_path):
    files = {TRAIN: b"a\r\nb", VALID: "é\n\n".encode(), TEST: b"\xef\xbb\xbfc\n"}
    corpus = text_corpus(write(tmp_path, files))
    assert [documents(corpus, split) for split in SPLITS] == [
        [b"a\r\nb\n\f"],
        ["é\n\n".encode() + b"\f"],
        [b"\xef\xbb\xbfc\n\f"],
    ]
    assert corpus.n_bytes == sum(map(len, files.values()))


def test_binary_and_empty_files_are_no_documents(tmp_path):
    binary = bytes(range(256)) * 100
    write(tmp_path, {f"{i}.bin": b"text, then\n" * 5000 + b"\0" for i in range(100)})
    write(tmp_path, {f"{i}.empty": b"" for i in range(100)})
    write(tmp_path, {TRAIN: b"a\n", VALID: b"b\n", TEST: b"c\n", "binary": binary})
    corpus = text_corpus(tmp_path)
    assert [documents(corpus, split) for split in SPLITS] == [
        [b"a\n\f"],
        [b"b\n\f"],
        [b"c\n\f"],
    ]


def test_hidden_files_links_and_pipes_are_left_out(tmp_path):
    root = write(
        tmp_path / "root", {"a": b"a", "b/c": b"c", ".d": b"d", ".e/f": b"f", "b/.g": b"g"}
    )
    outside = write(tmp_path / "outside", {"h": b"h"})
    (root / "link").symlink_to(outside / "h")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe")
    assert all_files(text_corpus(root)) == ["a", "b/c"]


name_sets = st.sets(st.from_regex(r"[a-z]{1,3}/[a-zé ]{1,8}\.txt", fullmatch=True), max_size=30)


@settings(max_examples=50, deadline=None)
@given(name_sets.filter(bool), name_sets)
def test_a_split_is_stable_when_other_files_are_added(tmp_path_factory, names, others):
    few = text_corpus(write(tmp_path_factory.mktemp("few"), dict.fromkeys(names, b"x")))
    many = text_corpus(write(tmp_path_factory.mktemp("many"), dict.fromkeys(names | others, b"y")))
    assert all_files(few) == sorted(names)
    assert all_files(many) == sorted(names | others)
    for split in SPLITS:
        assert few.files[split] == tuple(name for name in many.files[split] if name in names)


def test_about_two_percent_of_files_go_to_valid_and_to_test_each_mixed_over_folders(tmp_path):
    files = {f"{folder}/{i}": b"x" for folder in "abcd" for i in range(500)}
    corpus = text_corpus(write(tmp_path, files))
    assert 20 <= len(corpus.files["valid"]) <= 60
    assert 20 <= len(corpus.files["test"]) <= 60
    first = [name.split("/")[0] for name in corpus.files["train"][:100]]
    assert all(first.count(folder) > 10 for folder in "abcd")


def test_stdlib_is_this_pythons_source_without_tests_and_generated_files():
    corpus = folder()
    assert corpus.root == Path(sysconfig.get_path("stdlib"))
    names = set(all_files(corpus))
    assert {TRAIN, VALID, TEST, "asyncio/base_events.py", "argparse.py", "json/decoder.py"} <= names
    assert VALID in corpus.files["valid"] and TEST in corpus.files["test"]
    generated = {"keyword.py", "token.py", "stringprep.py", "re/_casefix.py", "html/entities.py"}
    assert not generated & names
    assert not [name for name in names if name.startswith("_sysconfigdata") or name[-3:] != ".py"]
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {
        *("test", "tests", "site-packages", "encodings", "distutils", "idlelib", "tkinter"),
        *("lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"),
    }
    sizes = {split: sum(map(len, documents(corpus, split))) for split in SPLITS}
    assert 6_500_000 < sizes["train"] < 8_500_000
    assert 150_000 < sizes["valid"] < 250_000
    assert 150_000 < sizes["test"] < 250_000


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no text files: name a folder"),
        ({".hidden": b"text"}, "has no text files: name a folder"),
        ({"empty": b""}, "has no text files: name a folder"),
        ({TRAIN: b"\0", VALID: b"text", TEST: b"text"}, "no text for the split 'train'"),
        ({TRAIN: b"text", TEST: b"text"}, "no text for the split 'valid'"),
        ({TRAIN: b"text", VALID: b"text"}, "no text for the split 'test'"),
        (
            {TRAIN: "naïve".encode("latin-1"), VALID: b"text", TEST: b"text"},
            "coroutines.py is not UTF-8 at byte offset 2: convert it",
        ),
    ],
)
def test_text_that_cannot_be_used(tmp_path, files, says):
    write(tmp_path, files)
    with pytest.raises(UserError) as caught:
        corpus = text_corpus(tmp_path)
        for split in SPLITS:
            documents(corpus, split)
    message = str(caught.value)
    assert says in message and str(tmp_path) in message and "\n" not in message


def test_settings_that_name_no_folder(tmp_path):
    write(tmp_path, {"file": b"text"})

    def fails(says: str, **settings) -> None:
        with pytest.raises(UserError, match=says):
            corpora.open_corpus(DataConfig(**settings))

    fails("needs --text-dir", dataset="text")
    fails("missing is not a folder", dataset="text", text_dir=str(tmp_path / "missing"))
    fails("file is not a folder", dataset="text", text_dir=str(tmp_path / "file"))
    fails("only with --dataset text, code or wiki", dataset="stdlib", text_dir=str(tmp_path))
    fails(r"nothing matches --text-dir .*\*: name", dataset="text", text_dir=f"{tmp_path}/f*.c*")
    inside = str(tmp_path / "deep" / "data")
    fails("lies inside --text-dir", dataset="text", text_dir=str(tmp_path), data_dir=inside)
    pattern = f"{tmp_path}/d*"
    (tmp_path / "deep").mkdir()
    fails("lies inside --text-dir", dataset="text", text_dir=pattern, data_dir=inside)


def test_a_pattern_chooses_files_and_folders(tmp_path):
    names = ["one/a.txt", "one/sub/b.txt", "two/c.txt", "two/d.log", "e.txt", "one/.f.txt"]
    write(tmp_path / "root", dict.fromkeys(names, b"x"))
    (tmp_path / "root" / "three").symlink_to(tmp_path / "root" / "one")

    def found(pattern: str) -> list[str]:
        corpus = text_corpus(tmp_path / "root" / pattern)
        assert corpus.n_bytes == len(all_files(corpus)) and corpus.root == tmp_path / "root"
        return all_files(corpus)

    assert found("*/*.txt") == ["one/a.txt", "two/c.txt"]
    assert found("**/*.txt") == ["e.txt", "one/a.txt", "one/sub/b.txt", "two/c.txt"]
    assert found("t*") == ["two/c.txt", "two/d.log"]
    assert found("[eo]*") == ["e.txt", "one/a.txt", "one/sub/b.txt"]
    everything = text_corpus(tmp_path / "root")
    some = text_corpus(tmp_path / "root" / "**" / "*.txt")
    for split in SPLITS:
        assert set(some.files[split]) <= set(everything.files[split])


def test_a_folder_may_have_the_name_of_a_pattern(tmp_path):
    write(tmp_path, {"[a]/b.txt": b"x", "a/c.txt": b"y"})
    assert all_files(text_corpus(tmp_path / "[a]")) == ["b.txt"]


def test_a_file_that_is_gone_is_named(tmp_path):
    corpus = text_corpus(write(tmp_path, {TRAIN: b"text"}))
    (tmp_path / TRAIN).unlink()
    with pytest.raises(UserError, match=r"cannot read .*coroutines\.py: No such file"):
        documents(corpus, "train")


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_a_file_need_not_fit_into_a_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    files = {TRAIN: "Größe\r\n日本 🎈\n".encode(), VALID: "é".encode() * 7, TEST: b"\n"}
    late = {"late.bin": b"text, then\n\0", "both.bin": b"\xff then \0", "empty": b""}
    corpus = text_corpus(write(tmp_path, files | late))
    assert [documents(corpus, split) for split in SPLITS] == [
        [files[TRAIN] + b"\f"],
        [files[VALID] + b"\n\f"],
        [b"\n\f"],
    ]
    for content, offset in (("a日".encode()[:-1], 1), ("日".encode() + b"\xff.", 3), (b".\x80", 1)):
        write(tmp_path, {TRAIN: content})
        with pytest.raises(UserError, match=rf"\.py is not UTF-8 at byte offset {offset}:"):
            documents(corpus, "train")


def test_an_error_that_names_no_file_is_still_about_one(tmp_path):
    corpus = text_corpus(write(tmp_path, {TRAIN: b"text"}))
    memory = Path("/proc/self/mem")  # the one file that opens, and then cannot be read
    corpus = dataclasses.replace(corpus, root=memory.parent, files={"train": (memory.name,)})
    with pytest.raises(UserError, match=r"^cannot read /proc/self/mem: Input/output error$"):
        documents(corpus, "train")


@pytest.mark.parametrize(("folder", "says"), [("", "has no source"), ("lib.zip", "cannot read")])
def test_a_python_without_source_is_told_what_to_do(tmp_path, monkeypatch, folder, says):
    write(tmp_path, {"os.pyc": b"\0"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / folder))
    with pytest.raises(UserError, match=says):
        corpora.open_corpus(DataConfig())


WIKITEXT = {"train": " = A =\n\n b b\n", "valid": " b <unk>\n", "test": " é\n"}


def named(dataset: str, folder: Path, vocab: str = "words") -> Corpus:
    settings: dict[str, Any] = {"dataset": dataset, "vocab": vocab, "data_dir": str(folder)}
    return corpora.open_corpus(DataConfig(**settings))


def text_of(corpus: Corpus, split: str) -> bytes:
    return b"".join(documents(corpus, split))


@pytest.mark.parametrize(
    ("dataset", "pattern"),
    [
        ("wikitext-103", "wikitext-103/{}.txt"),
        ("wikitext-103", "wikitext-103/wiki.{}.tokens"),
        ("wikitext-2", "wikitext-2/{}.txt"),
        ("wikitext-2", "wikitext-2/wiki.{}.tokens"),
        ("ptb", "penn/{}.txt"),
        ("ptb", "penn/ptb.{}.txt"),
        ("tiny_shakespeare", "tiny_shakespeare/{}.txt"),
    ],
)
def test_lines_are_read_as_they_are_from_either_name(tmp_path, dataset, pattern):
    files = {pattern.format(split): text.encode() for split, text in WIKITEXT.items()}
    corpus = named(dataset, write(tmp_path, files))
    assert {split: text_of(corpus, split).decode() for split in SPLITS} == WIKITEXT
    assert corpus.n_bytes == sum(map(len, files.values()))


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_long_files_come_in_blocks_of_whole_lines(tmp_path, monkeypatch, block):
    monkeypatch.setattr(layouts, "_BLOCK", block)
    files = {"train.txt": "one é\n\ntwo\nthree".encode(), "valid.txt": b"", "test.txt": b"a\n"}
    corpus = named(
        "wikitext-103", write(tmp_path, {f"wikitext-103/{n}": t for n, t in files.items()})
    )
    (document,) = corpus.documents("train")
    blocks = list(document)
    assert all(block.endswith(b"\n") for block in blocks)
    assert b"".join(blocks) == files["train.txt"] + b"\n"
    assert text_of(corpus, "valid") == b""
    write(tmp_path, {"wikitext-103/train.txt": b"one\ntwo \xe9\n"})
    with pytest.raises(UserError, match=r"train\.txt is not UTF-8 at byte offset 8: convert it"):
        documents(corpus, "train")


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_enwik8_is_the_bytes_that_the_original_reads_as_numbers(tmp_path, monkeypatch, block):
    monkeypatch.setattr(layouts, "_BLOCK", block)
    texts = {"train": "<a>\n é b\n\n".encode(), "valid": b"\nc", "test": b"d \n"}
    files = {}
    for split, text in texts.items():  # as prep_enwik8.py writes them
        numbers = (str(byte) if byte != ord("\n") else "\n" for byte in text)
        files[f"enwik8/{split}.txt"] = " ".join(numbers).encode()
        files[f"enwik8/{split}.txt.raw"] = text
    write(tmp_path, files)
    for _ in ("bytes", "numbers"):
        corpus = named("enwik8", tmp_path, "bytes")
        for split in SPLITS:
            numbers = [int(symbol) for symbol in files[f"enwik8/{split}.txt"].split()]
            assert list(text_of(corpus, split)) == numbers
            (tmp_path / f"enwik8/{split}.txt.raw").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("content", "says"), [("é".encode(), r"has b'\xc3\xa9' where"), (b"97 256", "has b'256' where")]
)
def test_text_where_enwik8_has_numbers(tmp_path, content, says):
    write(tmp_path, {f"enwik8/{split}.txt": content for split in SPLITS})
    with pytest.raises(UserError) as caught:
        text_of(named("enwik8", tmp_path, "bytes"), "train")
    message = str(caught.value)
    assert f"train.txt {says} numbers from 0 to 255 stand" in message and "\n" not in message


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_text8_is_the_characters_that_the_original_reads(tmp_path, monkeypatch, block):
    monkeypatch.setattr(layouts, "_BLOCK", block)
    texts = {"train": b" a bc d ", "valid": b"ef", "test": b"g h"}
    files = {  # as prep_text8.py writes them
        f"text8/{split}.txt": " ".join(text.decode().strip().replace(" ", "_")).encode()
        for split, text in texts.items()
    }
    corpus = named("text8", write(tmp_path, files), "bytes")
    assert {split: text_of(corpus, split) for split in SPLITS} == {
        split: text.strip() for split, text in texts.items()
    }


@pytest.mark.parametrize("pattern", ["pennchar/{}.txt", "pennchar/ptb.char.{}.txt"])
@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_characters_of_penn_treebank_are_lines_of_sentences(tmp_path, monkeypatch, block, pattern):
    monkeypatch.setattr(layouts, "_BLOCK", block)
    texts = {"train": b"the < u n k > _ 's \n a\n", "valid": b"b _ c \n", "test": b"d \n"}
    files = {pattern.format(split): text for split, text in texts.items()}
    corpus = named("ptb-char", write(tmp_path, files), "bytes")
    expected = {"train": b"the<unk> 's\na\n", "valid": b"b c\n", "test": b"d\n"}
    assert {split: text_of(corpus, split) for split in SPLITS} == expected


def test_lm1b_is_read_shard_by_shard_with_its_list_of_words(tmp_path):
    shards = f"{LAYOUTS['lm1b'].files['train'][0].removesuffix('*')}0000"
    files = {f"{shards}2": b"c\n", f"{shards}1": b"a b\n", "valid.txt": b"d\n", "test.txt": b"d\n"}
    files["1b_word_vocab.txt"] = b"<S>\n<UNK>\nb\na\n"
    root = write(tmp_path / "one-billion-words", files)
    corpus = named("lm1b", tmp_path)
    assert text_of(corpus, "train") == b"a b\nc\n"
    assert corpus.word_list == root / "1b_word_vocab.txt"
    assert named("lm1b", tmp_path, "bytes").word_list is None

    cfg = DataConfig(dataset="lm1b", vocab="words", data_dir=str(tmp_path))
    tokens = token_files.prepare(cfg)
    assert tokens.splits["train"].tolist() == [0, 3, 2, 0, 1, 0]
    assert tokens.splits["test"].tolist() == [0, 1, 0]
    write(root, {"1b_word_vocab.txt": b"<S>\n<UNK>\na\nb\n"})
    other = token_files.prepare(cfg)
    assert other.fingerprint != tokens.fingerprint
    assert other.splits["train"].tolist() == [0, 2, 3, 0, 1, 0]


def test_the_words_of_wikitext_are_those_of_its_training_text(tmp_path):
    texts = {"train": b"a b b <unk>\n", "valid": b"a a a c\n", "test": b"b\n"}
    write(tmp_path / "wikitext-103", {f"{split}.txt": text for split, text in texts.items()})
    cfg = DataConfig(dataset="wikitext-103", vocab="words", data_dir=str(tmp_path))
    tokens = token_files.prepare(cfg)
    assert tokens.vocab.decode(range(len(tokens.vocab))) == b"\n b a <unk>"
    assert tokens.splits["train"].tolist() == [2, 1, 1, 3, 0]
    assert tokens.splits["valid"].tolist() == [2, 2, 2, 3, 0]
    write(tmp_path / "wikitext-103", {"test.txt": b"b b\n"})
    assert token_files.prepare(cfg).fingerprint != tokens.fingerprint


@pytest.mark.parametrize(
    ("dataset", "vocab", "files", "says"),
    [
        (
            *("wikitext-103", "words", {"wikitext-103/train.txt": b"a"}),
            "wikitext-103 lacks valid.txt or wiki.valid.tokens, test.txt or wiki.test.tokens of "
            "wikitext-103: unpack",
        ),
        (
            *("enwik8", "bytes", {"enwik8/train.txt.raw": b"a"}),
            "enwik8 lacks valid.txt.raw or valid.txt, test.txt.raw or test.txt of enwik8: getdata",
        ),
        (
            *("ptb", "words", {"enwik8/train.txt.raw": b"a"}),
            "--dataset ptb --data-dir {0} downloads it; or fill the folder {0}/penn: getdata.sh of",
        ),
        ("text8", "words", {}, "text8 has no words to tell apart: train on it with --vocab bytes"),
        (
            *("lm1b", "words"),
            {f"one-billion-words/{split}.txt": b"a\n" for split in SPLITS},
            "one-billion-words lacks 1b_word_vocab.txt of lm1b: getdata.sh",
        ),
    ],
)
def test_a_data_set_that_is_not_there_is_described(tmp_path, dataset, vocab, files, says):
    write(tmp_path, files)
    with pytest.raises(UserError) as caught:
        named(dataset, tmp_path, vocab)
    assert says.format(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_text_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match="only with --dataset text"):
        corpora.open_corpus(DataConfig(dataset="text8", text_dir=str(tmp_path)))
