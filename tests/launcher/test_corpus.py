"""The files of a corpus that hosts need, as an archive."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import corpus
from tests.texts import documents
from txl_jax import corpora
from txl_jax.bpe_vocab import BpeVocab
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError
from txl_jax.layouts import LAYOUTS

NAMES = ["it's.txt", "a b/c.txt", "d.txt"]


def text(folder: Path, **changes: Any) -> DataConfig:
    """A corpus of text; each split has files of it."""
    for name in [*NAMES, *(f"{number}.txt" for number in range(200))]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n")
    return replace(DataConfig(dataset="text", text_dir=str(folder)), **changes)


def packed(found: corpus.Corpus, folder: Path) -> dict[str, bytes]:
    """What a host finds."""
    path = folder / "corpus.tar.gz"
    found.pack(path)
    with tarfile.open(path) as tar:
        tar.extractall(folder / "host", filter="data")
    files = (path for path in (folder / "host").rglob("*") if path.is_file())
    return {path.relative_to(folder / "host").as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("dataset", ["stdlib", "synthetic"])
def test_what_hosts_make_by_themselves_is_not_brought(dataset):
    assert corpus.find(DataConfig(dataset=dataset)) is None


def test_a_host_finds_the_same_corpus(tmp_path, monkeypatch):
    cfg = text(tmp_path / "text")
    found = corpus.find(cfg)
    assert found
    assert len(packed(found, tmp_path)) == 203
    here = corpora.open_corpus(cfg)
    # As unpack.sh and the trainer have it.
    unpacked = tmp_path / "corpora" / found.hash
    unpacked.parent.mkdir()
    (tmp_path / "host").rename(unpacked)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    words = dict(zip(found.words[::2], found.words[1::2], strict=True))
    there = corpora.open_corpus(
        replace(cfg, text_dir=words["--text-dir"], data_dir=words["--data-dir"])
    )
    for split in SPLITS:
        assert documents(there, split) == documents(here, split)


def test_the_hash_is_that_of_names_and_contents(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"

    def hash(folder: Path) -> str:
        found = corpus.find(DataConfig(dataset="text", text_dir=str(folder)))
        assert found
        return found.hash

    text(first)
    text(second)
    same = hash(first)
    assert hash(second) == same
    (second / "d.txt").write_text("other\n")
    other = hash(second)
    (second / "d.txt").write_text("text of d.txt\n")
    (second / "d.txt").rename(second / "e.txt")
    assert len({same, other, hash(second)}) == 3


def test_the_archive_is_always_the_same(tmp_path):
    found = corpus.find(text(tmp_path / "text"))
    assert found
    archives = []
    for number in range(2):
        path = tmp_path / f"{number}.tar.gz"
        found.pack(path)
        archives.append(path.read_bytes())
        (tmp_path / "text" / "d.txt").touch()
    assert archives[0] == archives[1]


def test_a_data_set_of_the_original_lies_where_the_trainer_looks(tmp_path):
    folder = tmp_path / "data" / "wikitext-103"
    folder.mkdir(parents=True)
    for split in SPLITS:
        (folder / f"{split}.txt").write_text(f"{split} text\n")
    (folder / "other").write_text("")
    cfg = DataConfig(dataset="wikitext-103", vocab="words", data_dir=str(tmp_path / "data"))
    found = corpus.find(cfg)
    assert found
    assert found.words == ("--data-dir", f"../corpora/{found.hash}")
    files = packed(found, tmp_path)
    assert files.keys() == {f"wikitext-103/{split}.txt" for split in SPLITS}


def test_the_billion_words_come_with_their_list(tmp_path):
    folder = tmp_path / "data" / "one-billion-words"
    shards = folder / LAYOUTS["lm1b"].files["train"][0].rpartition("/")[0]
    shards.mkdir(parents=True)
    for path in (shards / "news.en-1", folder / "valid.txt", folder / "test.txt"):
        path.write_text("text\n")
    (folder / "1b_word_vocab.txt").write_text("text\n")
    found = corpus.find(DataConfig(dataset="lm1b", vocab="words", data_dir=str(tmp_path / "data")))
    assert found
    unpacked = packed(found, tmp_path)
    assert "one-billion-words/1b_word_vocab.txt" in unpacked
    cfg = DataConfig(dataset="lm1b", vocab="words", data_dir=str(tmp_path / "host"))
    assert corpora.open_corpus(cfg).n_bytes == 15


@pytest.mark.parametrize("dataset", ["stdlib", "text"])
def test_a_vocabulary_comes_too(tmp_path, dataset):
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text("{}")
    cfg = DataConfig(vocab_file=str(vocabulary))
    if dataset == "text":
        cfg = text(tmp_path / "text", vocab_file=str(vocabulary))
    found = corpus.find(cfg)
    assert found
    assert found.words[-2:] == ("--vocab-file", f"../corpora/{found.hash}/vocab.json")
    assert packed(found, tmp_path)["vocab.json"] == b"{}"


def test_an_encoding_comes_in_its_folder(tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    texts = [b"once upon a time\n" * 9]
    encoding = BpeVocab.build(texts, 260)
    ids = {token: number for number, token in enumerate(encoding.tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, encoding.merges)))
    (folder / "README").write_text("not needed")
    cfg = text(tmp_path / "text", vocab="bpe", vocab_file=str(folder))
    found = corpus.find(cfg)
    assert found
    assert found.words[-2:] == ("--vocab-file", f"../corpora/{found.hash}/encoding")
    there = {name for name in packed(found, tmp_path) if not name.startswith("text/")}
    assert there == {"encoding/vocab.json", "encoding/merges.txt"}
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="holds no byte-level BPE"):
        corpus.find(cfg)


@pytest.mark.parametrize("dataset", ["code", "wiki"])
def test_code_and_articles_come_as_files(tmp_path, monkeypatch, dataset):
    article = '<doc id="1" url="" title="A">\nA\n\nOnce upon a time.\n</doc>\n'
    for number in range(200):
        (tmp_path / f"wiki_{number:03}").write_text(article if dataset == "wiki" else "x = 1\n")
    cfg = DataConfig(dataset=dataset, text_dir=str(tmp_path), data_dir="/nowhere")
    found = corpus.find(cfg)
    assert found
    assert found.data.text_dir == f"../corpora/{found.hash}/text"
    assert len(found.files) == 200
    assert found.files["text/wiki_007"] == tmp_path / "wiki_007"


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"wikitext-103 is not in .*: .*data prepare --dataset"):
        corpus.find(DataConfig(dataset="wikitext-103", data_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot read .*vocab\.json: No such file"):
        corpus.find(DataConfig(vocab_file=str(tmp_path / "vocab.json")))
    cfg = text(tmp_path / "text")
    found = corpus.find(cfg)
    assert found
    (tmp_path / "text" / "d.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*d\.txt"):
        found.pack(tmp_path / "corpus.tar.gz")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "has no text for the split 'valid'"), (b"\xff\n", "UTF-8")],
)
def test_what_a_trainer_would_refuse_is_refused_before_hosts_are_paid(tmp_path, content, complaint):
    cfg = text(tmp_path / "text")
    if content is None:
        for number in range(200):
            (tmp_path / "text" / f"{number}.txt").unlink()
    else:
        (tmp_path / "text" / "d.txt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        corpus.find(cfg)
