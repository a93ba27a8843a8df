"""Weights of other programs become the folder of a run, and go back to the original."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny import files, one_device
from txl_jax import evaluate, foreign, generate, interop, token_files, torch_files, train, vocab
from txl_jax.config import DataConfig
from txl_jax.errors import UserError
from txl_jax.model import Memory, TransformerXL, abstract
from txl_jax.trained import Trained, load_trained

WEIGHTS = Path(__file__).parent / "weights"
WORDS = ["--vocabulary", str(WEIGHTS / "original_words.txt")]
STATE = str(WEIGHTS / "original_state_zip.pt")
MODULE = str(WEIGHTS / "original_module_zip.pt")
HUGGING_FACE = WEIGHTS / "hugging_face"
AS_IN_THE_MODULE = ["--tgt-len=6", "--mem-len=7", "--clamp-len=9", "--pre-lnorm=True"]
ALL = {
    "original_module_legacy.pt": ("original.npz", WORDS),
    "original_state_zip.pt": ("original.npz", WORDS + AS_IN_THE_MODULE),
    "nvidia.pt": ("nvidia.npz", []),
    "hugging_face": ("hugging_face/expected.npz", ["--tgt-len=6"]),
    "hugging_face_other": ("hugging_face_other/expected.npz", ["--tgt-len=6"]),
}


def imported(weights: str | Path, logdir: Path, *words: str) -> Trained:
    interop.main(["import", str(weights), "--logdir", str(logdir), *words])
    return load_trained(logdir, "best", one_device())


QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}


def losses(trained: Trained, expected: Any) -> tuple[np.ndarray, np.ndarray]:
    """Loss [segment, stream, token] of the tokens of a file, memory carried along.

    Also that of the first segment where memory begins in the other way (`zero_memory`).
    """
    cfg = trained.cfg.model
    graphdef, tgt_len = abstract(cfg)[0], cfg.tgt_len

    @partial(jax.jit, compiler_options=QUICKLY)
    def segment(params: Any, inputs: jax.Array, targets: jax.Array, memory: Memory) -> Any:
        xl: TransformerXL = nnx.merge(graphdef, params)
        return xl(inputs, targets, memory)

    tokens, found = expected["tokens"].astype(np.int32), []
    empty = memory = Memory.empty(cfg, tokens.shape[0])
    for i in range(len(expected["loss"])):
        part = tokens[:, i * tgt_len : (i + 1) * tgt_len + 1]
        loss, memory = segment(trained.params, part[:, :-1], part[:, 1:], memory)
        found.append(np.asarray(loss))
    part, filled = tokens[:, : tgt_len + 1], 0 if cfg.zero_memory else cfg.mem_len
    memory = empty._replace(filled=jnp.full_like(empty.filled, filled))
    other, _ = segment(trained.params, part[:, :-1], part[:, 1:], memory)
    return np.asarray(found), np.asarray(other)


def refusal(tmp_path: Path, weights: str | Path, *words: str) -> str:
    """Why weights are not imported; nothing is written."""
    with pytest.raises(UserError) as raised:
        interop.main(["import", str(weights), "--logdir", str(tmp_path / "refused"), *words])
    assert not (tmp_path / "refused").exists()
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ALL)
def test_losses_are_those_of_the_program_that_made_the_weights(name, tmp_path):
    expected_file, words = ALL[name]
    trained = imported(WEIGHTS / name, tmp_path / "run", *words)
    expected = np.load(WEIGHTS / expected_file)
    found, other = losses(trained, expected)
    np.testing.assert_allclose(found, expected["loss"], rtol=0, atol=2e-5)
    # Memory begins as that program's does; otherwise there would be a difference.
    assert trained.cfg.model.zero_memory == name.startswith("hugging_face")
    assert np.abs(other - expected["loss"][0]).max() > 1e-3


@pytest.mark.parametrize(
    "name",
    ["original_module_legacy.pt", pytest.param("hugging_face_other", marks=pytest.mark.slow)],
)
def test_the_commands_work_on_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(120):
        (tmp_path / "text" / f"{number}.txt").write_text("some words are all it takes\n" * 9)
    text = b"some words are all it takes\n\f"
    size = 30 if name.startswith("original") else 40
    values = [*dict.fromkeys(text), *range(128, 256)][:size]
    vocab.BytesVocab(bytes(values)).save(Path("vocab.json"))
    words = ["--dataset", "text", "--text-dir", "text", "--vocabulary", "vocab.json"]
    interop.main(["import", str(WEIGHTS / name), "--logdir", "run", *words])
    before = files(Path("run"))
    shutil.move("run", "elsewhere")
    capsys.readouterr()
    evaluate.main(["--logdir", "elsewhere", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 0 and 0 < found["loss"] < 100
    generate.main(["--logdir", "elsewhere", "--prompt", "some", "--tokens", "9"])
    assert capsys.readouterr().out.startswith("some")
    with pytest.raises(UserError) as raised:
        train.main(["--local", "--logdir", "elsewhere", "--dataset=text", "--text-dir=text"])
    assert "--init-from elsewhere --vocab-file elsewhere/vocab.json" in str(raised.value)
    assert files(Path("elsewhere")) == before


@pytest.mark.parametrize(
    "name", ["original_module_legacy.pt", "nvidia.pt", "hugging_face", "hugging_face_other"]
)
def test_import_export_import(name, tmp_path, capsys):
    trained = imported(WEIGHTS / name, tmp_path / "run", *ALL[name][1])
    out = str(tmp_path / "out.pt")
    interop.main(["export", "--logdir", str(tmp_path / "run"), "--out", out])
    assert f"n_token {trained.cfg.model.n_token}" in capsys.readouterr().out
    words = ["--cutoffs", *map(str, trained.cfg.model.cutoffs)]
    words += ["--vocabulary", str(tmp_path / "run" / "vocab.json")]
    again = imported(out, tmp_path / "again", *words)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    shape = ("n_token", "n_layer", "n_head", "d_head", "d_embed", "div_val", "tie_projs", "untie_r")
    for field in (*shape, "tie_weight", "cutoffs"):
        assert getattr(again.cfg.model, field) == getattr(trained.cfg.model, field)


def test_export_is_what_the_original_saved(tmp_path):
    imported(MODULE, tmp_path / "run", *WORDS)
    out = tmp_path / "out.pt"
    interop.main(["export", "--logdir", str(tmp_path / "run"), "--out", str(out)])
    found = torch_files.state_dict(torch_files.read(out)) or {}
    expected = torch_files.state_dict(torch_files.read(Path(STATE))) or {}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name == "pos_emb.inv_freq":  # computed, and that by another power function
            np.testing.assert_allclose(found[name], tensor, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    tied = "word_emb.emb_layers.1.weight", "crit.out_layers.1.weight"
    assert np.shares_memory(found[tied[0]], found[tied[1]])


def test_what_the_file_does_not_say_is_named(tmp_path, capsys):
    trained = imported(STATE, tmp_path / "a", *WORDS, "--mem-len", "7")
    output = capsys.readouterr().out
    assert "all its 42 tensors, 2,266 parameters" in output
    line = output.splitlines()[-1]
    for words in ("tgt_len 64", "clamp_len -1", "same_length False", "pre_lnorm False"):
        assert words in line
    assert "mem_len" not in line and trained.cfg.model.mem_len == 7
    about = json.loads((tmp_path / "a" / "imported.json").read_text())
    assert about["not_known"] == ["tgt_len", "clamp_len", "same_length", "pre_lnorm"]
    imported(MODULE, tmp_path / "b", *WORDS)
    assert "does not say" not in capsys.readouterr().out


def test_the_vocabulary_comes_from_every_place(tmp_path):
    words = (WEIGHTS / "original_words.txt").read_text().split()
    ids = {"kind": "bytes", "values": list(map(int, words))}
    for number, place in enumerate(("original_words.txt", "original_cache.pt")):
        logdir = tmp_path / str(number)
        imported(MODULE, logdir, "--vocabulary", str(WEIGHTS / place))
        assert json.loads((logdir / "vocab.json").read_text()) == ids
    copy = tmp_path / "copy"
    shutil.copytree(HUGGING_FACE, copy)
    trained = imported(copy, tmp_path / "pkl")
    (copy / "vocab.pkl").unlink()
    assert "no vocabulary" in refusal(tmp_path, copy)
    shutil.copy(WEIGHTS / "hugging_face_other" / "vocab.txt", copy)
    assert imported(copy, tmp_path / "txt").vocab == trained.vocab
    assert trained.vocab.encode(b"cab\n").tolist() == [
        foreign.read_symbols(copy / "vocab.txt").index(str(v)) for v in b"cab\n"
    ]


def test_vocabularies_of_the_data_sets():
    assert interop.vocabulary_json(["101", "32", "0"]) == {"kind": "bytes", "values": [101, 32, 0]}
    assert interop.vocabulary_json(["_", "e", "t"]) == {"kind": "bytes", "values": [32, 101, 116]}
    for eos in ("<eos>", "<S>"):
        words = ["the", eos, "naïve", "@-@", "1999"]
        assert interop.vocabulary_json(words) == {"kind": "words", "eos": eos, "words": words}
    for symbols, complaint in [
        (["the", "<eos>", "the"], "twice"),
        (["the", "of"], "no end of a line"),
        (["<eos>", "New York"], "'New York', which is not a word"),
        (["<eos>", ""], "'', which is not a word"),
    ]:
        with pytest.raises(UserError, match=complaint):
            interop.vocabulary_json(symbols)


def test_a_corpus_is_read_with_the_vocabulary_of_a_file(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(120):
        (text / f"{number}.txt").write_text("abcab\n")
    plain = DataConfig("text", str(text), data_dir=str(tmp_path / "data"))
    path = tmp_path / "vocab.json"
    given = dataclasses.replace(plain, vocab_file=str(path))
    prints = [token_files.prepare(plain).fingerprint]
    for values in ("cba\n\f", "abc\n\f", "abc\n\f!"):
        vocab.BytesVocab(values.encode()).save(path)
        tokens = token_files.prepare(given)
        assert tokens.vocab == vocab.load(path)
        assert bytes(values.encode()[i] for i in tokens.splits["test"][:7]) == b"abcab\n\f"
        prints.append(tokens.fingerprint)
    assert len(set(prints)) == 4
    vocab.BytesVocab(b"ab\n\f").save(path)
    with pytest.raises(UserError, match="0x63"):
        token_files.prepare(given)
    path.unlink()
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        token_files.prepare(given)


def changed(tmp_path: Path, change: Any) -> Path:
    """The state dict after `change` has been at it."""
    tensors = torch_files.state_dict(torch_files.read(Path(STATE))) or {}
    change(tensors)
    torch_files.write(tmp_path / "changed.pt", tensors)
    return tmp_path / "changed.pt"


def test_tensors_that_do_not_fit_are_named(tmp_path):
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["layers.1.dec_attn.r_net.weight"]
        tensors["layers.0.pos_ff.CoreNet.3.bias"] = np.zeros(5, np.float32)
        tensors["layers.0.dec_attn.more"] = np.zeros(5, np.float32)

    message = refusal(tmp_path, changed(tmp_path, change), *WORDS)
    assert "layers.1.dec_attn.r_net.weight is missing" in message
    assert "layers.0.pos_ff.CoreNet.3.bias has shape (5,), expected (12,)" in message
    assert "layers.0.dec_attn.more is not part of this config" in message


def test_what_config_json_states_is_what_is_expected(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(HUGGING_FACE, copy)
    stated = json.loads((copy / "config.json").read_text())
    for change, complaint in [
        ({"n_layer": 3}, "layers.2.dec_attn.o_net.weight is missing"),
        ({"d_inner": 24}, "layers.1.pos_ff.CoreNet.0.bias has shape (20,), expected (24,)"),
        ({"vocab_size": 41}, "the model has 41 tokens and the vocabulary 40"),
        ({"cutoffs": [10, 22]}, "tie_projs has 4 entries; with 2 cutoffs it has 3"),
        ({"cutoffs": [10, 9, 30]}, "have to be above 0 and increase"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06 there"),
        ({"same_length": "yes"}, "same_length is 'yes', which it cannot be"),
        ({"model_type": "gpt2"}, "not that of a transfo-xl model"),
        ({"attn_type": 7}, "attn_type"),
    ]:
        (copy / "config.json").write_text(json.dumps(stated | change))
        assert complaint in refusal(tmp_path, copy)
    (copy / "config.json").write_text("{")
    assert "damaged" in refusal(tmp_path, copy)
    (copy / "config.json").write_text(json.dumps(stated))
    (copy / "model.safetensors").write_bytes(b"\0" * 20)
    assert "damaged" in refusal(tmp_path, copy)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(tmp_path, copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refusal(tmp_path, copy)


def test_what_cannot_be_inferred_has_to_be_given(tmp_path):
    nvidia = torch_files.read(WEIGHTS / "nvidia.pt")
    tensors = torch_files.state_dict(nvidia["model_state"]) or {}
    torch_files.write(tmp_path / "state.pt", tensors)
    assert "3 clusters" in (why := refusal(tmp_path, tmp_path / "state.pt", *WORDS))
    assert "give --cutoffs, 2 of them" in why
    words = [*WORDS, "--cutoffs", "6", "15", "--mem-len", "6", "--tgt-len", "6"]
    trained = imported(tmp_path / "state.pt", tmp_path / "run", *words)
    expected = np.load(WEIGHTS / "nvidia.npz")
    found, _ = losses(trained, expected)
    np.testing.assert_allclose(found, expected["loss"], rtol=0, atol=2e-5)

    headless = changed(tmp_path, lambda w: [w.pop(n) for n in ("r_w_bias", "r_r_bias")])
    assert "give --n-head" in refusal(tmp_path, headless, *WORDS)
    assert "give --n-head" in refusal(tmp_path, headless, *WORDS, "--n-head", "3")
    assert "r_w_bias is missing" in refusal(tmp_path, headless, *WORDS, "--n-head", "2")


def test_other_things_are_refused(tmp_path):
    assert "has no vocabulary in it" in refusal(tmp_path, MODULE)
    assert "holds no model" in refusal(tmp_path, WEIGHTS / "original_cache.pt")
    assert "holds no vocabulary" in refusal(tmp_path, MODULE, "--vocabulary", STATE)
    names = "give the folder that holds it and its config.json"
    assert names in refusal(tmp_path, HUGGING_FACE / "pytorch_model.bin")
    assert "not those of a Transformer-XL" in refusal(tmp_path, WEIGHTS / "types_zip.pt")
    assert "No such file" in refusal(tmp_path, tmp_path / "none.pt")
    words = ["--vocabulary", str(WEIGHTS / "hugging_face_other" / "vocab.txt")]
    assert "the model has 30 tokens and the vocabulary 40" in refusal(tmp_path, MODULE, *words)
    assert "'impotr' is neither import nor export" in complaint(["impotr"])
    imported(MODULE, tmp_path / "run", *WORDS)
    logdir = ["--logdir", str(tmp_path / "run")]
    assert "is the folder of a run already" in complaint(["import", MODULE, *logdir, *WORDS])
    out = str(tmp_path / "none" / "a.pt")
    assert f"cannot write {out}" in complaint(["export", *logdir, "--out", out])


def complaint(words: list[str]) -> str:
    with pytest.raises(UserError) as raised:
        interop.main(words)
    return str(raised.value)
