import dataclasses
import io
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.tiny import LOGDIR
from txl_jax import generate, results, token_files
from txl_jax.beam import BeamSearch
from txl_jax.config import ModelConfig
from txl_jax.decoding import Beam, Sampling
from txl_jax.documents import END
from txl_jax.errors import UserError
from txl_jax.generator import Generator
from txl_jax.stops import StopStrings
from txl_jax.trained import Trained, load_trained

pytest_plugins = ["tests.tiny_runs"]

GREEDY = Sampling(temperature=0)


def drawn(
    trained: Trained, prompt: bytes, n: int, seed: int, sampling: Sampling, samples: int = 1
) -> np.ndarray:
    """Tokens [samples, n] that the command has to write, by the generator in this process."""
    generator = Generator(trained.cfg.model, tiny.one_device(), sampling, samples)
    parts = generator(trained.params, trained.vocab.encode(prompt), seed, n)
    return np.concatenate([part.tokens for part in parts], axis=1)


def written(trained: Trained, *args, **options) -> bytes:
    """The text of the first sample."""
    return trained.vocab.decode(drawn(trained, *args, **options)[0])


@pytest.fixture(scope="module")
def trained(finished: Path, compiled: None) -> Trained:
    return load_trained(finished, "best", tiny.one_device())


def test_the_command_writes_what_the_generator_draws(shell, trained):
    words = ("--logdir", LOGDIR, "--prompt", "a naïve", "--tokens", "150", "--seed", "3")
    status, output, errors = shell.run("generate", *words, "--top-k", "9", "--temperature", "2")
    expected = written(trained, "a naïve".encode(), 150, 3, Sampling(temperature=2, top_k=9))
    text = expected.decode("utf-8", "replace")
    assert status == 0
    assert re.search("[ïçñü]", text), "whole characters of two bytes should be in it"
    assert "\N{REPLACEMENT CHARACTER}" in text, "and halves of them"
    assert output == f"a naïve{text}\n"
    assert re.fullmatch(r"150 tokens, \d+ tokens/s\n", errors)


def test_the_sample_of_a_run_goes_on_after_the_beginning_of_valid(trained, finished, shell):
    data = dataclasses.replace(
        tiny.CONFIG.data, text_dir=f"{shell.home}/text", data_dir=f"{shell.home}/data"
    )
    valid = token_files.prepare(data).splits["valid"]
    prompt = trained.vocab.decode(valid[: tiny.TGT_LEN + 1])  # mem_len is as long
    told = json.loads((finished / results.FILE).read_text())["sample"]
    assert told == written(trained, prompt, 400, 0, Sampling(0.8)).decode(errors="replace")


def test_where_memory_is_no_whole_number_of_segments_the_sample_has_a_longer_context():
    for mem_len, length in ((0, 5), (3, 5), (4, 5), (5, 9), (100, 20)):
        cfg = ModelConfig(n_token=30, tgt_len=4, mem_len=mem_len)
        assert results.context_of(cfg, np.arange(20, dtype=np.uint8)).tolist() == [*range(length)]


def test_a_prompt_may_end_inside_a_character(shell, trained):
    prompt = "señor na".encode() + b"\xc3"
    words = ("--logdir", LOGDIR, "--tokens", "40", "--temperature", "0", "--prompt", prompt)
    status, output, errors = shell.run("generate", *words)
    assert status == 0, errors
    expected = prompt + written(trained, prompt, 40, 0, GREEDY)
    assert output == expected.decode("utf-8", "replace") + "\n"
    assert output.startswith("señor naï")


class Watched(io.StringIO):
    """Notes what a reader has seen whenever something becomes visible."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def flush(self) -> None:
        self.seen.append(self.getvalue())


def test_text_appears_as_it_is_written(shell, trained, monkeypatch, capsys):
    """Without a prompt, it begins a document."""
    monkeypatch.chdir(shell.home)
    output = Watched()
    monkeypatch.setattr(sys, "stdout", output)
    generate.main(["--logdir", LOGDIR, "--tokens", "30", "--temperature", "0"])
    text = written(trained, END, 30, 0, GREEDY).decode("utf-8", "replace")
    assert output.getvalue() == f"{text}\n"
    whole = text.rstrip("\ufffd")  # the last byte may begin a character
    assert {whole[:n] for n in range(len(whole) + 1)} <= set(output.seen)


def test_ctrl_c_ends_it(shell, finished):
    words = ("--logdir", LOGDIR, "--prompt", "met a ", "--tokens", "100000000")
    process = shell.start("generate", *words)
    assert process.stdout
    assert process.stdout.read(50).startswith("met a ")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors.strip()) == (128 + signal.SIGINT, "")


def test_a_closed_pipe_ends_it_quietly(shell, finished):
    words = ("--logdir", LOGDIR, "--prompt", "met a ", "--tokens", "100000000")
    process = shell.start("generate", *words)
    with process:
        assert process.stdout and process.stderr
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.fixture
def command(shell, trained, monkeypatch, capsys):
    """Runs the command in this process; gives what it prints, and on standard error."""
    monkeypatch.chdir(shell.home)

    def run(*words: str) -> tuple[str, str]:
        generate.main(["--logdir", LOGDIR, *words])
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def three(trained) -> list[str]:
    """Three samples of forty tokens."""
    tokens = drawn(trained, b"met ", 40, 5, Sampling(), samples=3)
    return [trained.vocab.decode(row).decode("utf-8", "replace") for row in tokens]


def test_several_samples_stand_under_headings(command, three):
    output, errors = command(
        *("--prompt", "met ", "--tokens", "40", "--seed", "5", "--samples", "3")
    )
    headings = [f"--- sample {number} of 3 (length) ---" for number in (1, 2, 3)]
    shown = [f"{heading}\nmet {text}\n" for heading, text in zip(headings, three, strict=True)]
    assert output == "".join(shown)
    assert re.fullmatch(r"120 tokens, \d+ tokens/s\n", errors)


def test_json_has_a_line_for_each_sample_and_says_why_it_ended(command, trained, three):
    """Two strings end the first two samples, one of them inside what was drawn at once."""
    stops = three[0][5:8], three[1][21:25]
    output, _ = command(
        *("--prompt", "met ", "--tokens", "40", "--seed", "5", "--samples", "3", "--json"),
        *(word for stop in stops for word in ("--stop", stop)),
    )
    lines = sorted((json.loads(line) for line in output.splitlines()), key=lambda x: x["sample"])
    assert [line["sample"] for line in lines] == [1, 2, 3]
    reasons = []
    for line, text in zip(lines, three, strict=True):
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        end = min(ends, default=len(text))
        (stop,) = [s for s in stops if ends and text[:end].endswith(s)] or [""]
        assert line["text"] == text[: end - len(stop)]
        whole = trained.vocab.decode(line["tokens"]).decode("utf-8", "replace")
        assert whole == text[:end], "the tokens of the stop string are there"
        assert line["reason"] == ("stop" if stop else "length")
        assert -6 * len(line["tokens"]) < line["log_prob"] < 0
        reasons.append(line["reason"])
    assert reasons[:2] == ["stop", "stop"]


def test_what_is_shown_at_once_ends_before_a_stop_string(command, three, monkeypatch):
    stop = three[0][10:14]
    before = three[0][: three[0].index(stop)]
    output = Watched()
    monkeypatch.setattr(sys, "stdout", output)
    words = ("--prompt", "met ", "--tokens", "40", "--seed", "5", "--stop", stop)
    generate.main(["--logdir", LOGDIR, *words])
    assert output.getvalue() == f"met {before}\n"
    assert all(f"met {before}\n".startswith(seen) for seen in output.seen)
    assert len(set(output.seen)) > 5


def test_a_prompt_from_a_file_or_standard_input(shell, command, trained, tmp_path, monkeypatch):
    """Its last newline is part of it."""
    (tmp_path / "prompt.txt").write_bytes("señor\n".encode())
    words = ("--tokens", "20", "--temperature", "0")
    expected = written(trained, "señor\n".encode(), 20, 0, GREEDY).decode("utf-8", "replace")
    for file in (str(tmp_path / "prompt.txt"), "-"):
        stdin = io.TextIOWrapper(io.BytesIO("señor\n".encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        output, _ = command("--prompt-file", file, *words)
        assert output == f"señor\n{expected}\n"


def test_beam_search_prints_what_it_finds_with_scores(command, trained):
    words = ("--prompt", "met ", "--tokens", "20", "--stop", "r ", "--beam", "4", "--groups", "2")
    table = StopStrings([b"r "]).table(trained.vocab)
    search = BeamSearch(trained.cfg.model, tiny.one_device(), Beam(4, 2), table)
    found = search(trained.params, trained.vocab.encode(b"met "), 20)
    assert {h.reason for h in found} == {"stop", "length"}, "both should be seen here"
    output, errors = command(*words)
    expected, facts = "", []
    for number, h in enumerate(found, 1):
        text = trained.vocab.decode(h.tokens).decode("utf-8", "replace")
        text = text.split("r ")[0]
        expected += (
            f"--- hypothesis {number} of 4, group {h.group}, {h.score:.4f} for each token "
            f"({h.reason}) ---\nmet {text}\n"
        )
        facts.append(
            {"hypothesis": number, "score": h.score, "tokens": h.tokens, "log_prob": h.log_prob}
            | {"reason": h.reason, "group": h.group, "text": text}
        )
    assert (output, errors) == (expected, "")
    output, _ = command(*words, "--json")
    assert [json.loads(line) for line in output.splitlines()] == facts


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--samples 0", "samples is 0; it has to be at least 1"),
        ("--tokens 0", "tokens is 0; it has to be at least 1"),
        ("--prompt met --prompt-file text/000.txt", "--prompt and --prompt-file both give a"),
        ("--prompt-file missing.txt", "cannot read the prompt from missing.txt: No such file"),
        ("--prompt-file text", "cannot read the prompt from text: Is a directory"),
        ("--repetition-penalty -1", "repetition_penalty is -1.0; it has to be above 0"),
        ("--no-repeat-ngram -1", "no_repeat_ngram is -1"),
        ("--no-repeat-ngram 9 --repeat-window 8", "repeat_window is 8; it has to be at least 9"),
        ("--stop=", "a stop string is empty"),
        ("--beam -1", "beam is -1"),
        ("--groups 2", "groups divide a beam, and there is none; add --beam"),
        ("--beam 4 --groups 3", "beam is 4, which 3 groups cannot divide; use a multiple of 3"),
        ("--beam 4 --diversity -1", "diversity is -1.0"),
        ("--beam 4 --temperature 0.5", "temperature is 0.5, which is for drawing samples, and"),
        ("--beam 4 --top-k 5", "top_k is 5, which is for drawing samples"),
        ("--beam 4 --top-p 0.9", "top_p is 0.9, which is for drawing samples"),
        ("--beam 4 --repetition-penalty 1.2", "repetition_penalty is 1.2, which is for drawing"),
        ("--beam 4 --samples 2", "samples is 2, which is for drawing samples"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_read(
    shell, monkeypatch, capsys, words, complaint
):
    """There is no run in this folder, and that is not what is complained about."""
    monkeypatch.chdir(shell.home)
    with pytest.raises(UserError, match=re.escape(complaint)) as refused:
        generate.main(["--logdir", "nowhere", *words.split()])
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""
