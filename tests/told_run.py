"""A run's folder as the trainer's own parts write it, in no time and by a clock of its own."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.tiny import BATCH, CONFIG, TGT_LEN
from txl_jax import metrics, results, run_folder
from txl_jax.heartbeat import Heartbeat
from txl_jax.logs import Logs
from txl_jax.measure import BITS_PER_BYTE
from txl_jax.results import Results
from txl_jax.run_folder import STARTS

BEGUN = 1_750_000_000
"""When the run was started first, in seconds since 1970."""
WORDS = ["/opt/venv/bin/python3.11", "-m", "txl_jax.train", "--local", "--text-dir", "my text"]
HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://192.0.2.1/x onerror=alert(2)>&amp;\x00\u202e"
)
STEPS = (10, 20, 30, 40)
LOSSES = (5.25, 4.5, 3.75, 3.0)
SECONDS = (3, 5, 95, 97)
"""From the beginning to each line. Killed after the second, the run goes on after 90 seconds, and
10 steps take 2 seconds."""
AGAIN = 90
TOKENS = BATCH * TGT_LEN
RESULTS = Results(
    step=40,
    bits={"valid": {"0": 4.5, "16": 4.25}, "test": {"0": 4.75, "16": 4.0625}},
    tokens={"valid": 1234, "test": 567},
    sample=f"final {HOSTILE}",
)


def begin(folder: Path) -> Path:
    """A run that has been started, and nothing more."""
    run_folder.open_run(folder, CONFIG, command=WORDS, devices="4 x cpu")
    _set_starts(folder, [BEGUN])
    return folder


def write(folder: Path) -> Path:
    """A finished run that was killed once."""
    for _ in range(2):
        run_folder.open_run(folder, CONFIG, command=WORDS, devices="4 x cpu")
    _set_starts(folder, [BEGUN, BEGUN + AGAIN])
    with Logs(folder, None) as logs:
        logs.scalars(0, 0, {"sizes/params": 12345, "sizes/non_emb_params": 11111})
        for step, loss in zip(STEPS, LOSSES, strict=True):
            shown = {
                "learning/loss": loss,
                "learning/bpc": BITS_PER_BYTE.of(loss),
                "learning/lr": 1e-3 * step,
                "learning/grad_norm": float("nan") if step == 20 else 0.5,
                "times/step": 200.0,
                "times/tokens_per_sec": 320.0 + step,
                "memory/host_peak": 2.5e9,
            }
            logs.scalars(step, step * TOKENS, shown)
        for step in (20, 40):
            logs.text(step, step * TOKENS, "sample", f"after {step}\n\n  {HOSTILE}")
        logs.scalars(40, 40 * TOKENS, metrics.validation(3.125, BITS_PER_BYTE))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, seconds in zip(lines, (1, *SECONDS, SECONDS[-1] + 1), strict=True):
        line["time"] = BEGUN + seconds
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results.save(folder, RESULTS)
    for process, step in enumerate((40, 39)):
        beat = Heartbeat(folder, process, step)
        beat.measured(3.0, 360.0 + process, 10.0 + process)
        beat.show()
    return folder


def watched(**changed: Any) -> dict[str, Any]:
    """What a watcher would have written down of that run; `changed` is of its first event."""
    lost = {
        "time": datetime.fromtimestamp(BEGUN + 20, UTC).isoformat(),
        "kind": "preempted",
        "text": f"host 1 was taken away {HOSTILE}",
        "hosts": [1],
        "step": 20,
        "lost_seconds": 88.0,
        "cost": 0.5,
    }
    over = lost | {
        "time": datetime.fromtimestamp(BEGUN + 100, UTC).isoformat(),
        "kind": "finished",
        "text": "all done",
        "lost_seconds": None,
    }
    return {"holder": "a", "cost": 1.25, "events": [lost | changed, over]}


def as_float16(folder: Path) -> None:
    """Lets the log of a run tell of a loss scale."""
    path, lines = folder / "metrics.jsonl", []
    for line in map(json.loads, path.read_text().splitlines()):
        more = {"learning/overflows": line["step"] // 20} if "learning/loss" in line else {}
        lines.append(json.dumps(line | more) + "\n")
    path.write_text("".join(lines))


def _set_starts(folder: Path, times: list[int]) -> None:
    path = folder / STARTS
    starts = json.loads(path.read_text())["starts"]
    for start, time in zip(starts, times, strict=True):
        start["time"] = datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")
        start["source"] = "0123456789abcdef0123456789abcdef01234567-dirty"
    path.write_text(json.dumps({"starts": starts}))


def with_words(folder: Path) -> None:
    """Makes it a run over words, of which perplexity is shown."""
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, vocab="words"))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
