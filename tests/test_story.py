"""What a run's folder tells: all that the trainer wrote, and no more than that."""

import dataclasses
import json
import math
import subprocess
import sys
from datetime import timedelta

import pytest

from tests import told_run
from tests.tiny import ROOT
from tests.told_run import AGAIN, BEGUN, HOSTILE, LOSSES, SECONDS, STEPS, TOKENS
from txl_jax import logs, results, story
from txl_jax.errors import UserError
from txl_jax.measure import BITS_PER_BYTE, PERPLEXITY


def test_it_tells_what_the_trainer_wrote(tmp_path):
    told = story.read(told_run.write(tmp_path / "first"))
    assert told.name == "first" and told.damage == ()
    losses = told.series("learning/loss")
    assert [(line.step, line.tokens, loss) for line, loss in losses] == [
        (step, step * TOKENS, loss) for step, loss in zip(STEPS, LOSSES, strict=True)
    ]
    assert [line.time - BEGUN for line, _ in losses] == [*SECONDS]
    assert [line.step for line, _ in told.series("learning/grad_norm")] == [10, 30, 40]
    assert told.setting("model", "d_model") == 16 and told.setting("model", "no") is None
    assert [start.time.timestamp() for start in told.starts] == [BEGUN, BEGUN + AGAIN]
    assert told.starts[0].devices == "4 x cpu" and told.starts[0].versions["jax"]
    assert [(sample.step, sample.tokens) for sample in told.samples] == [
        (20, 20 * TOKENS),
        (40, 40 * TOKENS),
    ]
    assert told.samples[0].text == f"after 20\n\n  {HOSTILE}"
    assert told.evaluation and told.evaluation.bits == told_run.RESULTS.bits
    assert told.evaluation.tokens == told_run.RESULTS.tokens
    assert [(s.process, s.step, s.tokens_per_s) for s in told.signs] == [
        (0, 40, 360.0),
        (1, 39, 361.0),
    ]
    assert told.signs[0].own_ms == 10.0 and told.last_seen == max(s.time for s in told.signs)


def test_files_have_the_names_that_writers_give_them():
    assert (story.METRICS, story.SAMPLES, story.RESULTS) == (
        logs.METRICS,
        logs.SAMPLES,
        results.FILE,
    )


def test_losses_are_shown_as_the_vocabulary_wants(tmp_path):
    folder = told_run.write(tmp_path / "first")
    assert story.read(folder).measure is BITS_PER_BYTE
    told_run.with_words(folder)
    assert story.read(folder).measure is PERPLEXITY


def test_a_restart_costs_what_passed_but_for_its_steps(tmp_path):
    told = story.read(told_run.write(tmp_path / "first"))
    (restart,) = told.restarts()
    assert restart.start.time.timestamp() == BEGUN + AGAIN
    # 90 seconds from line to line, of which the 10 steps between them take 2.
    assert (restart.step, restart.lost_seconds, restart.causes) == (20, 88.0, ())
    assert told.tokens_at(BEGUN + AGAIN) == 20 * TOKENS and told.tokens_at(BEGUN) == 0


def test_time_that_several_restarts_have_cost_is_lost_once(tmp_path):
    """Nothing was logged between the last two starts."""
    told = story.read(told_run.write(tmp_path / "first"))
    first, again = told.starts
    early = dataclasses.replace(again, time=again.time - timedelta(seconds=30))
    told = dataclasses.replace(told, starts=(first, early, again))
    # 85 s from the last line to the second start, 30 s of them after the first one.
    assert [restart.lost_seconds for restart in told.restarts()] == [55.0, 33.0]
    assert [restart.step for restart in told.restarts()] == [20, 20]


def test_a_restart_is_caused_by_what_a_watcher_saw_before_it(tmp_path):
    folder = told_run.write(tmp_path / "first")
    told = story.read(folder, told_run.watched())
    assert told.watched and [event.kind for event in told.watched.events] == [
        "preempted",
        "finished",
    ]
    assert told.watched.cost == 1.25
    (cause,) = told.restarts()[0].causes
    assert (cause.hosts, cause.step, cause.lost_seconds, cause.cost) == ((1,), 20, 88.0, 0.5)
    for changed in ({"kind": "moved"}, {"time": "2000-01-01T00:00:00Z"}):
        told = story.read(folder, told_run.watched(**changed))
        assert told.restarts()[0].causes == ()


@pytest.mark.parametrize(
    "changed", [{"time": "yesterday"}, {"time": "0001-01-01"}, {"kind": "danced"}, {"kind": [1]}]
)
def test_events_that_are_none_are_left_out_and_counted(changed, tmp_path):
    folder = told_run.begin(tmp_path / "first")
    watched = story.read(folder, told_run.watched(**changed)).watched
    assert watched and [event.kind for event in watched.events] == ["finished"]
    assert watched.damaged == 1


def test_details_of_events_that_are_none_are_left_out(tmp_path):
    folder = told_run.begin(tmp_path / "first")
    changed = {"hosts": [0, "x", -1, 2], "step": 1e9, "lost_seconds": 1e300, "text": 5}
    watched = story.read(folder, told_run.watched(cost=math.nan, **changed)).watched
    assert watched
    event = watched.events[0]
    assert (event.hosts, event.step, event.lost_seconds) == ((0, 2), None, None)
    assert (event.text, event.cost) == ("", None)
    for content in ([], "x", {"events": {"a": 1}}, {"events": [None, 5]}):
        watched = story.read(folder, content).watched
        assert watched and watched.events == ()


def test_a_run_that_has_just_begun_has_little_to_tell(tmp_path):
    told = story.read(told_run.begin(tmp_path / "first"))
    assert (told.lines, told.samples, told.signs, told.evaluation) == ((), (), (), None)
    assert (told.restarts(), told.watched, told.last_seen, told.damage) == ([], None, None, ())


def test_damaged_lines_are_passed_over_and_counted(tmp_path):
    folder = told_run.write(tmp_path / "first")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    damaged = [b'{"step": 1', b"[]", b'{"step": -1, "tokens": 1, "time": 1}', b"\xff", b"[" * 9999]
    damaged += [b'{"step": 1, "tokens": 1, "time": 1e300}', b'{"step": true, "tokens": 1}']
    more = b'{"step": 50, "tokens": 3200, "time": 1750000100, "learning/loss": "x", "a/b": 1e999}'
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*damaged, *lines, more]) + b"\n")
    told = story.read(folder)
    assert told.damage == ("7 damaged lines of metrics.jsonl passed over.",)
    assert len(told.series("learning/loss")) == 4
    assert (told.lines[-1].step, told.lines[-1].values) == (50, {})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"starts": 5}', '{"starts": [{"time": 5}]}'])
def test_starts_that_cannot_be_read_are_said(content, tmp_path):
    folder = told_run.write(tmp_path / "first")
    (folder / "run.json").write_text(content)
    told = story.read(folder)
    assert told.starts == () and "run.json" in told.damage[0] and len(told.lines) == 6


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"step": 5}', '{"step": 5, "bits": {"test": {"0": "x"}}}']
)
def test_results_that_cannot_be_read_are_said(content, tmp_path):
    folder = told_run.write(tmp_path / "first")
    (folder / "results.json").write_text(content)
    told = story.read(folder)
    assert told.evaluation is None and "results.json" in told.damage[0]


def test_signs_that_are_none_are_left_out(tmp_path):
    folder = told_run.write(tmp_path / "first")
    for name, sign in (
        ("2", {"time": "now"}),
        ("3", []),
        ("x", {"time": 5}),
        ("4", {"time": 5, "step": "a", "host": 7, "tokens_per_s": None, "own_ms": 1.5}),
    ):
        (folder / "heartbeats" / f"{name}.json").write_text(json.dumps(sign))
    told = story.read(folder).signs
    assert [sign.process for sign in told] == [0, 1, 4]
    assert (told[2].step, told[2].host, told[2].own_ms) == (None, "", 1.5)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        story.read(tmp_path / "none")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        story.read(tmp_path)
    for content in ("", "[]", "{", '{"model": 5}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            story.read(tmp_path)


def test_a_report_needs_no_jax():
    words = "import sys; from txl_jax import report_page; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", words], cwd=ROOT, text=True) == "False\n"
