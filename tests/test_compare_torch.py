"""What surrounds the original when it is timed; PyTorch is not among the packages here."""

import sys
from pathlib import Path

import pytest

from bench import shapes
from bench.compare_torch import Worker, as_original, in_turns, main, summary, table
from txl_jax.errors import UserError

pytestmark = pytest.mark.processes

STEADY = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    what, number = line.split()
    print([float(sys.argv[1])] * int(number), flush=True)
"""


def test_both_are_asked_in_turns_and_the_ratio_is_theirs_over_ours():
    commands = ([sys.executable, "-c", STEADY, seconds] for seconds in ("0.75", "0.25"))
    with Worker("theirs", next(commands)) as theirs, Worker("ours", next(commands)) as ours:
        theirs.wait_until_ready()
        ours.wait_until_ready()
        pairs = in_turns(theirs, ours, "train", 3)
    assert pairs == [(0.75, 0.25)] * 3
    found = summary("tiny", "train", [*pairs, (1.0, 0.25)])
    assert found["original_ms"] == 750 and found["ms"] == 250
    assert found["times_as_fast"] == {"least": 3.0, "median": 3.0, "most": 4.0}
    line = "| tiny | train | 750 | 250 | 3.00 | 3.00 to 4.00 |"
    assert table([found]).splitlines()[-1] == line


def test_a_worker_that_ends_is_said():
    with (
        Worker("the original", [sys.executable, "-c", "raise SystemExit(3)"]) as worker,
        pytest.raises(UserError, match="the original ended with status 3"),
    ):
        worker.wait_until_ready()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "has no pytorch/mem_transformer.py: --reference is a checkout of"),
        (["--shapes", "tinny"], "there is no shape 'tinny' (did you mean tiny?)"),
        (["--parts", "trian"], "there is no part 'trian' (did you mean train?)"),
        (["--pairs", "0"], "--pairs is 0; it has to be at least 1"),
    ],
)
def test_bad_words_are_said(words, said, tmp_path):
    with pytest.raises(UserError) as caught:
        main(["--reference", str(tmp_path), *words])
    assert said in str(caught.value)


def test_a_python_without_pytorch_is_said(tmp_path: Path):
    (tmp_path / "mem_transformer.py").touch()
    with pytest.raises(UserError, match="cannot import torch"):
        main(["--reference", str(tmp_path), "--python", str(tmp_path / "no_python")])


def test_the_original_is_told_of_clusters_and_of_the_type():
    told = as_original(shapes.shape("large", "float32"), compiled=True)
    assert told["model"]["cutoffs"] == [20000, 40000, 200000] and told["model"]["div_val"] == 4
    assert told["model"]["tie_projs"] == [False, True, True, True]
    assert (told["device"], told["dtype"], told["compiled"]) == ("cpu", "float32", True)
    assert as_original(shapes.shape("large"), compiled=False)["dtype"] == "bfloat16"
