import contextlib
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.tiny import LOGDIR, Shell
from txl_jax import evaluate, evaluation, presets, run_folder, sharding, token_files
from txl_jax.config import ModelConfig
from txl_jax.errors import UserError
from txl_jax.evaluator import Evaluator, Score
from txl_jax.model import abstract
from txl_jax.trained import Trained, load_trained
from txl_jax.vocab import BytesVocab, WordsVocab

pytest_plugins = ["tests.tiny_runs"]


@pytest.fixture(scope="module")
def trained(finished: Path, compiled: None) -> Trained:
    return load_trained(finished, "best", tiny.one_device())


@pytest.fixture(scope="module")
def splits(shell: Shell, trained: Trained) -> dict[str, np.ndarray]:
    with contextlib.chdir(shell.home):
        files = token_files.prepare(trained.cfg.data)
    return {name: np.asarray(tokens) for name, tokens in files.splits.items()}


def plain_loop(trained: Trained, tokens: np.ndarray, batch: int, **changes) -> Score:
    """Stream after stream, segment after segment, without padding."""
    cfg: ModelConfig = dataclasses.replace(trained.cfg.model, **changes)
    xl = nnx.merge(abstract(cfg)[0], trained.params)
    losses = jax.jit(lambda inputs, targets, memory: xl(inputs, targets, memory))
    pairs = np.stack([tokens[:-1], tokens[1:]]).astype(np.int32)
    each = math.ceil(pairs.shape[1] / batch)
    found: list[float] = []
    for start in range(0, pairs.shape[1], each):
        stream = pairs[:, start : start + each]
        memory = xl.init_memory(1)
        for i in range(0, stream.shape[1], cfg.tgt_len):
            inputs, targets = jnp.asarray(stream[:, None, i : i + cfg.tgt_len])
            loss, memory = losses(inputs, targets, memory)
            found += loss[0].tolist()
    return Score(float(np.mean(found)), len(found))


OTHER_SETTINGS = {"tgt_len": 7, "mem_len": 24, "clamp_len": 5, "same_length": True}


@pytest.mark.parametrize(
    "batch, changes",
    [(1, {}), (3, {}), (4, {"mem_len": 0}), (3, {"mem_len": 64}), (4, OTHER_SETTINGS)],
)
def test_every_token_counts_once_whatever_the_batch(trained, splits, batch, changes):
    cfg = dataclasses.replace(trained.cfg.model, **changes)
    score = Evaluator(cfg, tiny.one_device(), batch)(trained.params, splits["valid"])
    expected = plain_loop(trained, splits["valid"], batch, **changes)
    assert score.tokens == expected.tokens == len(splits["valid"]) - 1
    assert score.loss == pytest.approx(expected.loss, rel=1e-5)


def test_streams_may_be_shorter_than_the_batch(trained, splits):
    few = splits["valid"][:6]
    evaluator = Evaluator(trained.cfg.model, tiny.one_device(), 4)
    for length in (2, 4, 6):
        score = evaluator(trained.params, few[:length])
        expected = plain_loop(trained, few[:length], 4)
        assert score.tokens == expected.tokens == length - 1
        assert score.loss == pytest.approx(expected.loss, rel=1e-5)


def test_several_devices_give_the_same_score(finished, splits, compiled):
    trained = load_trained(finished, "best", sharding.make_mesh())
    score = Evaluator(trained.cfg.model, sharding.make_mesh(), 8)(trained.params, splits["valid"])
    expected = plain_loop(trained, splits["valid"], 8)
    assert score.tokens == expected.tokens
    assert score.loss == pytest.approx(expected.loss, rel=1e-5)


def test_memory_is_worth_something(finished):
    for bits in json.loads((finished / "results.json").read_text())["bits"].values():
        assert bits["16"] < bits["0"] - 0.01


@pytest.fixture
def run(shell: Shell, finished: Path, compiled: None, monkeypatch, capsys):
    """`evaluate` in this process and on four devices; its lines."""
    monkeypatch.chdir(shell.home)

    def run(words: str) -> list[str]:
        evaluate.main(["--logdir", LOGDIR, *words.split()])
        return capsys.readouterr().out.splitlines()

    return run


def test_the_command_gives_what_training_showed_at_its_end(shell, finished, splits):
    results = json.loads((finished / "results.json").read_text())
    words = ("--logdir", LOGDIR, "--split", "test", "--mem-len", "64", "--json")
    status, output, errors = shell.run("evaluate", *words)
    assert (status, errors) == (0, "")
    (line,) = output.splitlines()
    found = json.loads(line)
    loss, bits = found["loss"], found["loss"] / math.log(2)
    assert 0 < found["accuracy_1"] < found["mrr_5"] < found["accuracy_5"] < 1
    assert found == {
        **{"split": "test", "step": results["step"], "tokens": len(splits["test"]) - 1},
        **{"tgt_len": 16, "mem_len": 64, "clamp_len": -1, "same_length": False, "batch": 4},
        # The split is shorter than what memory reaches back to: one stream reads it all.
        **{"reset_every": None, "context": 0},
        **{"loss": loss, "perplexity": pytest.approx(math.exp(loss))},
        **{"bits": bits, "bits_per_character": bits},
        **{name: found[name] for name in ("accuracy_1", "accuracy_5", "mrr_5")},
    }
    assert found["tokens"] == results["tokens"]["test"]
    assert found["bits"] == pytest.approx(results["bits"]["test"]["64"], rel=1e-9)


def test_the_command_takes_every_setting(run, trained, splits):
    words = "--split train --batch 8 --tgt-len 7 --mem_len=24 --clamp-len 5 --same-length True"
    (line,) = run(f"{words} --json")
    found = json.loads(line)
    assert {name: found[name] for name in OTHER_SETTINGS} == OTHER_SETTINGS
    assert (found["split"], found["batch"]) == ("train", 8)
    expected = plain_loop(trained, splits["train"], 1, **OTHER_SETTINGS)
    assert found["tokens"] == expected.tokens
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found["context"] == 7 * (2 * 4 * 7)  # two layers, four segments of memory
    assert run(words) == [
        f"train: bits per byte {found['bits']:.4f}, loss {found['loss']:.4f}, perplexity "
        f"{found['perplexity']:.3f}, accuracy@1 {found['accuracy_1']:.4f}, accuracy@5 "
        f"{found['accuracy_5']:.4f}, MRR@5 {found['mrr_5']:.4f}",
        f"{found['tokens']} tokens, each predicted once; 392 of them were read again as context "
        f"(step {trained.step}, batch 8, tgt_len 7, clamp_len 5, same_length True, mem_len 24)",
    ]
    (without,) = run(f"{words} --json --no-accuracy")
    ranking = ("accuracy_1", "accuracy_5", "mrr_5")
    assert json.loads(without) == {n: found[n] for n in found if n not in ranking}


def test_another_text_is_read_with_the_vocabulary_of_the_run(run, trained, splits, tmp_path):
    path = tmp_path / "other.txt"
    path.write_bytes(trained.vocab.decode(splits["valid"]))
    of_file, of_split = (
        json.loads(*run(f"{which} --json --reset-every 3"))
        for which in (f"--text {path}", "--split valid")
    )
    assert (of_file.pop("text"), of_split.pop("split")) == (str(path), "valid")
    assert of_file["reset_every"] == 3
    assert of_file == of_split != json.loads(*run("--split valid --json"))


def test_a_sweep_is_a_table_and_a_picture(run, copied, finished, monkeypatch):
    """The same as one evaluation after the other; the picture lies beside the run's files."""
    single = [json.loads(*run(f"--split valid --mem-len {n} --json")) for n in (0, 8, 32)]
    assert single[0]["loss"] > single[1]["loss"]
    monkeypatch.chdir(copied.home)
    token_files.prepare(run_folder.read_config(Path(LOGDIR)).data)  # notes that the text is a copy
    before = tiny.files(copied.home)
    lines = run("--split valid --sweep 32 0 8 --json --out picture.png")
    assert [json.loads(line) for line in lines] == single
    table = run("--split valid --sweep 8 0 32 8")
    pictures = {"picture.png", f"{LOGDIR}/sweep-valid.png"}
    after = tiny.files(copied.home)
    drawn = {after.pop(name) for name in pictures}
    assert after == before
    assert len(drawn) == 1 and drawn.pop().startswith(b"\x89PNG\r\n")
    assert table[0] == (
        f"valid: {single[0]['tokens']} tokens, each predicted once (step {single[0]['step']}, "
        "batch 4, tgt_len 16, clamp_len -1, same_length False)"
    )
    assert table[1] == (
        "mem_len  bits per byte     loss  perplexity  accuracy@1  accuracy@5    MRR@5  read again"
    )
    assert table[2:5] == [
        f"{one['mem_len']:7}  {one['bits']:13.4f}  {one['loss']:7.4f}  {one['perplexity']:10.3f}  "
        f"{one['accuracy_1']:10.4f}  {one['accuracy_5']:10.4f}  {one['mrr_5']:7.4f}  "
        f"{one['context']:10}"
        for one in single
    ]
    assert table[5:] == [f"Perplexity against mem_len: {LOGDIR}/sweep-valid.png"]


def test_a_preset_gives_way_to_what_is_given(run):
    paper = {"tgt_len": 64, "mem_len": 640, "clamp_len": 400, "same_length": True}
    found = json.loads(*run("--preset wt103-base --json"))
    assert {name: found[name] for name in paper} == paper
    found = json.loads(*run("--preset wt103_base --mem-len 3 --same-length False --json"))
    own = paper | {"mem_len": 3, "same_length": False}
    assert {name: found[name] for name in paper} == own


def test_presets_are_named_after_configs():
    folder = Path(presets.__file__).parent.parent / "configs"
    assert all((folder / f"{name}.py").exists() for name in presets.PRESETS)


def test_bits_per_character_count_the_text():
    words = WordsVocab(("<eos>", "the", "über"), "<eos>")
    tokens = words.encode("the über\nüber the\n".encode())
    score = Score(loss=2.0, tokens=5)
    # Of " the über\n über the\n" all but the first word is predicted.
    expected = 5 * 2.0 / math.log(2) / len(" über\n über the\n")
    assert evaluation.bits_per_character(score, words, tokens) == pytest.approx(expected)
    letters = BytesVocab(b"abc")
    assert evaluation.bits_per_character(score, letters, letters.encode(b"abcabc")) == score.bits


@pytest.mark.parametrize(
    "words, complaint",
    [
        (
            "--preset wt103",
            r"no preset 'wt103' \(did you mean wt103_\w+\?\); there are: wt103_base,",
        ),
        ("--reset-every 0", "reset_every is 0; it has to be at least 1"),
        ("--sweep 16 -1", "mem_len is -1; it has to be 0 or more"),
        ("--sweep 0 16 --same-length", "same_length lets a query see mem_len keys and mem_le"),
        ("--sweep 0 16 --mem-len 3", "--sweep says which mem_len there are; leave --mem-len out"),
        ("--out x.png", "--out names the picture of a sweep; add --sweep"),
        ("--sweep 0 --out missing/x.png", "--out missing/x.png is not a file in a folder that"),
        ("--sweep 0 --out text", "--out text is not a file in a folder that"),
        ("--split test --text a.txt", "--split and --text are two texts"),
        ("--text missing.txt", "cannot read missing.txt: No such file or directory"),
        ("--text text", "cannot read text: Is a directory"),
        ("--text EMPTY", "empty.txt has 0 of the 2 tokens or more that it takes"),
        ("--text ONE", "one.txt has 1 of the 2 tokens or more that it takes"),
        ("--text EURO", "euro.txt: byte 0xE2 of '€' .* is not among the vocabulary's"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(run, shell, tmp_path, words, complaint):
    for name, text in {"empty": "", "one": "m", "euro": "met €"}.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
        words = words.replace(name.upper(), str(tmp_path / f"{name}.txt"))
    before = tiny.files(shell.home)
    with pytest.raises(UserError, match=complaint) as caught:
        run(words)
    assert "\n" not in str(caught.value)
    assert tiny.files(shell.home) == before


def test_a_picture_that_cannot_be_written_is_one_line(run, copied, monkeypatch):
    monkeypatch.chdir(copied.home)
    (copied.home / LOGDIR / "sweep-test.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/sweep-test.png: .*; name another --out"):
        run("--sweep 0")


def test_the_newest_step_can_be_taken_instead_of_the_best(copied, compiled, monkeypatch, capsys):
    monkeypatch.chdir(copied.home)
    folder = Path(LOGDIR, "checkpoints", "best")
    steps = sorted(int(float(path.name)) for path in folder.iterdir())
    if steps[-1] == tiny.STEPS:
        (folder / f"{tiny.STEPS}.0" / "commit.json").unlink()
        steps.pop()
    found = {}
    for which in ("best", "latest"):
        evaluate.main(["--logdir", LOGDIR, "--checkpoint", which, "--json"])
        found[which] = json.loads(capsys.readouterr().out)
    assert (found["best"]["step"], found["latest"]["step"]) == (steps[-1], tiny.STEPS)
    assert found["best"]["loss"] != found["latest"]["loss"]


def test_the_command_leaves_the_run_as_it_is(shell, finished, compiled, monkeypatch):
    before = tiny.files(shell.home)
    monkeypatch.chdir(shell.home)
    evaluate.main(["--logdir", LOGDIR])
    assert tiny.files(shell.home) == before
