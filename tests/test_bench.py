"""The harness that times: one part for real, and the table of two runs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bench import shapes
from bench.__main__ import main
from txl_jax import metrics, sharding
from txl_jax.checks import check_experiment
from txl_jax.errors import UserError
from txl_jax.step import init_state

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent


def test_each_part_is_a_line_of_json():
    command = [sys.executable, "-m", "bench", "--shapes", "tiny", "--parts", "data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["shape"], line["part"], line["device"]) == ("tiny", "data", "CPU")
    assert 0 < line["ms"]["q1"] <= line["ms"]["median"] <= line["ms"]["q3"]
    assert line["peak_host_bytes"] > 50_000_000 and line["cores"] > 0


def test_two_runs_are_compared_where_they_have_the_same(tmp_path, capsys):
    def run(ms: float, *parts: str) -> str:
        spread = {"q1": ms / 2, "median": ms, "q3": 2 * ms}
        lines = [json.dumps({"shape": "tiny", "part": part, "ms": spread}) for part in parts]
        path = tmp_path / f"{ms}"
        path.write_text("\n".join(["some warning", *lines]))
        return str(path)

    assert main(["--compare", run(3.0, "train", "data"), run(2.0, "train", "evaluate")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| tiny | train, ms | 3 | 2 | 1.50 |"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "tinny"], "there is no shape 'tinny' (did you mean tiny?)"),
        (["--parts", "trian"], "there is no part 'trian' (did you mean train?)"),
        (["--compare", "one"], "--compare takes two files"),
        (["--compare", "README.md", "README.md"], "README.md has no line of JSON"),
    ],
)
def test_bad_words_are_said(words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        main(words)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny", 865_217),
        ("base", 191_950_298),
        ("large", 285_170_506),
        ("fork_small", 186_707_162),
    ],
)
def test_shapes_are_those_that_they_are_called(name, parameters):
    cfg = shapes.shape(name)
    check_experiment(cfg, devices=1)
    state = jax.eval_shape(lambda: init_state(cfg, sharding.make_mesh()))
    assert metrics.count(state.params) == parameters
