import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_jax import corpora
from txl_jax.config import DataConfig
from txl_jax.corpora import SPLITS
from txl_jax.errors import UserError


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def folder(**settings) -> corpora.Folder:
    corpus = corpora.open_corpus(DataConfig(**settings))
    assert isinstance(corpus, corpora.Folder)
    return corpus


def text_corpus(root: Path) -> corpora.Folder:
    return folder(dataset="text", text_dir=str(root))


def all_files(corpus: corpora.Folder) -> list[str]:
    return sorted(name for split in SPLITS for name in corpus.files[split])


# The split of a name is part of the format: these are in every user's prepared data.
TRAIN, VALID, TEST = "asyncio/coroutines.py", "asyncio/queues.py", "typing.py"


def test_documents_are_the_bytes_of_the_files_each_ended_by_a_form_feed(tmp_path):
    files = {TRAIN: b"a\r\nb", VALID: "é\n\n".encode(), TEST: b"\xef\xbb\xbfc\n"}
    corpus = text_corpus(write(tmp_path, files))
    assert [list(corpus.documents(split)) for split in SPLITS] == [
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
    assert [list(corpus.documents(split)) for split in SPLITS] == [
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
    sizes = {split: sum(map(len, corpus.documents(split))) for split in SPLITS}
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
            list(corpus.documents(split))
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
    fails("only with --dataset text", dataset="stdlib", text_dir=str(tmp_path))
    inside = str(tmp_path / "deep" / "data")
    fails("lies inside --text-dir", dataset="text", text_dir=str(tmp_path), data_dir=inside)


def test_a_file_that_is_gone_is_named(tmp_path):
    corpus = text_corpus(write(tmp_path, {TRAIN: b"text"}))
    (tmp_path / TRAIN).unlink()
    with pytest.raises(UserError, match=r"cannot read .*coroutines\.py: No such file"):
        list(corpus.documents("train"))


@pytest.mark.parametrize(("folder", "says"), [("", "has no source"), ("lib.zip", "cannot read")])
def test_a_python_without_source_is_told_what_to_do(tmp_path, monkeypatch, folder, says):
    write(tmp_path, {"os.pyc": b"\0"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / folder))
    with pytest.raises(UserError, match=says):
        corpora.open_corpus(DataConfig())
