"""A run over words: from text to perplexity and generated text."""

import json
import math

import pytest

from tests import tiny
from tests.tiny import WORDS
from txl_jax import evaluate, generate, train

pytest_plugins = ["tests.tiny_runs"]

LOGDIR = "runs/words"
RUN = [
    *(*WORDS, "--vocab", "words", "--n-layer", "1", "--logdir", LOGDIR),
    *("--max-tokens", str(6 * 4 * tiny.TGT_LEN), "--log-every", "3", "--eval-every", "6"),
]


def test_words_go_through_training_evaluation_and_generation(
    shell, compiled, tmp_path, monkeypatch, capsys
):
    tiny.write_text(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    assert train.main(RUN) == 0
    lines = capsys.readouterr().out.splitlines()

    logged = tiny.metrics(tmp_path / LOGDIR)
    assert not [tag for line in logged for tag in line if "bpc" in tag]
    for line in logged:
        for name in ("", "val_"):
            if (loss := line.get(f"learning/{name}loss")) is not None:
                assert line[f"learning/{name}ppl"] == pytest.approx(math.exp(loss))
    (last,) = (line for line in lines if line.startswith("step 6/6 "))
    assert f"| ppl {math.exp(logged[-2]['learning/loss']):.2f} |" in last
    valid = logged[-1]["learning/val_loss"]
    assert f"step 6 | validation loss {valid:.4f} | ppl {math.exp(valid):.2f}" in lines

    results = json.loads((tmp_path / LOGDIR / "results.json").read_text())
    head = lines.index("Step 6, the best by validation loss:") + 2
    assert lines[head].split()[:2] == ["perplexity", "words"]
    numbers = [f"{2 ** results['bits']['test'][m]:.3f}" for m in ("0", "16", "64")]
    assert lines[head + 2].split() == ["test", str(results["tokens"]["test"]), *numbers]
    assert lines[-1].endswith(f"--logdir {LOGDIR}")

    evaluate.main(["--logdir", LOGDIR, "--mem-len", "0"])
    assert capsys.readouterr().out.startswith(f"test: perplexity {numbers[0]}, loss ")
    known = {"naïve", "façade", "señor", "über", "met", "a"}
    for prompt in ("naïve señor", " "):
        generate.main(["--logdir", LOGDIR, "--prompt", prompt, "--tokens", "9"])
        text = capsys.readouterr().out
        assert text.startswith(prompt)
        assert set(text.split()) <= known
        assert len(text.removeprefix(prompt).split(" ")) + text.count("\n") - 2 == 9
