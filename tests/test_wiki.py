import json
from pathlib import Path

import pytest

from tests.archives import write
from tests.texts import documents
from txl_jax import corpora
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError
from txl_jax.wiki import Wiki

# A name of each split: which one it is follows from its hash and is part of the format.
NAMES = {"train": "AA/wiki_00", "valid": "AC/wiki_88", "test": "AA/wiki_44"}


def wiki(root: Path, **settings: str) -> Wiki:
    corpus = corpora.open_corpus(
        DataConfig(dataset="wiki", text_dir=str(root), **settings)  # pyright: ignore[reportArgumentType]
    )
    assert isinstance(corpus, Wiki)
    return corpus


def tagged(*articles: tuple[str, str]) -> bytes:
    head = '<doc id="{}" url="https://en.wikipedia.org/wiki?curid={}" title="{}">\n'
    return "".join(
        f"{head.format(i, i, title)}{title}\n\n{text}\n</doc>\n"
        for i, (title, text) in enumerate(articles)
    ).encode()


def as_json(*articles: tuple[str, str]) -> bytes:
    entries = [
        {"id": str(i), "revid": "1", "url": "u", "title": title, "text": text}
        for i, (title, text) in enumerate(articles)
    ]
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


ARTICLES = [("Anarchism", "Anarchism is a philosophy.\n\nSection.\nIt is old."), ("Ålesund", "Ø.")]
DOCUMENTS = [
    b"Anarchism\n\nAnarchism is a philosophy.\n\nSection.\nIt is old.\n\f",
    "Ålesund\n\nØ.\n\f".encode(),
]


@pytest.mark.parametrize("ending", ["", ".txt"])
@pytest.mark.parametrize("pack", [tagged, as_json])
def test_a_document_is_an_article(tmp_path, pack, ending):
    files = {f"{NAMES['train']}{ending}": pack(*ARTICLES)}
    corpus = wiki(write(tmp_path, files | {"README": b"no article", "AA/.wiki_00.swp": b"x"}))
    split = next(split for split in SPLITS if corpus.files[split])
    assert documents(corpus, split) == DOCUMENTS
    assert corpus.n_bytes == len(pack(*ARTICLES))


def test_a_title_that_the_text_begins_with_is_not_doubled(tmp_path):
    write(tmp_path, {NAMES["train"]: as_json(("Ålesund", "Ålesund\n\nØ."))})
    assert documents(wiki(tmp_path), "train") == DOCUMENTS[1:]


def test_articles_without_text_are_left_out(tmp_path):
    packed = b"\n" + tagged(("Redirect", ""), *ARTICLES) + b"\n\n"
    write(tmp_path, {NAMES["train"]: packed, NAMES["valid"]: as_json(("A", " "), *ARTICLES)})
    write(tmp_path, {NAMES["test"]: b""})
    corpus = wiki(tmp_path)
    assert documents(corpus, "train") == documents(corpus, "valid") == DOCUMENTS
    with pytest.raises(UserError, match="has no text for the split 'test'"):
        documents(corpus, "test")


def test_all_articles_of_a_file_go_to_one_split_by_its_name(tmp_path):
    names = [f"{folder}/wiki_{i:02}" for folder in ("AA", "AB", "AC") for i in range(100)]
    for name in names:
        write(tmp_path, {name: tagged((name, "a"), (name, "b"))})
    corpus = wiki(tmp_path)
    assert {split: NAMES[split] in corpus.files[split] for split in SPLITS} == dict.fromkeys(
        SPLITS, True
    )
    for split in SPLITS:
        titles = [text.split(b"\n")[0].decode() for text in documents(corpus, split)]
        assert titles == [name for name in corpus.files[split] for _ in range(2)]
    text = corpora.open_corpus(DataConfig(dataset="text", text_dir=str(tmp_path)))
    assert corpus.files == text.files  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Anarchism\n\nplain", r"wiki_00 is no output of wikiextractor at byte offset 0: its"),
        (tagged(*ARTICLES) + b"more", r"is no output of wikiextractor at byte offset \d{3}: "),
        (tagged(*ARTICLES)[:-9], r"wiki_00 is cut off within an article: extract the dump again"),
        (as_json(*ARTICLES)[:-20], r"is no output of wikiextractor at byte offset \d{3}: "),
        (b'{"title": "A"}\n', r"is no output of wikiextractor at byte offset 0: "),
        (b'{"title": 1, "text": "a"}\n', r"is no output of wikiextractor at byte offset 0: "),
        (b"<doc >\nA\n\n\xe9\n</doc>\n", r"wiki_00 is not UTF-8 at byte offset 10: convert it"),
        (b'{"title": "A", "text": "\xe9"}\n', r"wiki_00 is not UTF-8 at byte offset 24: convert"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, says):
    write(tmp_path, {NAMES["train"]: content})
    with pytest.raises(UserError, match=says) as caught:
        documents(wiki(tmp_path), "train")
    assert "\n" not in str(caught.value)


def test_a_folder_without_articles(tmp_path):
    write(tmp_path, {"book.txt": b"text"})
    with pytest.raises(UserError, match=r"has no files wiki_00, wiki_01, … with text: name the"):
        wiki(tmp_path)
