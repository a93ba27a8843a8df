"""The command that prepares a corpus, as a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from txl_jax import token_files
from txl_jax.config import DataConfig
from txl_jax.documents import SPLITS

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def text(tmp_path) -> Path:
    root = tmp_path / "text"
    root.mkdir()
    for i in range(200):
        (root / f"{i}.txt").write_text("the cat sat on the mat \n<unk>\n" * (i + 1))
    return root


def command(*words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "txl_jax.data", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_corpus_is_prepared_and_what_was_found_is_shown(text, tmp_path):
    words = ["prepare", "--dataset", "text", "--text-dir", str(text), "--vocab", "words"]
    words += ["--data-dir", str(tmp_path / "data")]
    status, output, errors = command(*words)
    assert (status, errors) == (0, "")
    files = token_files.prepare(
        DataConfig("text", str(text), vocab="words", data_dir=str(tmp_path / "data"))
    )
    n_train = len(files.splits["train"])
    lines = output.splitlines()
    assert re.fullmatch(rf"train +\d+ +{n_train:,} +11\.11%", lines[1])
    assert lines[4] == "vocabulary (words): 7"
    assert lines[5].startswith("commonest in train: <eos> 2")
    assert lines[6] == f"token files: {files.folder}"

    status, output, errors = command(*words, "--json")
    assert (status, errors) == (0, "")
    found = json.loads(output)
    assert found["splits"]["train"]["tokens"] == n_train
    assert found["vocab_size"] == len(files.vocab)
    assert len(found["commonest"]) == 7


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "there is no command ''"),
        (["prepar"], r"there is no command 'prepar' \(did you mean prepare\?\)"),
        (["prepare", "--datset", "text"], r"unknown option --datset \(did you mean --dataset\?\)"),
        (["prepare", "--dataset", "text"], "--dataset text needs --text-dir"),
        (["prepare", "--vocab", "bpe"], "--vocab-size is 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, words, complaint):
    rest = ["--data-dir", str(tmp_path)] if len(words) > 1 else []
    status, output, errors = command(*words, *rest)
    assert (status, output) == (2, "")
    assert re.match(f"error: {complaint}", errors) and errors.count("\n") == 1


def test_help_names_the_options():
    status, output, _ = command("--help")
    assert status == 0 and "--vocab-size" in output and "--json" in output


def test_wrong_sizes_of_a_known_corpus_are_an_error(tmp_path):
    root = tmp_path / "wikitext-103"
    root.mkdir()
    for split in SPLITS:
        (root / f"{split}.txt").write_text(" a b \n")
    words = ["--dataset", "wikitext-103", "--vocab", "words", "--data-dir", str(tmp_path)]
    status, output, errors = command("prepare", *words)
    assert (status, output) == (2, "")
    assert "this is not wikitext-103: it has 3 tokens in train instead of 103,227,021" in errors
