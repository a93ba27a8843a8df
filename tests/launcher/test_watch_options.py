"""The words of `launcher watch`, as far as nobody looks after anything yet."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import __main__, record
from launcher.aws import Account
from launcher.commands import watch
from launcher.verdict import Limits
from tests import tiny
from tests.launcher.looks import BUCKET, NAME, some_record
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]


@pytest.fixture
def launched(aws, account: Account) -> None:
    aws.client("s3").create_bucket(Bucket=BUCKET)
    known = dataclasses.replace(some_record(), owner=account.caller)
    record.write(account, BUCKET, NAME, known, "")


@pytest.fixture
def hosted(launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had hosts."""
    monkeypatch.setattr(watch, "check", lambda *_: None)


@pytest.mark.parametrize("words", [[], ["--detach"]])
def test_a_run_without_hosts_is_refused_before_anything_begins(words, launched):
    with pytest.raises(UserError, match="EC2 knows no host of this run any more"):
        __main__.main(["watch", NAME, *words])


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("--preemptions=-1", "--preemptions is -1; it has to be 0 or more"),
        ("--failures=-3", "--failures is -3; it has to be 0 or more"),
        ("--max-cost=0", "--max-cost is 0; it has to be above 0, in US dollars"),
        ("--max-cost=-2.5", "--max-cost is -2.5; it has to be above 0, in US dollars"),
        ("--max-cost=nan", "--max-cost is nan; it has to be above 0, in US dollars"),
        ("--max-hourly-cost=inf", "--max-hourly-cost is inf; it has to be above 0, in US dollars"),
        ("--max-hourly-cost=0", "--max-hourly-cost is 0; it has to be above 0, in US dollars"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_before_anybody_is_asked(word, complaint):
    with pytest.raises(UserError) as error:
        __main__.main(["watch", NAME, word])
    assert str(error.value) == complaint


@pytest.mark.parametrize("word", ["--preemptions=many", "--failures=1.5", "--max-cost=$5", "--max"])
def test_what_is_no_number_or_no_option_is_refused(word):
    with pytest.raises(UserError) as error:
        __main__.main(["watch", NAME, word])
    assert "\n" not in str(error.value)


def test_a_refusal_is_one_line_and_status_2():
    words = [sys.executable, "-m", "launcher", "watch", NAME, "--max-cost=0"]
    done = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True)
    assert tiny.one_line(done.returncode, done.stderr).startswith("--max-cost is 0")
    assert done.stdout == ""


def test_the_words_become_limits(monkeypatch, hosted):
    given = []
    monkeypatch.setattr(watch, "watch", lambda *words: given.append(words[3]) or 0)
    assert __main__.main(["watch", NAME]) == 0
    words = ("--preemptions=0", "--failures=7", "--max-hourly-cost=3.5", "--max-cost=100")
    assert __main__.main(["watch", NAME, *words]) == 0
    assert given == [Limits(), Limits(0, 7, 3.5, 100.0)]


def test_a_name_that_no_run_can_have_is_refused(aws):
    with pytest.raises(UserError, match=r"'\.\./a' cannot be the name of a run"):
        __main__.main(["watch", "../a"])


def test_a_run_that_was_never_launched_is_not_looked_after(launched):
    with pytest.raises(UserError, match=rf"s3://{BUCKET} knows of no launch of a run tria: `"):
        __main__.main(["watch", "tria"])


def test_a_run_of_somebody_else_is_not_looked_after(account, launched):
    known, version = record.read(account, BUCKET, NAME)
    assert known
    others = dataclasses.replace(known, owner="arn:aws:iam::1:user/\x1b[2Jbob")
    record.write(account, BUCKET, NAME, others, version)
    with pytest.raises(UserError, match="hosts that you rent would not be that person's") as error:
        __main__.main(["watch", NAME])
    assert str(error.value).isprintable()


def test_a_run_without_hosts_is_not_looked_after(launched):
    with pytest.raises(UserError, match="EC2 knows no host of this run any more"):
        __main__.main(["watch", NAME])


def test_ctrl_c_says_that_the_run_goes_on(monkeypatch, capsys, hosted):
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        __main__.main(["watch", NAME])
    said = capsys.readouterr().out
    assert said == f"{NAME} goes on as it is, and this watcher looks after it no more\n"


@pytest.fixture
def tmux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in; the file has the words that it was called with."""
    path, words = tmp_path / "tmux", tmp_path / "words"
    path.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >>{words}\n'
        f'[ "$3" != has-session ] || [ -e {tmp_path}/session ]\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return words


def typed(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["launcher", *words])
    return __main__.main(list(words))


def test_detached_the_same_words_are_typed_in_tmux(tmux, monkeypatch, capsys, hosted):
    words = ("watch", NAME, "--detach", "--max-cost=5", "--private-ip")
    assert typed(*words, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert said == f"looking after {NAME} in tmux: `tmux -L txl-watch-{NAME} attach`\n"
    assert tmux.read_text().splitlines() == [
        *("-L", f"txl-watch-{NAME}", "has-session"),
        *("-L", f"txl-watch-{NAME}", "new-session", "-d"),
        f"{sys.executable} -m launcher watch {NAME} --max-cost=5 --private-ip; echo status $?; "
        "exec sh",
    ]


def test_words_reach_tmuxs_shell_as_they_are(tmux, monkeypatch, hosted):
    words = ("watch", NAME, "--detach", f"--bucket={BUCKET}", "--region", "us-east-1")
    monkeypatch.setattr(sys, "executable", "/a b/$(touch pwned)/python")
    assert typed(*words, monkeypatch=monkeypatch) == 0
    assert (
        tmux.read_text()
        .splitlines()[-1]
        .startswith(
            f"'/a b/$(touch pwned)/python' -m launcher watch {NAME} --bucket={BUCKET} --region "
        )
    )


def test_a_run_that_is_looked_after_in_tmux_already_is_not_twice(tmux, monkeypatch, hosted):
    (tmux.parent / "session").touch()
    with pytest.raises(UserError, match=r"looked after in tmux already: `tmux -L .* attach` shows"):
        typed("watch", NAME, "--detach", monkeypatch=monkeypatch)
    assert "new-session" not in tmux.read_text()


def test_without_tmux_it_says_what_to_do(monkeypatch, tmp_path, hosted):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install it, or leave --detach out"):
        typed("watch", NAME, "--detach", monkeypatch=monkeypatch)


def test_what_cannot_be_looked_after_is_refused_before_tmux_is_started(tmux, monkeypatch, launched):
    for words in (("watch", "other", "--detach"), ("watch", NAME, "--detach", "--failures=-1")):
        with pytest.raises(UserError):
            typed(*words, monkeypatch=monkeypatch)
    assert not tmux.exists()


def test_help_tells_of_budgets_and_of_what_goes_on(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["watch", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--max-cost", "--max-hourly-cost", "--preemptions", "--failures", "--detach"):
        assert words in text
    assert "run trains on" in text
