"""What cannot work gets one line and exit status 2, and nothing is written that was not there."""

import dataclasses
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from tests.tiny import LOGDIR, STEPS, WORDS, Shell
from txl_jax import evaluate, generate, train
from txl_jax.errors import run_command
from txl_jax.trained import load_trained

pytest_plugins = ["tests.tiny_runs"]

pytestmark = pytest.mark.processes

MAINS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}
NEW = ("--logdir", "runs/new", "--data-dir", "new")
Refused = Callable[..., str]


def assert_says(line: str, complaint: str) -> None:
    assert re.search(complaint, line), line


@pytest.fixture
def refused(shell: Shell, monkeypatch: pytest.MonkeyPatch, capfd) -> Refused:
    """As `Shell.refused`, in this process and on four devices."""

    def run(module: str, *words: str, cwd: Path = shell.home) -> str:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(SystemExit) as ended:
            run_command(MAINS[module])
        output, errors = capfd.readouterr()
        assert output == ""
        assert isinstance(ended.value.code, int)
        return tiny.one_line(ended.value.code, errors)

    return run


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--n-layers 3", r"unknown option --n-layers \(did you mean --n-layer\?\)"),
        ("--config quikstart", r"no config 'quikstart' \(did you mean quickstart\?\)"),
        ("--batch three", "--batch: .*'three'"),
        ("--batch 6", "batch is 6, which 4 devices cannot divide; use a multiple of 4"),
        ("--batch 0", "batch is 0, which"),
        (
            "--batch 12 --accumulate 2",
            "4 devices x accumulate 2 cannot divide; use a multiple of 8",
        ),
        ("--accumulate 0", "accumulate is 0; it has to be at least 1"),
        ("--eval-batch 6", "eval_batch is 6, which 4 devices cannot divide"),
        ("--max-tokens 0", "max_tokens is 0; it has to be at least 1"),
        ("--log-every 0", "log_every is 0"),
        ("--eval-every 0", "eval_every is 0"),
        ("--eval-max-tokens -1", "eval_max_tokens is -1"),
        ("--eval-max-tokens 1", r"eval_max_tokens is 1; it has to be 0 \(all\) or 2"),
        ("--sample-tokens -1", "sample_tokens is -1"),
        ("--checkpoint-minutes -1", "checkpoint_minutes is -1"),
        ("--lr 0", "lr is 0"),
        ("--clip -1", "clip is -1"),
        ("--beta2 1", "beta2 is 1"),
        ("--final-lr 2", "final_lr is 2"),
        ("--d-model 15", "d_model is 15; it has to be even"),
        ("--n-layer 0", "n_layer is 0; it has to be at least 1"),
        ("--mem-len -1", "mem_len is -1; it has to be 0 or more"),
        ("--same-length --mem-len 0", "same_length lets a query see mem_len keys and mem_len is 0"),
        ("--dropout 1", r"dropout is 1.0; it has to be in \[0, 1\)"),
        ("--tie-projs True False", "tie_projs has 2 entries"),
        ("--n-token 5", "n_token is 5 and the corpus has 20; leave it at 0"),
        ("--n-token 64", "n_token is 64 and the corpus has 20; leave it at 0"),
        ("--tgt-len 1050", r"tgt_len of 1050 .*: use --tgt-len \d+ or less or --batch 3 or less"),
        ("--text-dir missing", "--text-dir missing is not a folder"),
        ("--text-dir text/000.txt", "--text-dir text/000.txt is not a folder"),
        (f"--text-dir {'a' * 300}", "cannot read a+: File name too long"),
        ("--text-dir empty", "--text-dir empty has no text files"),
        ("--text-dir blank", "blank has no text for the split 'train'"),
        ("--text-dir few", "few has no text for the split 'valid' .*: add files"),
        ("--dataset stdlib", "--text-dir is read only with --dataset text"),
        ("--data-dir text/data", "--data-dir text/data lies inside --text-dir text"),
        ("--data-dir blank/a.txt/data", "cannot write token files to blank/a.txt/data: Not a d"),
        ("--data-dir /proc/new", "cannot write token files to /proc/new: .*; make room there"),
        ("--logdir /proc/new", "cannot write the run's folder /proc/new: .*; take a --logdir that"),
        ("--logdir text", r"text holds other things \(\d{3}.txt, .*, …\) and no run"),
        ("--logdir text/000.txt", "text/000.txt is a file; --logdir takes a folder"),
        ("--logdir text/000.txt/run", "text/000.txt/run: Not a directory"),
    ],
)
def test_a_run_that_cannot_work_is_not_begun(shell, refused, words, complaint):
    home = shell.home
    for folder in ("empty", "blank", "few"):
        (home / folder).mkdir(exist_ok=True)
    (home / "blank" / "a.txt").write_bytes(b"\0")
    for name in ("000.txt", "001.txt"):
        shutil.copy(home / "text" / name, home / "few" / name)
    before = tiny.everything(home)
    assert_says(refused("train", *WORDS, *NEW, *words.split()), complaint)
    if not words.startswith(("--n-token", "--tgt-len")):  # for these the tokens have to be known
        assert not list((home / "new").glob("text-*"))
    shutil.rmtree(home / "new", ignore_errors=True)  # has a lock
    assert tiny.everything(home) == before


def test_what_is_wrong_with_the_words_is_found_before_the_text_is_read(refused, tmp_path):
    for words in ("--n-layers 3", "--d-model 15", "--batch 6", "--lr 0", "--log-every 0"):
        assert "text-dir" not in refused("train", *WORDS, *words.split(), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_cluster_there_has_to_be_local(shell, tmp_path):
    refusal = shell.refused("train", *WORDS[1:], cwd=tmp_path)
    assert refusal.endswith("pass --local to train on this machine")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_another_run_stays_as_it_is(shell, finished, refused):
    before = tiny.everything(shell.home)
    refusal = refused("train", *WORDS, *NEW[2:], "--n-layer", "3", "--lr=0.5", "--seed", "1")
    assert refusal.startswith(
        f"{LOGDIR} belongs to a run of another config (model.n_layer: 2 there, 3 here; "
        "optim.lr: 0.01 there, 0.5 here; train.seed: 0 there, 1 here); take another --logdir"
    )
    assert tiny.everything(shell.home) == before


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("evaluate --mem-len 3", "--logdir"),
        ("evaluate --logdir missing", "no run in missing: there is no such folder"),
        ("evaluate --logdir text", "no run in text: config.json is missing from it"),
        ("evaluate --logdir begun", "no checkpoint in begun/checkpoints/best; train first"),
        ("evaluate --logdir RUN --mem-len -1", "mem_len is -1; it has to be 0 or more"),
        ("evaluate --logdir RUN --tgt-len 0", "tgt_len is 0; it has to be at least 1"),
        ("evaluate --logdir RUN --batch 6", "batch is 6, which 4 devices cannot divide"),
        ("evaluate --logdir RUN --batch 0", "batch is 0, which"),
        ("evaluate --logdir RUN --mem-len 0 --same-length True", "same_length lets a query see"),
        ("evaluate --logdir RUN --split tset", "'tset'.*'--split'"),
        ("evaluate --logdir RUN --n-layer 3", "unknown option --n-layer"),
        ("generate --logdir missing", "no run in missing: there is no such folder"),
        ("generate --logdir text", "no run in text: config.json is missing from it"),
        ("generate --logdir begun", "no checkpoint in begun/checkpoints/best; train first"),
        ("generate --logdir RUN --prompt met€", "byte 0xE2 of '€' .* is not among"),
        ("generate --logdir RUN --tokens 0", "tokens is 0; it has to be at least 1"),
        ("generate --logdir RUN --top-p 0", "top_p is 0.0; it has to be above 0 and at most 1"),
        ("generate --logdir RUN --top-p 1.5", "top_p is 1.5"),
        ("generate --logdir RUN --top-k -1", r"top_k is -1; it has to be 0 \(all tokens\) or more"),
        ("generate --logdir RUN --temperature -1", "temperature is -1.0; it has to be 0 or more"),
        ("generate --logdir RUN --mem-len -1", "mem_len is -1; it has to be 0 or more"),
    ],
)
def test_a_model_is_not_used_where_it_cannot_be(shell, finished, refused, words, complaint):
    (shell.home / "begun").mkdir(exist_ok=True)
    for name in ("config.json", "vocab.json"):
        shutil.copy(finished / name, shell.home / "begun" / name)
    before = tiny.files(shell.home)
    assert_says(refused(*words.replace("RUN", LOGDIR).split()), complaint)
    assert tiny.files(shell.home) == before


def test_a_corpus_that_changed_is_noticed(copied, refused):
    for path in (copied.home / "text").iterdir():
        path.write_text(path.read_text("utf-8").replace("m", "M"), "utf-8")
    before = tiny.files(copied.home / LOGDIR)
    complaint = f"the corpus has changed since the run in {LOGDIR} began"
    assert refused("evaluate", "--logdir", LOGDIR, cwd=copied.home).startswith(complaint)
    assert tiny.files(copied.home / LOGDIR) == before
    assert copied.refused("train", *WORDS).startswith(complaint)
    after = tiny.files(copied.home / LOGDIR)
    assert after.pop("run.json") != before.pop("run.json")
    assert after == before


@pytest.fixture(scope="module")
def stopped(shell: Shell, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose run was stopped with two checkpoints in its folder."""
    home = tmp_path_factory.mktemp("stopped") / "home"
    shutil.copytree(shell.home / "text", home / "text")
    process = shell.start("train", *WORDS, "--checkpoint-minutes", "0", cwd=home)
    tiny.wait_for_step(process, home / LOGDIR, 28)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert len(checkpoints(home / LOGDIR)) == 2
    return home


def checkpoints(logdir: Path) -> list[Path]:
    """Checkpoints of a run, the newest last."""
    paths = (logdir / "checkpoints").glob("[0-9]*")
    return sorted(paths, key=lambda path: float(path.name))


def damage(path: Path) -> None:
    """Changes one bit in the middle of a checkpoint's largest file."""
    file = max(path.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_newest_whole_checkpoint_is_used_and_it_says_so(shell, stopped, finished, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(stopped, home)
    older, newer = checkpoints(home / LOGDIR)
    damage(newer)
    status, output, errors = shell.run("train", *WORDS, cwd=home)
    assert status == 0
    (line,) = errors.splitlines()
    assert line.startswith(f"checkpoint {newer.relative_to(home)} is damaged (whole/arrays/")
    assert line.endswith(f" has changed); going back to {older.name}")
    step, _, _ = older.name.partition(".")
    assert output.startswith(f"{LOGDIR}: goes on after step {step} of {STEPS} steps")
    tiny.same_run(home / LOGDIR, finished)


def test_without_a_whole_checkpoint_nothing_goes_on(shell, stopped, tmp_path, refused):
    home = tmp_path / "home"
    shutil.copytree(stopped, home)
    for path in checkpoints(home / LOGDIR):
        damage(path)
    before = tiny.files(home / LOGDIR)
    refusal = shell.refused("train", *WORDS, "--checkpoint-minutes", "0", cwd=home)
    assert refusal.startswith(f"no whole checkpoint in {LOGDIR}/checkpoints (newest: checkpoint ")
    after = tiny.files(home / LOGDIR)
    assert (
        json.loads(after.pop("run.json"))["starts"][:-1]
        == (json.loads(before.pop("run.json"))["starts"])
    )
    assert {name: after.get(name) for name in before} == before
    for module in ("evaluate", "generate"):
        refusal = refused(module, "--logdir", LOGDIR, "--checkpoint", "latest", cwd=home)
        assert refusal.startswith("no whole checkpoint in")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(shell, finished, tmp_path):
    """A limit on the size of files stands in for it: writing ends in the same way."""

    def refused_at(size: int, *words: str) -> str:
        process = shell.start("train", *WORDS, *words, cwd=tmp_path)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
        _, errors = process.communicate()
        return tiny.one_line(process.returncode, errors)

    shutil.copytree(shell.home / "text", tmp_path / "text")
    refusal = refused_at(100)
    assert_says(refusal, "cannot write token files to data: File too large; make room there")
    assert not (tmp_path / LOGDIR).exists()

    refusal = refused_at(20_000, "--checkpoint-minutes", "0")
    complaint = f"cannot write checkpoint {LOGDIR}/checkpoints/1.0: File too large; earlier"
    assert_says(refusal, complaint)
    assert checkpoints(tmp_path / LOGDIR) == []

    status, output, errors = shell.run("train", *WORDS, cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert output.startswith(f"{LOGDIR}: {STEPS} steps")
    tiny.same_run(tmp_path / LOGDIR, finished)


def on_a_disk_of(size: str, folder: Path) -> tuple[str, ...]:
    """Words before a command that sees a new disk at folder; one page of it is taken."""
    mount = 'mount -t tmpfs -o size="$0" tmpfs "$1" && echo >"$1/page" && shift && exec "$@"'
    words = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, size)
    folder.mkdir()
    if subprocess.run([*words, folder, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let its users mount a disk of their own")
    return (*words, str(folder))


@pytest.mark.parametrize(
    "size, complaint",
    [
        ("300k", "cannot write checkpoint disk/run/checkpoints/1.0: No space .*; earlier checkpoi"),
        ("4k", "cannot write the run's folder disk/run: No space left on device; take a --logdir"),
    ],
)
def test_a_disk_that_is_really_full_is_one_line(shell, tmp_path, size, complaint):
    shell = dataclasses.replace(shell, within=on_a_disk_of(size, tmp_path / "disk"))
    shutil.copytree(shell.home / "text", tmp_path / "text")
    words = (*WORDS, "--logdir", "disk/run", "--checkpoint-minutes", "0")
    assert_says(shell.refused("train", *words, cwd=tmp_path), complaint)
    assert (tmp_path / "data").exists() == (size != "4k")


def test_a_loss_that_is_not_finite_names_the_step_and_a_way_out(shell):
    words = (*WORDS, "--lr", "1e15", "--checkpoint-minutes", "0", "--logdir", "runs/diverged")
    status, output, errors = shell.run("train", *words)
    line = tiny.one_line(status, errors)
    found = re.fullmatch(
        r"the loss or its gradient is not finite at step (\d): try a lower --lr, a longer "
        r"--warmup-tokens or a smaller --clip with another --logdir "
        r"\(last checkpoint: step (\d)\)",
        line,
    )
    assert found, line
    assert output.count("\n") == 1, "the first line only: nothing after it was finite"
    step, saved = int(found[1]), int(found[2])
    assert 1 <= saved == step - 1 < tiny.LOG_EVERY
    logdir = shell.home / "runs" / "diverged"
    trained = load_trained(logdir, "latest", tiny.one_device())
    assert trained.step == saved
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.params))
    assert [entry["step"] for entry in tiny.metrics(logdir)] == [0]
