import contextlib
import dataclasses
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from txl_jax.errors import UserError
from txl_jax.logs import METRICS, SAMPLES, Logs, Progress, progress_line
from txl_jax.measure import BITS_PER_BYTE, PERPLEXITY

LOSS = "learning/loss"


def metrics(logdir: Path) -> list[dict]:
    return [json.loads(line) for line in (logdir / METRICS).read_text().splitlines()]


def tensorboard(logdir: Path) -> EventAccumulator:
    return EventAccumulator(str(logdir)).Reload()


def points(logdir: Path, tag: str = LOSS) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in tensorboard(logdir).Scalars(tag)]


def train(logs: Logs, first: int, last: int, shift: float = 0.0) -> None:
    """Logs the steps from `first` to `last`, 100 tokens each, with a sample at each."""
    for step in range(first, last + 1):
        logs.scalars(step, 100 * step, {LOSS: step + shift, "times/step": 1.0})
        logs.text(step, 100 * step, "sample", f"text {step}\n\nend")


def test_scalars_are_in_tensorboard_over_tokens_and_in_metrics(tmp_path):
    with Logs(tmp_path, None) as logs:
        logs.scalars(1, 1024, {LOSS: 5.5, "learning/lr": 1e-3})
        logs.scalars(2, 2048, {LOSS: np.float32(0.1)})
    assert points(tmp_path) == [(1024, 5.5), (2048, float(np.float32(0.1)))]
    assert points(tmp_path, "learning/lr") == [(1024, float(np.float32(1e-3)))]
    first, second = metrics(tmp_path)
    assert first.keys() == {"step", "tokens", "time", LOSS, "learning/lr"}
    assert (first["step"], first["tokens"]) == (1, 1024)
    assert (first[LOSS], first["learning/lr"]) == (5.5, 1e-3)
    assert second[LOSS] == float(np.float32(0.1)) != 0.1


def test_metrics_stay_json_when_a_number_is_not_finite(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}
    with Logs(tmp_path, None) as logs:
        logs.scalars(1, 10, values)

    def refuse(word: str):
        raise AssertionError(word)

    (line,) = (tmp_path / METRICS).read_text().splitlines()
    read = json.loads(line, parse_constant=refuse)
    assert [read[tag] for tag in values] == [None, None, None, 1.0]
    assert math.isnan(points(tmp_path, "a")[0][1])
    assert points(tmp_path, "b") == [(10, math.inf)]


def test_text_is_shown_as_it_is(tmp_path):
    sample = "def f():\n    # step 3, 4 tokens, sample\n\nstep 9, 999 tokens, sample\n\ud800é"
    with Logs(tmp_path, None) as logs:
        logs.text(7, 70, "sample", sample)
    lines = [
        *("    def f():", "        # step 3, 4 tokens, sample", "    "),
        *("    step 9, 999 tokens, sample", "    ?é"),
    ]
    written = (tmp_path / SAMPLES).read_text(encoding="utf-8")
    assert written.split("\n") == ["step 7, 70 tokens, sample", *lines, "", ""]
    (event,) = tensorboard(tmp_path).Tensors("sample/text_summary")
    assert event.step == 70
    assert event.tensor_proto.string_val[0].decode().splitlines() == lines
    Logs(tmp_path, 70).close()
    assert (tmp_path / SAMPLES).read_text(encoding="utf-8") == written


@pytest.mark.parametrize("restored", [0, 3, 5, None])
def test_resuming_replaces_what_was_lost(tmp_path, restored):
    """Whatever is restored, the folder ends as that of a run that was never stopped."""
    with Logs(tmp_path, None) as logs:
        logs.scalars(0, 0, {"sizes/params": 9.0})
        train(logs, 1, 5)
    with Logs(tmp_path, None if restored is None else 100 * restored) as logs:
        if restored is None:
            logs.scalars(0, 0, {"sizes/params": 9.0})
        train(logs, (restored or 0) + 1, 6, shift=0.5)
    expected = [step + 0.5 * (step > (restored or 0)) for step in range(1, 7)]
    assert [line[LOSS] for line in metrics(tmp_path) if LOSS in line] == expected
    assert points(tmp_path) == [(100 * step, expected[step - 1]) for step in range(1, 7)]
    assert points(tmp_path, "sizes/params") == [(0, 9.0)]
    assert sum("sizes/params" in line for line in metrics(tmp_path)) == 1
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    with Logs(undisturbed, None) as logs:
        train(logs, 1, 6)
    assert (tmp_path / SAMPLES).read_bytes() == (undisturbed / SAMPLES).read_bytes()


def test_several_kills_in_one_second(tmp_path):
    """Event files of the same second neither overwrite nor overtake each other."""
    for restored in [None, 2, 1, 3]:
        with Logs(tmp_path, restored and 100 * restored) as logs:
            train(logs, (restored or 0) + 1, 4, shift=(restored or 0) / 10)
    assert points(tmp_path) == [
        (100 * step, pytest.approx(loss)) for step, loss in enumerate([1.0, 2.1, 3.1, 4.3], 1)
    ]
    assert len(list(tmp_path.glob("events*"))) == 4


def test_half_written_ends_are_cut_off(tmp_path):
    with Logs(tmp_path, None) as logs:
        train(logs, 1, 2)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with Logs(tmp_path, 200) as logs:
        train(logs, 3, 3)
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content + (tmp_path / name).read_bytes()[:9])
    (tmp_path / METRICS).write_bytes(whole[METRICS] + b'{"step": 3, "tokens": 300')
    (tmp_path / SAMPLES).write_bytes(whole[SAMPLES] + b"step 3, 300 tok")
    with Logs(tmp_path, 200) as logs:
        assert (tmp_path / METRICS).read_bytes() == whole[METRICS]
        assert (tmp_path / SAMPLES).read_bytes() == whole[SAMPLES]
        train(logs, 3, 3)
    assert [line["tokens"] for line in metrics(tmp_path)] == [100, 200, 300]
    assert points(tmp_path) == [(100, 1.0), (200, 2.0), (300, 3.0)]


def test_a_damaged_line_is_kept_with_what_follows(tmp_path):
    lines = [b'{"step": 1, "tokens": 100}', b"\0\0 not json", b'{"step": 2, "tokens": 200}']
    (tmp_path / METRICS).write_bytes(b"".join(line + b"\n" for line in lines))
    Logs(tmp_path, 200).close()
    assert (tmp_path / METRICS).read_bytes().splitlines() == lines


KILLED = """
import os, signal, sys
from pathlib import Path
from txl_jax.logs import Logs
logs = Logs(Path(sys.argv[1]), None)
logs.scalars(1, 100, {"learning/loss": 1.0})
logs.flush()
logs.scalars(2, 200, {"learning/loss": 2.0})
logs.text(2, 200, "sample", "text")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_has_lost_no_line_and_no_flushed_event(tmp_path):
    done = subprocess.run([sys.executable, "-W", "error", "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["tokens"] for line in metrics(tmp_path)] == [100, 200]
    assert (tmp_path / SAMPLES).read_text() == "step 2, 200 tokens, sample\n    text\n\n"
    assert (100, 1.0) in points(tmp_path)


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Writing a file beyond `size` bytes fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write the logs in") as caught:  # noqa: SIM117
        with files_end_at(2000), Logs(tmp_path, None) as logs:
            for step in range(1000):
                logs.scalars(step, step, {LOSS: 1.0})
    assert "\n" not in str(caught.value)
    whole = (tmp_path / METRICS).read_bytes().rpartition(b"\n")[0]
    Logs(tmp_path, 1000).close()
    assert (tmp_path / METRICS).read_bytes() == whole + b"\n"


def test_a_full_disk_under_tensorboard_is_one_line(tmp_path):
    values = {f"tag/{i:040d}": 1.0 for i in range(30)}
    with pytest.raises(UserError, match="cannot write the logs in"):  # noqa: SIM117
        with files_end_at(2500), Logs(tmp_path, None) as logs:
            logs.scalars(1, 1, values)
    assert metrics(tmp_path)[0].keys() >= values.keys()


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the logs in .*Not a directory"):
        Logs(tmp_path / "file" / "run", None)


AT = Progress(
    step=500,
    steps=2400,
    tokens=512_000,
    loss=1.5432,
    measure=BITS_PER_BYTE,
    lr=2.9e-3,
    step_seconds=0.0984,
    tokens_per_sec=10_406.5,
    mfu=0.4123,
    seconds_left=182.4,
)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "step 500/2400 | 512k tokens | loss 1.5432 | bpb 2.226 | lr 2.9e-03 | 98 ms/step | "
            "10.4k tokens/s | MFU 41.2% | 3m02s left",
        ),
        (
            {"measure": PERPLEXITY, "mfu": None, "step_seconds": 0.00321, "loss": 3.0},
            "step 500/2400 | 512k tokens | loss 3.0000 | ppl 20.09 | lr 2.9e-03 | 3.2 ms/step | "
            "10.4k tokens/s | 3m02s left",
        ),
        (
            {"measure": PERPLEXITY, "mfu": None, "loss": 1e6, "lr": 0.0, "tokens_per_sec": 950.4},
            "step 500/2400 | 512k tokens | loss 1000000.0000 | ppl inf | lr 0.0e+00 | 98 ms/step | "
            "950 tokens/s | 3m02s left",
        ),
    ],
)
def test_progress_line(changes, line):
    assert progress_line(dataclasses.replace(AT, **changes)) == line


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        *((0, "0"), (16, "16"), (999, "999"), (1024, "1.02k"), (999_499, "999k")),
        *((999_500, "1M"), (2_457_600, "2.46M"), (103_227_021, "103M"), (999_500_000, "1B")),
        *((2_400_000_000, "2.4B"), (123_456_000_000_000, "123456B")),
    ],
)
def test_progress_line_shortens_tokens(tokens, text):
    assert f"| {text} tokens |" in progress_line(dataclasses.replace(AT, tokens=tokens))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.2, "0s"), (42, "42s"), (59.7, "1m00s"), (182, "3m02s"), (3599.6, "1h00m")),
        *((7500, "2h05m"), (86_399.9, "1d00h"), (273_600, "3d04h")),
    ],
)
def test_progress_line_says_how_long_it_will_take(seconds, text):
    assert progress_line(dataclasses.replace(AT, seconds_left=seconds)).endswith(f"| {text} left")
