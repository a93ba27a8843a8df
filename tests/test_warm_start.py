"""Runs that start from others: what goes where, what is said about it, and what cannot be."""

import contextlib
import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import tiny
from tests.tiny import LOGDIR, WORDS, Shell
from txl_jax import preflight, run_folder, token_files, train
from txl_jax.checkpoint import Checkpoints
from txl_jax.checkpoint_leaves import by_name
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.model import abstract
from txl_jax.token_files import TokenFiles
from txl_jax.trained import CHECKPOINTS, VOCAB, load_trained
from txl_jax.vocab import BytesVocab, Vocab
from txl_jax.warm_start import load

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def tokens(shell: Shell) -> TokenFiles:
    with contextlib.chdir(shell.home):
        return token_files.prepare(tiny.CONFIG.data)


@pytest.fixture
def cfg(tokens: TokenFiles) -> Config:
    return preflight.with_vocabulary(tiny.CONFIG, tokens.vocab)


def changed(cfg: Config, **model: Any) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model))


def from_runs(cfg: Config, *folders: Path, freeze_below: int = 0) -> Config:
    fields = dict(zip(("init_from", "init_upper_from"), map(str, folders), strict=False))
    return dataclasses.replace(
        cfg,
        optim=dataclasses.replace(cfg.optim, freeze_below=freeze_below),
        train=dataclasses.replace(cfg.train, **fields),  # pyright: ignore[reportArgumentType]
    )


def random_params(cfg: Config, seed: int) -> Any:
    draw = np.random.default_rng(seed)
    shapes = abstract(cfg.model)[1]
    return jax.tree.map(lambda w: jax.numpy.asarray(draw.normal(size=w.shape), w.dtype), shapes)


def saved(folder: Path, cfg: Config, vocab: Vocab, seed: int) -> dict[str, np.ndarray]:
    """Makes `folder` that of a run with random parameters, which it returns by name."""
    params = random_params(cfg, seed)
    run_folder.open_run(folder, cfg, command=["made"], devices="none")
    vocab.save(folder / VOCAB)
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        checkpoints.save_best(10 * seed, {"params": params}, {"step": 10 * seed, "fingerprint": ""})
    return named(params)


def named(params: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in by_name(params).items()}


def started(cfg: Config, tokens: TokenFiles) -> tuple[dict[str, np.ndarray], str]:
    """First parameters of a run of `cfg`, by name, and what is said about them."""
    start = load(cfg, tiny.one_device(), tokens)
    assert start
    return named(start.params(random_params(cfg, seed=99))), start.report()


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def stack(own: dict[str, np.ndarray], *parts: tuple[dict[str, np.ndarray], slice]) -> Any:
    """Parameters whose layers are those of the parts in their order, and the rest `own`."""
    return {
        name: np.concatenate([part[name][which] for part, which in parts])
        if name.startswith("layers/")
        else leaf
        for name, leaf in own.items()
    }


def test_nothing_is_loaded_where_nothing_is_asked_for(cfg, tokens):
    assert load(cfg, tiny.one_device(), tokens) is None


def test_all_of_one_run(cfg, tokens, tmp_path):
    a = saved(tmp_path / "a", cfg, tokens.vocab, 1)
    other = changed(cfg, tgt_len=8, mem_len=5, clamp_len=3, dropout=0.5, dtype="bfloat16")
    found, report = started(from_runs(other, tmp_path / "a"), tokens)
    same(found, a)
    assert report.splitlines() == [
        f"starts from the parameters of {tmp_path}/a (best, step 10); optimizer state, step and "
        "memory are new",
        f"  embedding, output, r_r_bias, r_w_bias: of {tmp_path}/a",
        f"  layers 0 to 1: layers 0 to 1 of {tmp_path}/a",
    ]


def test_a_deeper_model_keeps_its_random_upper_layers(cfg, tokens, tmp_path):
    a = saved(tmp_path / "a", cfg, tokens.vocab, 1)
    deeper = changed(cfg, n_layer=3)
    found, report = started(from_runs(deeper, tmp_path / "a", freeze_below=2), tokens)
    random = named(random_params(deeper, seed=99))
    same(found, stack(a, (a, slice(0, 2)), (random, slice(2, 3))))
    assert report.splitlines()[2:] == [
        f"  layers 0 to 1: layers 0 to 1 of {tmp_path}/a",
        f"  layer 2: random, as {tmp_path}/a has only 2",
        "  layers 0 to 1: not trained (freeze_below 2)",
    ]


def test_a_shallower_model_leaves_upper_layers_out(cfg, tokens, tmp_path):
    a = saved(tmp_path / "a", cfg, tokens.vocab, 1)
    found, report = started(from_runs(changed(cfg, n_layer=1), tmp_path / "a"), tokens)
    same(found, stack(a, (a, slice(0, 1))))
    assert report.splitlines()[-1] == f"  not used: layer 1 of {tmp_path}/a"


def test_one_run_on_top_of_another(cfg, tokens, tmp_path):
    a = saved(tmp_path / "a", cfg, tokens.vocab, 1)
    # Nothing but the layers of the upper run is used: it may have another vocabulary.
    upper = changed(cfg, n_layer=3, n_token=5, d_embed=4, tie_weight=False)
    b = saved(tmp_path / "b", upper, BytesVocab(b"abcde"), 2)
    both = from_runs(changed(cfg, n_layer=5), tmp_path / "a", tmp_path / "b")
    found, report = started(both, tokens)
    same(found, stack(a, (a, slice(0, 2)), (b, slice(0, 3))))
    assert report.splitlines() == [
        f"starts from the parameters of {tmp_path}/a (best, step 10) and {tmp_path}/b (best, step "
        "20); optimizer state, step and memory are new",
        f"  embedding, output, r_r_bias, r_w_bias: of {tmp_path}/a",
        f"  layers 0 to 1: layers 0 to 1 of {tmp_path}/a",
        f"  layers 2 to 4: layers 0 to 2 of {tmp_path}/b",
        f"  not used: embedding, output, r_r_bias, r_w_bias of {tmp_path}/b",
    ]


def test_the_lowest_layers_of_a_run_changed_for_those_of_another(cfg, tokens, tmp_path):
    """The fork's chimera: every layer keeps its place."""
    a = saved(tmp_path / "a", cfg, tokens.vocab, 1)
    b = saved(tmp_path / "b", changed(cfg, n_layer=4), tokens.vocab, 2)
    both = from_runs(changed(cfg, n_layer=4), tmp_path / "a", tmp_path / "b")
    found, report = started(both, tokens)
    same(found, stack(a, (a, slice(0, 2)), (b, slice(2, 4))))
    unused = "layers 0 to 1, embedding, output, r_r_bias, r_w_bias"
    assert f"  not used: {unused} of {tmp_path}/b" in report.splitlines()


def test_shared_biases_become_each_layers_own(cfg, tokens, tmp_path):
    a = saved(tmp_path / "a", cfg, tokens.vocab, 1)
    b = saved(tmp_path / "b", changed(cfg, untie_r=True, n_layer=3), tokens.vocab, 2)
    both = from_runs(changed(cfg, untie_r=True, n_layer=4), tmp_path / "a", tmp_path / "b")
    found, report = started(both, tokens)
    expected = stack(a, (a, slice(0, 2)), (b, slice(1, 3)))
    for bias in ("r_w_bias", "r_r_bias"):
        expected[bias] = np.stack([a[bias], a[bias], b[bias][1], b[bias][2]])
    same(found, expected)
    copies = "each with a copy of the biases that they shared"
    assert report.splitlines()[1:] == [
        f"  embedding, output: of {tmp_path}/a",
        f"  layers 0 to 1: layers 0 to 1 of {tmp_path}/a, {copies}",
        f"  layers 2 to 3: layers 1 to 2 of {tmp_path}/b",
        f"  not used: layer 0, embedding, output of {tmp_path}/b",
    ]


@pytest.mark.parametrize(
    "lower, upper, here, complaint",
    [
        (
            {"d_inner": 48},
            None,
            {},
            r"a: layers/b_in has shape \(2, 48\), expected \(2, 32\); layers/w_in has shape "
            r"\(2, 16, 48\), expected \(2, 16, 32\); layers/w_out has shape \(2, 48, 16\), "
            r"expected \(2, 32, 16\)$",
        ),
        ({}, {"n_head": 4}, {"n_layer": 4}, r"b: layers/w_kv has shape \(2, 16, 2, 4, 8\), exp"),
        ({"tie_weight": False}, None, {}, "a: output/tables/0 is not part of this model$"),
        ({}, None, {"tie_weight": False}, "a: output/tables/0 is missing from it$"),
        ({"untie_r": True}, None, {}, r"r_w_bias has shape \(2, 2, 8\), expected \(2, 8\)"),
        ({}, None, {"pre_lnorm": True}, "a: pre_lnorm is False there and True here$"),
        ({}, {}, {}, "a has all 2 layers of this model, .* those of .*b: set n_layer to 4 to"),
        ({}, {"n_layer": 1}, {"n_layer": 4}, "a has 2 layers and .*b has 1, too few for the 4 of"),
    ],
)
def test_what_does_not_fit_is_named(cfg, tokens, tmp_path, lower, upper, here, complaint):
    folders = [tmp_path / "a"]
    saved(folders[0], changed(cfg, **lower), tokens.vocab, 1)
    if upper is not None:
        folders.append(tmp_path / "b")
        saved(folders[1], changed(cfg, **upper), tokens.vocab, 2)
    with pytest.raises(UserError, match=complaint) as refused:
        load(from_runs(changed(cfg, **here), *folders), tiny.one_device(), tokens)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda v: v[:-1], r"\(19 tokens there, 20 here\); take a run"),
        (
            lambda v: bytes([0, *v[1:]]),
            r"\(20 tokens there, 20 here; token 0 is b'\\x00' there, b'\\n' here\); take a run",
        ),
    ],
)
def test_tokens_have_to_have_the_same_ids(cfg, tokens, tmp_path, change, complaint):
    vocab = BytesVocab(change(tokens.vocab.values))
    saved(tmp_path / "a", changed(cfg, n_token=len(vocab)), vocab, 1)
    with pytest.raises(UserError, match="a: its vocabulary is another one " + complaint):
        load(from_runs(cfg, tmp_path / "a"), tiny.one_device(), tokens)


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--init-upper-from runs/x", "init_upper_from is given and init_from is not"),
        ("--init-from runs/x", "no run in runs/x: there is no such folder"),
        ("--init-from text", "no run in text: config.json is missing from it"),
        (f"--init-from {LOGDIR} --init-upper-from runs/x", "no run in runs/x: there is no such"),
        (f"--init-from {LOGDIR} --d-inner 8", rf"cannot start from {LOGDIR}: layers/b_in has shap"),
    ],
)
def test_a_run_refuses_before_it_writes(shell, finished, monkeypatch, words, complaint):
    monkeypatch.chdir(shell.home)
    before = tiny.files(shell.home)
    with pytest.raises(UserError, match=complaint):
        train.main([*WORDS, *words.split(), "--logdir", "runs/new"])
    assert tiny.files(shell.home) == before


@pytest.mark.slow
def test_the_same_command_goes_on_without_starting_again(shell, finished, monkeypatch, capsys):
    """Also when the run that it started from is gone."""
    monkeypatch.chdir(shell.home)
    shutil.copytree(finished, "runs/source")
    source = load_trained(Path("runs/source"), "best", tiny.one_device())
    lower = {name: np.array(leaf[0]) for name, leaf in by_name(source.params["layers"]).items()}
    words = [*WORDS, *("--max-tokens", str(8 * tiny.BATCH * tiny.TGT_LEN))]
    words += ["--init-from", "runs/source", "--freeze-below", "1"]
    assert train.main([*words, "--logdir", "runs/whole"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("starts from the parameters of runs/source (best, step ")
    assert "\n  layer 0: not trained (freeze_below 1)\n" in said
    assert run_folder.read_config(Path("runs/whole")).train.init_from == "runs/source"

    tiny.stop_after(3, monkeypatch)
    assert train.main([*words, "--logdir", "runs/parts"]) == 128 + signal.SIGTERM
    assert "starts from the parameters" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(shell.home)
    shutil.rmtree("runs/source")
    assert train.main([*words, "--logdir", "runs/parts"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("runs/parts: goes on after step 3 of 8 steps")
    assert "starts from" not in said
    tiny.same_run(Path("runs/parts"), Path("runs/whole"))
    trained = load_trained(Path("runs/parts"), "latest", tiny.one_device())
    for name, leaf in by_name(trained.params["layers"]).items():
        np.testing.assert_array_equal(leaf[0], lower[name], err_msg=name)
