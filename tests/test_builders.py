import dataclasses
import hashlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.lm1b import lm1b_dataset_builder as lm1b
from tensorflow_datasets.datasets.tiny_shakespeare import tiny_shakespeare_dataset_builder

from tests import tiny
from tests.archives import PAGE, Archives, serving, tarred, write, zipped
from tests.texts import documents
from txl_jax import builders, corpora, data, layouts, prepared, sources, token_files
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS, Corpus
from txl_jax.errors import UserError
from txl_jax.folders import Folder
from txl_jax.layouts import LAYOUTS, Named
from txl_jax.prepared import Prepared

pytest_plugins = ["tests.tiny_runs"]


@pytest.fixture
def archives(monkeypatch: pytest.MonkeyPatch) -> Iterator[Archives]:
    for table in (sources.SOURCES, sources.WORD_LISTS):
        for name, value in table.items():
            monkeypatch.setitem(table, name, value)  # as it was, after the test
    with serving() as server:
        yield server


def config(dataset: str, folder: Path, vocab: str = "") -> DataConfig:
    settings: dict[str, Any] = {"dataset": dataset, "data_dir": str(folder)}
    settings["vocab"] = vocab or ("bytes" if LAYOUTS[dataset].only_bytes else "words")
    return DataConfig(**settings)


def obtained(cfg: DataConfig) -> Corpus:
    corpora.obtain(cfg)
    corpus = corpora.open_corpus(cfg)
    assert isinstance(corpus, Prepared)
    return corpus


def texts(corpus: Corpus) -> dict[str, bytes]:
    return {split: b"".join(documents(corpus, split)) for split in SPLITS}


def files_below(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(path.relative_to(folder).as_posix() for path in paths)


PATH = "/wikitext-2-v1.zip"

# --- the same text through the builder and through the manual folder

LINES = {
    "train": "".join(f" = {i} = \n\n Zwölf N <unk> , {i} \n" for i in range(300)).encode(),
    "valid": b" the <unk> \n",
    "test": " é N \n last line".encode(),
}
PART = {"train": 20_000, "valid": 500, "test": 500}
"""Lengths of the splits of enwik8 and text8, in bytes."""


def stretch(alphabet: str) -> dict[str, bytes]:
    draw = random.Random(0)
    text = "".join(draw.choices(alphabet, k=30_000)).encode()
    ends = [(0, PART["train"]), (20_000, 20_500), (20_500, 21_000)]
    return {split: text[start:end] for split, (start, end) in zip(SPLITS, ends, strict=True)}


def wikitext(archives: Archives, dataset: str) -> dict[str, bytes]:
    names = {split: f"wiki.{split}.tokens" for split in SPLITS}
    archives.serve(dataset, zipped({f"{dataset}/{names[s]}": LINES[s] for s in SPLITS}))
    return {names[split]: LINES[split] for split in SPLITS}


def enwik8(archives: Archives, dataset: str) -> dict[str, bytes]:
    parts = stretch("abc é\n<>")
    archives.serve(dataset, zipped({"enwik8": b"".join(parts.values())}), held_out=500)
    return {f"{split}.txt.raw": part for split, part in parts.items()}


def text8(archives: Archives, dataset: str) -> dict[str, bytes]:
    parts = stretch("abc ")
    parts = {split: b" " + part[1:-1] + b" " for split, part in parts.items()}
    archives.serve(dataset, zipped({"text8": b"".join(parts.values())}), held_out=500)
    spaced = {s: " ".join(part.decode().strip().replace(" ", "_")) for s, part in parts.items()}
    return {f"{split}.txt": text.encode() for split, text in spaced.items()}


def ptb(archives: Archives, dataset: str) -> dict[str, bytes]:
    files = {}
    for split, text in LINES.items():
        files[f"./simple-examples/data/ptb.{split}.txt"] = text
        sentences = (" ".join("_".join(line.split())) for line in text.decode().splitlines())
        characters = "".join(f"{sentence} \n" for sentence in sentences)
        files[f"./simple-examples/data/ptb.char.{split}.txt"] = characters.encode()
    archives.serve(dataset, tarred(files))
    names = {split: dataset.replace("-", ".") + f".{split}.txt" for split in SPLITS}
    return {f"{s}.txt": files[f"./simple-examples/data/{names[s]}"] for s in SPLITS}


@pytest.mark.parametrize("block", [997, 1 << 20])
@pytest.mark.parametrize(
    ("dataset", "serve"),
    [
        *[("wikitext-103", wikitext), ("wikitext-2", wikitext), ("enwik8", enwik8)],
        *[("text8", text8), ("ptb", ptb), ("ptb-char", ptb)],
    ],
)
def test_builder_and_manual_folder_give_the_same_text(
    archives, tmp_path, monkeypatch, dataset, serve, block
):
    monkeypatch.setattr(layouts, "_BLOCK", block)
    files = serve(archives, dataset)
    built = obtained(config(dataset, tmp_path / "built"))
    write(tmp_path / "manual" / LAYOUTS[dataset].folder, files)
    manual = corpora.open_corpus(config(dataset, tmp_path / "manual"))
    assert isinstance(manual, Named)
    assert texts(built) == texts(manual)
    assert built.n_bytes == sum(map(len, texts(built).values()))
    assert all(texts(built).values()) and built.counted == manual.counted
    folder = prepared.folder(tmp_path / "built", dataset)
    assert built.root == folder
    assert sorted(built.inputs) == [
        f"{folder.relative_to(tmp_path / 'built').as_posix()}/{name}"
        for name in files_below(folder)
    ]
    if not LAYOUTS[dataset].only_bytes:
        (document,) = built.documents("train")
        assert all(block.endswith(b"\n") for block in document)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    ("dataset", "serve"),
    [
        *[("wikitext-103", wikitext), ("enwik8", enwik8), ("text8", text8)],
        *[("ptb", ptb), ("ptb-char", ptb)],
    ],
)
def test_token_files_are_the_same_either_way(archives, tmp_path, dataset, serve):
    files = serve(archives, dataset)
    built = token_files.prepare(config(dataset, tmp_path / "built"))
    write(tmp_path / "manual" / LAYOUTS[dataset].folder, files)
    manual = token_files.prepare(config(dataset, tmp_path / "manual"))
    assert archives.asked.total() == 1
    assert built.fingerprint == manual.fingerprint and built.folder.name == manual.folder.name
    for split in SPLITS:
        assert built.splits[split].tolist() == manual.splits[split].tolist()


@pytest.mark.slow
def test_losses_are_the_same_either_way(archives, shell, tmp_path):
    files = wikitext(archives, "wikitext-2")
    corpora.obtain(config("wikitext-2", tmp_path / "built"))
    write(tmp_path / "manual" / "wikitext-2", files)
    words = [*tiny.WORDS, "--dataset", "wikitext-2", "--text-dir", ""]
    words += ["--vocab", "bpe", "--vocab-size", "300", "--max-tokens", "1280", "--eval-every", "10"]
    runs = []
    for name in ("built", "manual"):
        runs.append(tmp_path / "runs" / name)
        folders = ("--data-dir", str(tmp_path / name), "--logdir", str(runs[-1]))
        status, output, errors = shell.run("train", *words, *folders)
        assert (status, errors) == (0, "")
        assert f"token files: {tmp_path / name}/wikitext-2-bpe-" in output
    assert (tmp_path / "built" / "tfds").exists() and not (tmp_path / "manual" / "tfds").exists()
    assert len(tiny.learned(runs[0])) > 3
    tiny.same_run(*runs)


def test_characters_of_penn_treebank_are_sentences_with_spaces_between_words(archives, tmp_path):
    ptb(archives, "ptb-char")
    text = texts(obtained(config("ptb-char", tmp_path)))
    assert text["valid"] == b"the <unk>\n"
    assert text["test"] == "é N\nlast line\n".encode()


def test_the_users_own_files_come_first(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    cfg = config("wikitext-2", tmp_path)
    write(tmp_path, {f"wikitext-2/{split}.txt": b"own\n" for split in SPLITS})
    corpora.obtain(cfg)
    assert not archives.asked
    assert texts(corpora.open_corpus(cfg)) == dict.fromkeys(SPLITS, b"own\n")
    (tmp_path / "wikitext-2" / "test.txt").unlink()
    with pytest.raises(UserError, match=r"lacks test\.txt or wiki\.test\.tokens"):
        corpora.obtain(cfg)
        corpora.open_corpus(cfg)


def test_what_is_prepared_is_not_downloaded_again(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    cfg = config("wikitext-2", tmp_path)
    first = texts(obtained(cfg))
    (tmp_path / prepared.DOWNLOADS / "wikitext-2-v1.zip").unlink()
    assert texts(obtained(cfg)) == first
    assert archives.asked == {PATH: 1}


def test_opening_downloads_nothing_and_says_both_ways(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    with pytest.raises(UserError) as caught:
        corpora.open_corpus(config("wikitext-2", tmp_path))
    assert not archives.asked and "\n" not in str(caught.value)
    assert "python -m txl_jax.data prepare --dataset wikitext-2" in str(caught.value)
    assert f"or fill the folder {tmp_path}/wikitext-2: unpack" in str(caught.value)


# --- the library's own builders

NEWS = "1-billion-word-language-modeling-benchmark-r13output"
WORDS = b"<S>\n<UNK>\nthe\nnews\n"


def sentences(file: str) -> list[str]:
    return [f"{file} sentence {i} – é" for i in range(40)]


def news() -> dict[str, list[str]]:
    """Files of the archive, by their names in it, not in order."""
    train = f"{NEWS}/training-monolingual.tokenized.shuffled/news.en-0000{{}}-of-00100"
    held_out = f"{NEWS}/heldout-monolingual.tokenized.shuffled/news.en.heldout-000{{:02}}-of-00050"
    names = [train.format(i) for i in (2, 1)] + [held_out.format(i) for i in range(49, -1, -1)]
    return {name: sentences(name[-14:]) for name in names}


def serve_news(archives: Archives) -> None:
    files = {name: "\n".join(lines).encode() + b"\n" for name, lines in news().items()}
    files[f"{NEWS}/README"] = b"about the files\n"
    archives.serve("lm1b", tarred(files))
    archives.files["/words"] = WORDS
    sources.WORD_LISTS["lm1b"] = dataclasses.replace(
        sources.WORD_LISTS["lm1b"],
        urls=(f"{archives.url}/words",),
        digest=f"git:{hashlib.sha1(b'blob %d' % len(WORDS) + bytes(1) + WORDS).hexdigest()}",
    )


def test_lm1b_is_the_librarys_with_a_valid_split_from_its_test_split(archives, tmp_path):
    serve_news(archives)
    corpus = obtained(config("lm1b", tmp_path))
    files = news()
    in_order = {name: files[name] for name in sorted(files)}
    train = [line for name, lines in in_order.items() if "training" in name for line in lines]
    held_out = [line for name, lines in in_order.items() if "heldout" in name for line in lines]
    found = {split: text.decode().splitlines() for split, text in texts(corpus).items()}
    assert found == {"train": train, "valid": held_out[:40], "test": held_out[40:]}
    assert corpus.n_bytes == sum(map(len, texts(corpus).values()))
    words = tmp_path / prepared.DOWNLOADS / "1b_word_vocab.txt"
    assert corpus.word_list == words and words.read_bytes() == WORDS
    assert f"{prepared.DOWNLOADS}/1b_word_vocab.txt" in corpus.inputs
    assert not list(tmp_path.rglob("*news*"))


def test_lm1b_needs_its_words_only_for_words(archives, tmp_path):
    serve_news(archives)
    assert obtained(config("lm1b", tmp_path, "bytes")).word_list is None
    assert not archives.asked["/words"]
    with pytest.raises(UserError, match="lm1b is not in"):
        corpora.open_corpus(config("lm1b", tmp_path))
    (tmp_path / prepared.DOWNLOADS / f"{NEWS}.tar.gz").unlink()
    obtained(config("lm1b", tmp_path))
    assert archives.asked == {f"/{NEWS}.tar.gz": 1, "/words": 1}


def test_tiny_shakespeare_is_the_librarys(archives, tmp_path):
    text = "".join(f"First Citizen:\nSpeak, {i}, – speak.\n\n" for i in range(200))
    archives.serve("tiny_shakespeare", text.encode())
    found = texts(obtained(config("tiny_shakespeare", tmp_path, "bytes")))
    lengths = [int(len(text) * 0.9)]
    lengths.append(int((len(text) - lengths[0]) * 0.5))
    parts = [text[: lengths[0]], text[lengths[0] : sum(lengths)], text[sum(lengths) :]]
    expected = [part.encode() + b"\n" * (not part.endswith("\n")) for part in parts]
    assert list(found.values()) == expected


def test_versions_and_checksums_are_the_librarys():
    for dataset, module in (("lm1b", lm1b), ("tiny_shakespeare", tiny_shakespeare_dataset_builder)):
        source = sources.SOURCES[dataset]
        assert source.version == str(module.Builder.VERSION)
        checksums = Path(module.__file__ or "").with_name("checksums.tsv").read_text()
        url, size, digest, _ = checksums.strip().split("\t")
        archive = source.archive
        assert (archive.urls[0], archive.size, archive.digest) == (
            url,
            int(size),
            f"sha256:{digest}",
        )


# --- what goes wrong


def cut_off(archives: Archives) -> None:
    archives.lengths[PATH] = len(archives.files[PATH])
    archives.files[PATH] = archives.files[PATH][:-100]


def shorter(archives: Archives) -> None:
    archives.files[PATH] = archives.files[PATH][:-100]


def shorter_of_no_stated_length(archives: Archives) -> None:
    shorter(archives)
    archives.lengths[PATH] = None


def other(archives: Archives) -> None:
    archives.files[PATH] = bytes(len(archives.files[PATH]))


def page(archives: Archives) -> None:
    archives.files[PATH] = PAGE
    archives.types[PATH] = "text/html; charset=utf-8"


def page_as_an_archive(archives: Archives) -> None:
    archives.files[PATH] = PAGE.ljust(len(archives.files[PATH]))


def gone(archives: Archives) -> None:
    del archives.files[PATH]


BROKEN = {
    cut_off: r"was cut off",
    shorter: r"gives \d+ bytes instead of \d+",
    shorter_of_no_stated_length: r"was cut off after \d+ of \d+ bytes",
    other: r"gives another file \(its sha256 hash is [0-9a-f]{64}\)",
    page: r"gives a web page instead of the file",
    page_as_an_archive: r"gives a web page instead of the file",
    gone: r"answers 404 Not Found",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_download_that_is_not_the_file_is_one_line_and_a_mirror_is_tried(
    archives, tmp_path, fault
):
    wikitext(archives, "wikitext-2")
    whole = archives.files[PATH]
    archives.serve("wikitext-2", whole, mirrors=1)
    mirror = f"{PATH}.mirror"
    fault(archives)
    cfg = config("wikitext-2", tmp_path)
    with pytest.raises(UserError) as caught:
        corpora.obtain(cfg)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("cannot download wikitext-2-v1.zip: ")
    found = [f"{archives.url}{PATH} {BROKEN[fault]}", f"{archives.url}{mirror} answers 404"]
    for complaint in found:
        assert re.search(complaint, message), message
    assert files_below(tmp_path) == []
    archives.files[mirror] = whole
    assert texts(obtained(cfg))["valid"] == LINES["valid"]


def test_without_a_network_all_addresses_are_named(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        source = sources.SOURCES["wikitext-2"]
        urls = (f"{dead}/a", "http://wikitext.invalid/b")
        archive = dataclasses.replace(source.archive, urls=urls)
        sources.SOURCES["wikitext-2"] = dataclasses.replace(source, archive=archive)
        with pytest.raises(UserError) as caught:
            corpora.obtain(config("wikitext-2", tmp_path))
    for url in urls:
        assert f"{url} cannot be reached, or broke off" in str(caught.value)
    assert f"put the file into {tmp_path / prepared.DOWNLOADS} yourself" in str(caught.value)
    assert files_below(tmp_path) == []
    content = archives.files[PATH]
    write(tmp_path / prepared.DOWNLOADS, {"wikitext-2-v1.zip": content})
    assert texts(obtained(config("wikitext-2", tmp_path)))["valid"] == LINES["valid"]


def test_a_proxy_of_the_environment_is_asked(archives, tmp_path, monkeypatch):
    wikitext(archives, "wikitext-2")
    source = sources.SOURCES["wikitext-2"]
    archive = dataclasses.replace(source.archive, urls=("http://wikitext.invalid/a.zip",))
    sources.SOURCES["wikitext-2"] = dataclasses.replace(source, archive=archive)
    archives.files["http://wikitext.invalid/a.zip"] = archives.files[PATH]
    monkeypatch.setenv("http_proxy", archives.url)
    obtained(config("wikitext-2", tmp_path))
    assert archives.asked == {"http://wikitext.invalid/a.zip": 1}


def test_an_archive_without_a_file_is_one_line(archives, tmp_path):
    archives.serve("wikitext-2", zipped({"wikitext-2/wiki.train.tokens": b"a\n"}))
    archives.serve("ptb", tarred({"./simple-examples/data/ptb.train.txt": b"a\n"}))
    archives.serve("lm1b", tarred({f"{NEWS}/README": b"a\n"}))
    archives.serve("enwik8", zipped({"enwik8": b"too short"}))
    lacks = {
        "wikitext-2": "zip lacks wikitext-2/wiki.valid.tokens: remove it",
        "ptb": "tgz lacks ./simple-examples/data/ptb.valid.txt: remove it",
        "lm1b": "gz lacks 1-billion-word-language-modeling-benchmark-r13output/training",
        "enwik8": "zip holds 9 bytes of text, too few",
    }
    for dataset, says in lacks.items():
        with pytest.raises(UserError) as caught:
            corpora.obtain(config(dataset, tmp_path, "bytes"))
        assert says in str(caught.value) and "\n" not in str(caught.value)
        assert not [name for name in files_below(tmp_path / "tfds") if "record" in name]
        assert not list((tmp_path / "tfds").glob("*/*incomplete*"))


@pytest.mark.parametrize(("dataset", "pack"), [("wikitext-2", zipped), ("ptb", tarred)])
def test_an_archive_that_cannot_be_unpacked_is_one_line(archives, tmp_path, dataset, pack):
    member = sources.SOURCES[dataset].member
    text = random.Random(0).randbytes(20_000).hex().encode()
    packed = bytearray(pack({member.format(split): text for split in SPLITS}))
    packed[10_000:10_050] = bytes(50)
    archives.serve(dataset, bytes(packed))
    with pytest.raises(UserError, match=r"(is damaged|lacks) .*: remove it and start again"):
        corpora.obtain(config(dataset, tmp_path, "bytes"))
    archive = f"{prepared.DOWNLOADS}/{sources.SOURCES[dataset].archive.name}"
    assert files_below(tmp_path) == [archive]


def test_text_that_is_not_utf8_is_named(archives, tmp_path):
    files = {f"wikitext-2/wiki.{split}.tokens": b"a\n" for split in SPLITS}
    files["wikitext-2/wiki.test.tokens"] = b"na\xefve\n"
    archives.serve("wikitext-2", zipped(files))
    says = r"zip/wikitext-2/wiki\.test\.tokens is not UTF-8 at byte offset 2"
    with pytest.raises(UserError, match=says):
        corpora.obtain(config("wikitext-2", tmp_path))


def test_prepared_files_that_are_damaged_are_one_line(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    corpus = obtained(config("wikitext-2", tmp_path))
    record = next(corpus.root.glob("*train*record*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read .*: remove the folder") as caught:
        texts(corpora.open_corpus(config("wikitext-2", tmp_path)))
    assert "\n" not in str(caught.value)
    (corpus.root / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="damaged: remove the folder"):
        corpora.open_corpus(config("wikitext-2", tmp_path))


# --- other processes

OBTAIN = """
    import dataclasses, sys
    from txl_jax import corpora, errors, layouts, sources
    from txl_jax.config import DataConfig

    dataset, url, digest, folder, *prelude = sys.argv[1:]
    source = sources.SOURCES[dataset]
    archive = dataclasses.replace(source.archive, urls=(url,), digest=digest, size=None)
    sources.SOURCES[dataset] = dataclasses.replace(source, archive=archive)
    exec("".join(prelude))
    cfg = DataConfig(dataset=dataset, data_dir=folder)
    errors.run_command(lambda _: corpora.obtain(cfg))
"""


def start(
    dataset: str, folder: Path, *prelude: str, before: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    archive = sources.SOURCES[dataset].archive
    script = textwrap.dedent(OBTAIN)
    return subprocess.Popen(
        [
            *(*before, sys.executable, "-c", script, dataset, archive.urls[0]),
            *(archive.digest, str(folder), *prelude),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_is_killed_is_made_again(archives, tmp_path, sign):
    wikitext(archives, "wikitext-2")
    archives.stopped_at = 1000
    with start("wikitext-2", tmp_path) as process:
        assert archives.waiting.wait(60)
        process.send_signal(sign)
        output = process.communicate(timeout=60)
    left = [] if sign == signal.SIGINT else [f"{prepared.DOWNLOADS}/wikitext-2-v1.zip.tmp"]
    assert files_below(tmp_path) == left
    if sign == signal.SIGINT:
        assert (process.returncode, output) == (130, ("", "\n"))
    archives.stopped_at = None
    archives.go_on.set()
    assert texts(obtained(config("wikitext-2", tmp_path)))["valid"] == LINES["valid"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_builder_that_is_killed_is_started_again(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    kill = """
        import os, signal
        from txl_jax import builders
        given = builders.layouts.blocks

        def blocks(layout, file, path):
            for i, block in enumerate(given(layout, file, path)):
                yield block
                if "valid" in path.name:
                    os.kill(os.getpid(), signal.SIGKILL)

        builders.layouts.blocks = blocks
    """
    with start("wikitext-2", tmp_path, textwrap.dedent(kill)) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*incomplete*"))
    assert not prepared.folder(tmp_path, "wikitext-2").exists()
    cfg = config("wikitext-2", tmp_path)
    with pytest.raises(UserError, match="wikitext-2 is not in"):
        corpora.open_corpus(cfg)
    assert texts(obtained(cfg))["valid"] == LINES["valid"]
    assert not list(tmp_path.rglob("*incomplete*"))
    assert archives.asked == {PATH: 1}


def test_a_download_is_made_where_there_are_no_locks(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    prelude = """
def flock(*args):
    raise OSError(errno.ENOLCK, "no locks available")
import errno, fcntl
fcntl.flock = flock
"""
    with start("wikitext-2", tmp_path, prelude) as process:
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    assert texts(corpora.open_corpus(config("wikitext-2", tmp_path)))["valid"] == LINES["valid"]


def test_prepared_data_sets_are_used_where_they_can_only_be_read(archives, tmp_path):
    """The folder for token files links to them."""
    wikitext(archives, "wikitext-2")
    shelf, own = tmp_path / "shelf", tmp_path / "own"
    obtained(config("wikitext-2", shelf))
    own.mkdir()
    (own / "tfds").symlink_to(shelf / "tfds")
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    words = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(shelf))
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let its users mount a folder of their own")
    script = """
        import sys
        from txl_jax import known_sizes, token_files
        from txl_jax.config import DataConfig

        known_sizes.check = lambda *found: None
        token_files.prepare(DataConfig("wikitext-2", vocab="words", data_dir=sys.argv[1]))
    """
    command = [*words, sys.executable, "-c", textwrap.dedent(script), str(own)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in own.glob("wikitext-2-words-*/train.npy")] == ["train.npy"]


def test_several_processes_download_once(archives, tmp_path):
    wikitext(archives, "wikitext-2")
    archives.stopped_at = 1000
    with start("wikitext-2", tmp_path) as first:
        assert archives.waiting.wait(60)
        with start("wikitext-2", tmp_path) as second:
            assert second.stderr is not None
            said = second.stderr.readline()
            assert said == f"waiting for another process that fills {tmp_path / 'tfds'}\n"
            archives.go_on.set()
            assert first.communicate(timeout=60) == ("", "")
            assert second.communicate(timeout=60) == ("", "")
    assert (first.returncode, second.returncode) == (0, 0)
    assert archives.asked == {PATH: 1}
    assert texts(corpora.open_corpus(config("wikitext-2", tmp_path)))["valid"] == LINES["valid"]


def on_a_disk_of(size: str, folder: Path) -> tuple[str, ...]:
    """Words before a command that sees a new disk at folder."""
    mount = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'
    words = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, size)
    folder.mkdir()
    if subprocess.run([*words, folder, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let its users mount a disk of their own")
    return (*words, str(folder))


@pytest.mark.parametrize(
    ("size", "what"),
    [("200k", f"{prepared.DOWNLOADS}/simple-examples.tgz"), ("1500k", "tfds/ptb/1.0.0")],
)
def test_a_disk_that_is_full_is_one_line(archives, tmp_path, size, what):
    text = random.Random(0).randbytes(400_000).hex().encode() + b"\n"
    files = {f"./simple-examples/data/ptb.{split}.txt": text for split in SPLITS}
    archives.serve("ptb", tarred(files))
    disk = tmp_path / "disk"
    # After the command, its exit status and what is left on the disk, before that goes.
    look = ("sh", "-c", '"$@"; echo $?; find "$0" -type f', str(disk))
    with start("ptb", disk, before=(*on_a_disk_of(size, disk), *look)) as process:
        output, errors = process.communicate(timeout=60)
    assert errors == (
        f"error: cannot write {disk}/{what}: No space left on device; make room there or name "
        "another folder with --data-dir\n"
    )
    status, *left = output.split()
    assert status == "2"
    assert [name for name in left if "ptb" in name or ".tmp" in name] == []


# --- documents of a folder

TEXT = {
    **{f"{i}/é {j}.txt": f"Text {i} – {j}\nno end".encode() for i in range(20) for j in range(10)},
    "binary.txt": b"a\0b",
}
ARTICLES = '<doc id="{0}" url="u" title="T{0}">\nT{0}\n\nText.\n</doc>\n' * 2


def folder_of(dataset: str, folder: Path) -> DataConfig:
    files = TEXT
    if dataset == "wiki":
        files = {f"AA/wiki_{i:03}": ARTICLES.format(i).encode() for i in range(200)}
    settings: dict[str, Any] = {"dataset": dataset, "text_dir": str(write(folder / "text", files))}
    return DataConfig(**settings, data_dir=str(folder / "data"))


def written(cfg: DataConfig) -> Path:
    corpus = corpora.open_corpus(cfg)
    assert isinstance(corpus, Folder)
    return builders.prepare_documents(cfg.dataset, corpus, Path(cfg.data_dir))


@pytest.mark.parametrize("dataset", ["text", "code", "wiki"])
def test_documents_are_records_in_their_order(tmp_path, dataset):
    cfg = folder_of(dataset, tmp_path)
    folder = written(cfg)
    assert folder.parent.parent == tmp_path / "data" / "tfds" / dataset
    builder: Any = tfds.builder_from_directory(folder)
    corpus = corpora.open_corpus(cfg)
    assert isinstance(corpus, Folder)
    for split in SPLITS:
        records = builder.as_data_source(split=split)
        texts = documents(corpus, split)
        assert [records[i]["text"] for i in range(len(records))] == texts and texts
        paths = [path for path, _ in corpus.documents_by_file(split)]
        assert [records[i]["path"].decode() for i in range(len(records))] == paths


def test_documents_are_written_again_only_when_they_have_changed(tmp_path):
    cfg = folder_of("text", tmp_path)
    first = written(cfg)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    for path in (tmp_path / "text").rglob("*.txt"):
        path.touch()
    assert written(cfg) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    (tmp_path / "text" / "3" / "é 3.txt").write_bytes(b"Text 3 - 3\nno end")
    second = written(cfg)
    assert second != first
    (tmp_path / "text" / "3" / "é 3.txt").rename(tmp_path / "text" / "3" / "e 3.txt")
    assert written(cfg) not in (first, second)


def test_documents_that_change_while_they_are_written_are_one_line(tmp_path, monkeypatch):
    cfg = folder_of("text", tmp_path)
    given, calls = Folder.documents_by_file, []

    def changing(corpus: Folder, split: str) -> Iterator[Any]:
        calls.append(split)
        if len(calls) == 4:  # what is written
            (tmp_path / "text" / corpus.files["test"][0]).write_bytes(b"other")
        return given(corpus, split)

    monkeypatch.setattr(Folder, "documents_by_file", changing)
    with pytest.raises(UserError, match="changed while they were read: start again"):
        written(cfg)
    assert files_below(tmp_path / "data") == []


def test_a_killed_writer_of_documents_leaves_nothing_in_place(tmp_path):
    cfg = folder_of("text", tmp_path)
    script = """
        import os, signal, sys
        from txl_jax import data, folders
        given = folders.Folder.documents_by_file
        seen = []

        def documents(corpus, split):
            seen.append(split)
            if seen.count("valid") == 4:  # vocabulary, tokens and hash came before
                os.kill(os.getpid(), signal.SIGKILL)
            return given(corpus, split)

        folders.Folder.documents_by_file = documents
        data.main(sys.argv[1:])
    """
    words = ["prepare", "--dataset", "text", "--text-dir", cfg.text_dir, "--data-dir", cfg.data_dir]
    command = [sys.executable, "-c", textwrap.dedent(script), *words, "--tfds"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "data" / "tfds" / "text").glob("*/*")
    assert "incomplete" in left.name
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "txl_jax.data", *words, "--tfds", "--json"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tfds"] == str(written(cfg))
    assert not left.exists()


def test_a_named_data_set_is_no_folder_of_documents():
    with pytest.raises(UserError, match="--tfds is for text, code, wiki and stdlib: wikitext-2 be"):
        data.main(["prepare", "--dataset", "wikitext-2", "--vocab", "words", "--tfds"])
