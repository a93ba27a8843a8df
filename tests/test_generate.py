import dataclasses
import io
import itertools
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.tiny import LOGDIR
from txl_jax import generate
from txl_jax.config import ModelConfig
from txl_jax.corpora import END
from txl_jax.generate import Generator, Sampling, sample
from txl_jax.model import TransformerXL, abstract
from txl_jax.trained import Trained, load_trained

pytest_plugins = ["tests.tiny_runs"]

MODEL = ModelConfig(
    **{"n_token": 50, "n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
    **{"tgt_len": 6, "mem_len": 64, "tie_weight": False},
)
GREEDY = Sampling(temperature=0)
PROMPT = np.asarray([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32, 3, 8, 46, 2, 6], np.uint8)


@pytest.fixture(scope="module")
def params(compiled: None):
    """Weights so large that what the model says next depends on all that it has read."""
    initial = nnx.to_pure_dict(nnx.state(TransformerXL(MODEL, rngs=nnx.Rngs(1))))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "norm" in jax.tree_util.keystr(path) else 30 * leaf, initial
    )


def continued(
    params, sampling: Sampling, prompt: np.ndarray = PROMPT, seed: int = 0, **changes
) -> list[int]:
    """The first 30 tokens with which a generator continues `prompt`."""
    cfg = dataclasses.replace(MODEL, **changes)
    generator = Generator(cfg, tiny.one_device(), sampling)
    return list(itertools.islice(generator(params, prompt, seed), 30))


@pytest.fixture(scope="module")
def recomputed(params) -> Callable[[np.ndarray], list[int]]:
    """The same, greedy and without memory: all of the text is read again for each token."""
    xl = nnx.merge(abstract(dataclasses.replace(MODEL, mem_len=0))[0], params)

    @jax.jit
    def likeliest(text: jax.Array) -> jax.Array:
        hidden, _ = xl.hidden(text, xl.init_memory(1))
        return xl.log_probs(hidden)[0].argmax(-1)

    def continued(prompt: np.ndarray) -> list[int]:
        text = prompt.tolist()
        for _ in range(30):
            padded = np.zeros((1, MODEL.mem_len), np.int32)  # what comes later is not seen
            padded[0, : len(text)] = text
            text.append(int(likeliest(jnp.asarray(padded))[len(text) - 1]))
        return text[len(prompt) :]

    return continued


@pytest.mark.parametrize("length", [1, 5, 6, 7, 13, 20])
def test_greedy_through_memory_equals_greedy_by_full_recomputation(params, recomputed, length):
    expected = recomputed(PROMPT[:length])
    assert len(set(expected)) > 5, "a text that repeats itself would show little"
    assert continued(params, GREEDY, PROMPT[:length]) == expected


def test_a_prompt_in_segments_is_read_as_in_one_go(params):
    """Six tokens at a time, nineteen at once, or each on its own."""
    for sampling in (GREEDY, Sampling()):
        first, *others = (
            continued(params, sampling, tgt_len=tgt_len) for tgt_len in (6, len(PROMPT) - 1, 1)
        )
        assert others == [first, first]
    assert continued(params, GREEDY, PROMPT[1:]) != continued(params, GREEDY)


def test_memory_as_short_as_it_is_given(params):
    """Without memory the last token alone decides, and with it those before it."""
    alone = continued(params, GREEDY, mem_len=0)
    assert alone == continued(params, GREEDY, PROMPT[-1:], mem_len=0)
    assert alone != continued(params, GREEDY)
    following = dict(itertools.pairwise([int(PROMPT[-1]), *alone]))
    assert all(following[a] == b for a, b in itertools.pairwise(alone))


def test_a_seed_fixes_the_text(params):
    texts = [continued(params, Sampling(), seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3
    assert len(set(texts[0])) > 5


def test_the_narrowest_choice_is_the_greedy_one(params):
    greedy = continued(params, GREEDY)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(1.5, top_k=1, top_p=0.5)):
        assert continued(params, sampling, seed=7) == greedy


LOGITS = np.log(np.asarray([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)) + 3


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(temperature=0.5), np.square([0.1, 0.4, 0.05, 0.3, 0.15]) / 0.285),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=5), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_k=9), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_p=0.39), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.41), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.8), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (Sampling(top_p=0.99), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=0.5, top_p=0.57), [0, 16 / 25, 0, 9 / 25, 0]),
    ],
    ids=str,
)
def test_tokens_are_as_frequent_as_they_are_probable(sampling, expected):
    n = 20_000
    draw = jax.jit(jax.vmap(lambda key: sample(jnp.asarray(LOGITS), sampling, key)))
    tokens = draw(jax.random.split(jax.random.key(0), n))
    assert tokens.dtype == jnp.int32
    frequency = np.bincount(tokens, minlength=5) / n
    probability = np.asarray(expected)
    deviation = np.sqrt(probability * (1 - probability) / n)
    assert (np.abs(frequency - probability) <= 4 * deviation).all(), frequency


def drawn(trained: Trained, prompt: bytes, n: int, seed: int, sampling: Sampling) -> bytes:
    """What the command has to write, by the generator in this process."""
    generator = Generator(trained.cfg.model, tiny.one_device(), sampling)
    tokens = generator(trained.params, trained.vocab.encode(prompt), seed)
    return trained.vocab.decode(list(itertools.islice(tokens, n)))


@pytest.fixture(scope="module")
def trained(finished: Path, compiled: None) -> Trained:
    return load_trained(finished, "best", tiny.one_device())


def test_the_command_writes_what_the_generator_draws(shell, trained):
    words = ("--logdir", LOGDIR, "--prompt", "a naïve", "--tokens", "150", "--seed", "3")
    status, output, errors = shell.run("generate", *words, "--top-k", "9", "--temperature", "2")
    expected = drawn(trained, "a naïve".encode(), 150, 3, Sampling(temperature=2, top_k=9))
    text = expected.decode("utf-8", "replace")
    assert status == 0
    assert re.search("[ïçñü]", text), "whole characters of two bytes should be in it"
    assert "\N{REPLACEMENT CHARACTER}" in text, "and halves of them"
    assert output == f"a naïve{text}\n"
    assert re.fullmatch(r"150 tokens, \d+ tokens/s\n", errors)


def test_a_prompt_may_end_inside_a_character(shell, trained):
    prompt = "señor na".encode() + b"\xc3"
    words = ("--logdir", LOGDIR, "--tokens", "40", "--temperature", "0", "--prompt", prompt)
    status, output, errors = shell.run("generate", *words)
    assert status == 0, errors
    expected = prompt + drawn(trained, prompt, 40, 0, GREEDY)
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
    text = drawn(trained, END, 30, 0, GREEDY).decode("utf-8", "replace")
    assert output.getvalue() == f"{text}\n"
    assert {text[:n] for n in range(len(text) + 1)} <= set(output.seen)


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
