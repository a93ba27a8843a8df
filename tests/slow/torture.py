"""A run of four processes under everything that can happen to it.

    python -m tests.slow.torture FOLDER [--events 50] [--seed 0] [--steps 10000] [--kinds damage …]

First a run that nothing happens to, then the same one with its files in S3 (moto's server behind a
proxy that can fail) while random events come: a trainer or the coordinator is killed, stopped,
asked to stop; S3 is away, throttles, answers with errors; checkpoint files are damaged. In the end
both have to have the same parameters and the same logged losses, bit for bit, TensorBoard has to
show every one of them, and no process may be left. Prints a line for each event, with how long it
was until the run went on, and a summary. If the run is over before all events have come, as on a
fast machine, it takes more steps. Restarts are quicker with JAX_COMPILATION_CACHE_DIR set.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import jax
import numpy as np
import psutil

from tests import tiny
from tests.buckets import ENVIRONMENT
from txl_jax import sharding
from txl_jax.trained import load_trained

PROCESSES = 4
EVENTS = {
    "kill": 3,
    "kill coordinator": 2,
    "stop": 2,
    "stop coordinator": 1,
    "terminate": 2,
    "S3 refuse": 1,
    "S3 slow-down": 1,
    "S3 error": 1,
    "S3 hang": 1,
    "damage": 2,
}
"""What can happen, and how often in proportion."""
OUTAGE_SECONDS = (5.0, 60.0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """The processes of one run, each with its parent, in a folder of its own for each host."""

    def __init__(self, home: Path, logdir: str, steps: int, environ: dict[str, str]):
        self.home, self.steps = home, steps
        port = free_port()
        words = [
            *("--dataset", "text", "--text-dir", str(home / "text")),
            *("--n-layer", "2", "--d-model", "16", "--n-head", "2", "--d-head", "8"),
            *("--d-inner", "32", "--tgt-len", "16", "--mem-len", "16", "--dropout", "0.1"),
            *("--batch", "8", "--eval-batch", "8", "--log-every", "5", "--eval-every", "50"),
            *("--max-tokens", str(steps * 8 * 16), "--sample-tokens", "8", "--lr", "0.003"),
            *("--checkpoint-minutes", "0.05", "--logdir", logdir),
            *("--coordinator", f"127.0.0.1:{port}", "--num-processes", str(PROCESSES)),
            *("--supervise", "--max-restarts", "1000"),
        ]
        self.parents, self.outputs = [], []
        for i in range(PROCESSES):
            host = home / f"host{i}"
            host.mkdir(parents=True, exist_ok=True)
            self.outputs.append((host / "output.txt").open("ab"))
            self.parents.append(
                subprocess.Popen(
                    [sys.executable, "-m", "txl_jax.train", *words, "--process-id", str(i)],
                    cwd=host,
                    env=environ | {"PYTHONPATH": str(tiny.ROOT)},
                    stdout=self.outputs[-1],
                    stderr=subprocess.STDOUT,
                )
            )

    def trainer(self, i: int) -> psutil.Process | None:
        try:
            children = psutil.Process(self.parents[i].pid).children()
        except psutil.NoSuchProcess:
            return None
        return children[0] if children else None

    def step(self) -> int:
        """The last step that process 0 has printed."""
        lines = (self.home / "host0" / "output.txt").read_text(errors="replace").splitlines()
        steps = [line.split("/")[0].split()[1] for line in lines if line.startswith("step ")]
        return int(steps[-1].split("|")[0]) if steps else 0

    def lines(self) -> int:
        """How many log lines process 0 has printed."""
        text = (self.home / "host0" / "output.txt").read_text(errors="replace")
        return sum(line.startswith("step ") for line in text.splitlines())

    def gone_back(self) -> int:
        """How often a host has found a checkpoint damaged and taken the one before."""
        outputs = self.home.glob("host*/output.txt")
        return sum(path.read_text(errors="replace").count("; going back to ") for path in outputs)

    def ended(self) -> list[int | None]:
        return [parent.poll() for parent in self.parents]

    def wait(self, limit: float) -> list[int | None]:
        deadline = time.monotonic() + limit
        while None in self.ended() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.ended()

    def close(self) -> None:
        for parent in self.parents:
            if parent.poll() is None:
                for child in psutil.Process(parent.pid).children(recursive=True):
                    child.kill()
                parent.kill()
                parent.wait()
        for output in self.outputs:
            output.close()


def trainers_of(folder: Path) -> list[int]:
    """Process ids of what still runs for this folder."""
    lines = {
        process.pid: " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline"])
    }
    return [pid for pid, line in lines.items() if "txl_jax" in line and str(folder) in line]


def write_text(folder: Path) -> None:
    """Some hundred small files, the same at any time."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(200)]
    for i in range(300):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words, k=60)))


def losses(metrics: str) -> dict[tuple[int, str], float]:
    """Every logged loss by step and tag; a step that stands there twice is an error."""
    found: dict[tuple[int, str], float] = {}
    for line in metrics.splitlines():
        values = json.loads(line)
        for tag in ("learning/loss", "learning/grad_norm", "learning/lr", "learning/val_loss"):
            if tag in values:
                assert (values["step"], tag) not in found, f"step {values['step']} twice"
                found[values["step"], tag] = values[tag]
    return found


def digest(logdir: Path) -> str:
    """SHA-256 of the final parameters."""
    params = load_trained(logdir, "latest", sharding.make_mesh()).params
    state = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        state.update(np.asarray(leaf).tobytes())
    return state.hexdigest()


def damage(client: Any, bucket: str, draw: random.Random, spools: list[Path]) -> str:
    """Flips a bit of, or cuts, one file of the newest checkpoint in S3; empty if there are not two.

    Hosts lose their copies of that step, as they would read these otherwise.
    """
    objects = client.get_paginator("list_objects_v2")
    pages = objects.paginate(Bucket=bucket, Prefix="run/checkpoints/")
    names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    steps = {name.split("/")[2] for name in names if name.endswith("/commit.json")} - {"best"}
    if len(steps) < 2:
        return ""
    newest = max(steps, key=lambda step: int(step.split(".")[0]))
    name = draw.choice([n for n in names if n.split("/")[2] == newest])
    content = bytearray(client.get_object(Bucket=bucket, Key=name)["Body"].read())
    if content and draw.random() < 0.5:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[len(content) // 2 :]
    client.put_object(Bucket=bucket, Key=name, Body=bytes(content))
    for spool in spools:
        shutil.rmtree(spool / "checkpoints" / newest, ignore_errors=True)
    return name


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="+", choices=EVENTS, default=list(EVENTS))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is ended
    draw, folder, steps = random.Random(args.seed), args.folder.resolve(), args.steps
    upstream, port, mode = free_port(), free_port(), folder / "mode"
    url = f"http://127.0.0.1:{port}"
    environ = os.environ | ENVIRONMENT | {"AWS_ENDPOINT_URL": url, "JAX_PLATFORMS": "cpu"}
    for name in ("calm", "torture"):
        write_text(folder / name / "text")
    servers = [
        subprocess.Popen(
            words, cwd=tiny.ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for words in (
            [sys.executable, "-m", "moto.server", "-p", str(upstream)],
            [sys.executable, "-m", "tests.faulty_s3", str(port), str(upstream), str(mode)],
        )
    ]
    started: list[Run] = []
    try:
        os.environ.update(ENVIRONMENT)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{upstream}")
        for _ in range(100):
            try:
                client.create_bucket(Bucket="torture")
                break
            except Exception:
                time.sleep(0.2)
        started.append(calm := Run(folder / "calm", str(folder / "calm" / "run"), steps, environ))
        print("undisturbed:", calm.wait(3600), flush=True)
        started.append(run := Run(folder / "torture", "s3://torture/run", steps, environ))
        away: dict[str, list[float]] = {}
        number = damaged = 0
        while number < args.events:
            wanted = run.lines() + draw.randint(2, 8)
            deadline = time.monotonic() + 300
            while run.lines() < wanted and None in run.ended() and time.monotonic() < deadline:
                time.sleep(0.1)
            if None not in run.ended():
                break
            event = draw.choices(args.kinds, [EVENTS[kind] for kind in args.kinds])[0]
            victim = 0 if "coordinator" in event else draw.randrange(1, PROCESSES)
            lines, began, what = run.lines(), time.monotonic(), ""
            trainer = run.trainer(victim)
            if event.startswith("S3"):
                mode.write_text(event.split()[1])
                time.sleep(draw.uniform(*OUTAGE_SECONDS))
                mode.write_text("ok")
            elif event == "damage":
                if trainer:
                    trainer.suspend()  # all stand still, and no newer step is committed
                    time.sleep(1)
                spools = [run.home / f"host{i}/runs/torture/run" for i in range(PROCESSES)]
                if not (what := damage(client, "torture", draw, spools)):
                    if trainer:
                        trainer.resume()
                    continue
                damaged += 1
                if trainer:
                    trainer.kill()  # what is damaged is found when it is read
            elif trainer:
                {"kill": trainer.kill, "stop": trainer.suspend, "terminate": trainer.terminate}[
                    event.split()[0]
                ]()
                what = f"process {victim}"
            while run.lines() <= lines and None in run.ended() and time.monotonic() < began + 300:
                time.sleep(0.1)
            took = time.monotonic() - began
            away.setdefault(event, []).append(took)
            number += 1
            print(f"{number}. step {run.step()}: {event} {what}: {took:.0f} s", flush=True)
        print("tortured:", run.wait(1800), flush=True)
        # The run's files as they are in S3.
        got = folder / "from_s3"
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="torture", Prefix="run/")
        for page in pages:
            for entry in page["Contents"]:
                path = got / entry["Key"]
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download_file("torture", entry["Key"], str(path))
        expected = losses((folder / "calm" / "run" / "metrics.jsonl").read_text())
        found = losses((got / "run" / "metrics.jsonl").read_text())
        shown = tiny.tensorboard(got / "run") == tiny.shown_in_metrics(got / "run")
        same = {
            "every logged number, bit for bit": found == expected,
            "final parameters, bit for bit": digest(got / "run") == digest(folder / "calm" / "run"),
            "TensorBoard shows every line of metrics.jsonl, once": shown,
            "all ended with 0": set(run.ended()) == {0} and set(calm.ended()) == {0},
            f"damage was found, of {damaged} times that it was done": run.gone_back() > 0
            or not damaged,
            "no process left": not trainers_of(folder),
        }
        for event, times in sorted(away.items()):
            median, most = statistics.median(times), max(times)
            print(f"{event}: {len(times)} x, went on after {median:.0f} s, at most {most:.0f} s")
        for what, holds in same.items():
            print(f"{'yes' if holds else 'NO '}  {what}", flush=True)
        return 0 if all(same.values()) else 1
    finally:
        for one in started:
            one.close()
        for server in servers:
            server.kill()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
