import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.archives import write
from tests.texts import documents
from txl_jax import code as code_files
from txl_jax import corpora, text_files
from txl_jax.code import Code
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS
from txl_jax.errors import UserError

# The split of a name is part of the format.
TRAIN, VALID, TEST = "asyncio/coroutines.py", "asyncio/queues.py", "typing.py"
THREE = {TRAIN: b"import this\n", VALID: b"x = 1\n", TEST: b"y = 2\n"}


def code(root: Path, **settings: str) -> Code:
    corpus = corpora.open_corpus(DataConfig(dataset="code", text_dir=str(root), **settings))  # pyright: ignore[reportArgumentType]
    assert isinstance(corpus, Code)
    return corpus


def names(corpus: Code) -> list[str]:
    return sorted(name for split in SPLITS for name in corpus.files[split])


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.invalid")
    subprocess.run(["git", *identity, "-C", folder, *words], check=True, capture_output=True)


def checkout(folder: Path, files: dict[str, bytes]) -> Path:
    write(folder, files)
    git(folder, "init")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "-m", "all")
    return folder


def test_a_document_is_path_sign_and_content_after_the_sign_between_files(tmp_path):
    files = {TRAIN: "if é:\r\n\n    pass   \n".encode(), VALID: b"no end of line", TEST: b"\n"}
    corpus = code(write(tmp_path, files))
    assert [documents(corpus, split) for split in SPLITS] == [
        [f"␢\n{TRAIN}\n₣\nif é:\r\n\n    pass   \n".encode()],
        [f"␢\n{VALID}\n₣\nno end of line\n".encode()],
        [f"␢\n{TEST}\n₣\n\n".encode()],
    ]


def test_files_are_dealt_as_those_of_a_folder_of_text(tmp_path):
    write(tmp_path, {f"{i}/{j}.c": b"x" for i in range(20) for j in range(20)})
    text = corpora.open_corpus(DataConfig(dataset="text", text_dir=str(tmp_path)))
    assert code(tmp_path).files == text.files  # pyright: ignore[reportAttributeAccessIssue]
    assert code(tmp_path).n_bytes == 400


def test_what_is_no_source_code_is_left_out_and_counted_once(tmp_path, capfd):
    others = {
        "latin.py": "naïve".encode("latin-1"),
        "cut.py": "é".encode()[:1],
        "a.min.js": b"x;" * 400,
        "b.min.js": b"short\n" + b"y" * 741 + b"\nshort\n",
        "binary.py": b"\0",
        "empty.py": b"",
    }
    fits = {"740.py": "é".encode() * 740 + b"\n"}
    corpus = code(write(tmp_path, THREE | others | fits))
    for _ in range(2):
        assert sum(len(documents(corpus, split)) for split in SPLITS) == 4
    assert capfd.readouterr() == (
        "",
        "files left out: 2 with lines above 740 characters and 2 not UTF-8, such as a.min.js\n",
    )


@given(st.lists(st.text("aé\n", max_size=30)), st.integers(1, 9), st.integers(1, 12))
def test_a_long_line_is_found_wherever_blocks_end(tmp_path_factory, parts, longest, block):
    content = "\n".join(parts) + "."
    root = write(tmp_path_factory.mktemp("code"), THREE | {TRAIN: content.encode()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_BLOCK", block)
        patch.setattr(code_files, "_LONGEST_LINE", longest)
        corpus = code(root)
        if any(len(line) > longest for line in content.split("\n")):
            with pytest.raises(UserError, match="has no text for the split 'train'"):
                documents(corpus, "train")
        else:
            assert documents(corpus, "train") == [f"␢\n{TRAIN}\n₣\n{content}\n".encode()]


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, capfd):
    corpus = code(write(tmp_path, THREE))
    assert sum(len(documents(corpus, split)) for split in SPLITS) == 3
    assert capfd.readouterr() == ("", "")


def test_of_a_checkout_what_git_tracks_of_a_source_tree_everything(tmp_path):
    files = {"a.py": b"a", "src/b.py": b"b", ".hidden/c.py": b"c", ".gitignore": b"*.o\n"}
    checkout(tmp_path / "one", files)
    write(tmp_path / "one", {"untracked.py": b"u", "src/d.o": b"d", "gone.py": b"g"})
    git(tmp_path / "one", "add", "gone.py")
    (tmp_path / "one" / "gone.py").unlink()
    (tmp_path / "one" / "link.py").symlink_to("a.py")
    git(tmp_path / "one", "add", "link.py")
    write(tmp_path, {"plain/e.py": b"e", "plain/.f.py": b"f", "g.py": b"g"})
    expected = ["g.py", "one/a.py", "one/src/b.py", "plain/e.py"]
    assert names(code(tmp_path)) == expected
    copy = {name: (tmp_path / name).read_bytes() for name in expected}
    assert code(write(tmp_path / "copy", copy)).files == code(tmp_path / "copy").files
    assert names(code(tmp_path / "copy")) == expected


def test_submodules_and_settings_of_git(tmp_path, monkeypatch):
    other = checkout(tmp_path / "other", {"inner.py": b"i"})
    outer = checkout(tmp_path / "outer", {"a.py": b"a"})
    git(outer, "-c", "protocol.file.allow=always", "submodule", "add", str(other), "sub")
    write(outer, {"sub/untracked.py": b"u"})
    hook = write(tmp_path, {"hook": b"#!/bin/sh\ntouch $(dirname $0)/ran\n"}) / "hook"
    hook.chmod(0o755)
    git(outer, "config", "core.fsmonitor", str(hook))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert names(code(outer)) == ["a.py", "sub/inner.py"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("", ["Makefile", "a.py", "b.pyi", "c.cu", "d.h", "doc/e.md"]),
        ("python", ["a.py", "b.pyi"]),
        ("Python, *.cu", ["a.py", "b.pyi", "c.cu"]),
        ("c,", ["d.h"]),
        ("doc/*,[Mm]akefile", ["Makefile", "doc/e.md"]),
    ],
)
def test_files_are_chosen_by_language_and_pattern(tmp_path, chosen, expected):
    everything = ["Makefile", "a.py", "b.pyi", "c.cu", "d.h", "doc/e.md"]
    write(tmp_path, dict.fromkeys(everything, b"x"))
    assert names(code(tmp_path, code_files=chosen)) == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"code_files": "pyton"},
            r"language pyton \(did you mean python\?\); known are c,",
        ),
        ({"code_files": "*.rs"}, r"has no files that fit --code-files \*\.rs: name a folder"),
        ({"dataset": "text", "code_files": "c"}, "--code-files is read only with --dataset code"),
    ],
)
def test_choices_that_fit_nothing(tmp_path, settings, says):
    write(tmp_path, THREE)
    words = {"dataset": "code", "text_dir": str(tmp_path)} | settings
    with pytest.raises(UserError, match=says):
        corpora.open_corpus(DataConfig(**words))


def test_a_checkout_that_git_cannot_list_is_one_line(tmp_path, monkeypatch):
    checkout(tmp_path / "one", THREE)
    (tmp_path / "one" / ".git" / "HEAD").write_text("broken")
    with pytest.raises(UserError, match=r"git cannot list the files of .*/one: fatal: ") as caught:
        code(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="is a git checkout, and git is not installed: install it"):
        code(tmp_path)


def test_a_folder_without_source_code(tmp_path):
    with pytest.raises(UserError, match="has no files: name a folder with source code"):
        code(tmp_path)
    write(tmp_path, {TRAIN: b"\xff"})
    with pytest.raises(UserError, match="has no text for the split 'train'"):
        documents(code(tmp_path), "train")
