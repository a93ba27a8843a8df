"""Runs beside one another: files with lines of --throughput, real folders of runs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import tiny
from tests.tiny import ROOT
from txl_jax import run_folder, scaling
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.logs import METRICS, Logs
from txl_jax.observed_scaling import read

pytest_plugins = ["tests.buckets"]

TGT_LEN, EACH = 8, 2


CONFIG = dataclasses.replace(
    tiny.CONFIG,
    model=dataclasses.replace(tiny.CONFIG.model, tgt_len=TGT_LEN),
    train=dataclasses.replace(tiny.CONFIG.train, batch=2 * EACH),
)
MEASURED = {
    1: {
        "config": "test_1",
        "parameters": 7777,
        "batch": EACH,
        "tgt_len": TGT_LEN,
        "mem_len": CONFIG.model.mem_len,
        "ms_per_step": {"q1": 15.0, "median": 16.0, "q3": 17.0},
        "sequences_per_s": {"q1": 124.0, "median": 125.0, "q3": 126.0},
        "tokens_per_s": {"q1": 999.0, "median": 1000.0, "q3": 1001.0},
        "devices": 1,
        "processes": 1,
        "device_kind": "cpu",
        "dtype": "float32",
        "remat": False,
        "accumulate": 1,
        "zero": 0,
        "fsdp": False,
    }
}
"""What is read of a line of --throughput, by number of devices; test_throughput has a real one."""
MEASURED[2] = MEASURED[1] | {
    "config": "test_2",
    "batch": 2 * EACH,
    "ms_per_step": {"median": 20.0},
    "sequences_per_s": {"median": 200.0},
    "tokens_per_s": {"median": 1600.0},
    "devices": 2,
}


def output(told: dict[str, Any]) -> str:
    """What a process with --throughput prints, among other things."""
    return f"{told['config']}: 1 x cpu\n{{broken\n[1]\n{json.dumps(told)}\nbye\n"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A file for each number of devices, the larger one first."""
    for devices, told in MEASURED.items():
        (tmp_path / f"{devices}.txt").write_text(output(told))
    return [str(tmp_path / "2.txt"), str(tmp_path / "1.txt")]


def folder(logdir: Path, cfg: Config, devices: int = 2) -> str:
    """The folder of a run as the trainer writes it, with a line from before its last start."""
    run_folder.open_run(logdir, cfg, command=["train"], devices=f"{devices} x cpu")
    with Logs(logdir, None) as logs:
        logs.scalars(0, 0, {"sizes/params": 7777})
        earlier = {"times/step": 9.0, "times/samples_per_sec": 1.0, "times/tokens_per_sec": 8.0}
        logs.scalars(5, 500, earlier)
    lines = (logdir / METRICS).read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"time": 1e9})
    (logdir / METRICS).write_text("".join(line + "\n" for line in lines))
    with Logs(logdir, 500) as logs:
        for step, rate in enumerate((1.0, 100.0, 120.0, 130.0), start=6):
            logs.scalars(step, 100 * step, {"learning/loss": 1.0})
            logs.scalars(
                *(step, 100 * step),
                {
                    "times/step": 1e3 * TGT_LEN / rate,
                    "times/samples_per_sec": rate / TGT_LEN,
                    "times/tokens_per_sec": rate,
                },
            )
    return str(logdir)


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    scaling.main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_runs_are_compared_with_the_smallest_scaled_up(files, tmp_path, capsys):
    found = told([*files, "--out", str(tmp_path / "a.png")], capsys)["runs"]
    assert [one["devices"] for one in found] == [1, 2]
    assert [one["tokens_per_s"] for one in found] == [1000, 1600]
    assert found[0]["efficiency"] == 1
    assert found[1]["efficiency"] == 0.8
    assert found[1]["ms_per_step"] == 20
    assert found[1]["sequences_per_s"] == 200
    assert found[1]["hosts"] == 1


def test_the_forks_figures_stand_beside_as_many_devices(tmp_path, capsys):
    """The lines are those of 2 devices, with another number of them."""
    lines = [
        MEASURED[2] | {"devices": n, "batch": EACH * n, "processes": n // 8, "config": f"on_{n}"}
        for n in (8, 32)
    ]
    (tmp_path / "runs").write_text("".join(map(output, lines)))
    scaling.main([str(tmp_path / "runs"), "--out", str(tmp_path / "a.png")])
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith("%"):
            rows[line.split()[-3]] = line.split()
    assert rows["1"][0] == "on_8" and rows["1"][-2:] == ["446", "100.0%"]
    assert rows["4"][0] == "on_32" and rows["4"][-2:] == ["1,736", "97.3%"]
    assert rows["2"] == ["16", "2", "860", "96.4%"]
    assert rows["8"] == ["64", "8", "3,031", "84.9%"]
    assert rows["16"] == ["128", "16", "5,904", "82.7%"]
    assert "25.0%" in rows["4"]


def test_the_command_reads_files_and_standard_input_and_draws(files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "txl_jax.scaling", files[1], "-", "--out", str(tmp_path / "a.png")],
        input=output(MEASURED[2]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    ours = [line for line in done.stdout.splitlines() if line.startswith("test_")]
    assert ours[1].startswith("test_2 in standard input")
    assert done.stdout.splitlines()[-1] == f"Picture: {tmp_path / 'a.png'}"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_a_folder_tells_the_speed_since_its_last_start(tmp_path):
    (found,) = read(folder(tmp_path / "run", CONFIG))
    assert (found.devices, found.hosts) == (2, None)
    assert found.tokens_per_s == 120
    assert (found.ms_per_step, found.sequences_per_s) == (1e3 * TGT_LEN / 120, 120 / TGT_LEN)
    assert found.alike["parameters"] == 7777 and found.alike["each"] == EACH


def test_a_folder_and_a_line_can_be_compared(files, tmp_path, capsys):
    """They name what has to be the same in the same way."""
    run = folder(tmp_path / "run", CONFIG)
    found = told([run, files[1], "--out", str(tmp_path / "a.png")], capsys)["runs"]
    assert [one["hosts"] for one in found] == [1, None]


def test_runs_in_a_bucket(s3, files, tmp_path):
    local = Path(folder(tmp_path / "run", CONFIG))
    for path in local.iterdir():
        s3.direct.upload_file(str(path), s3.bucket, f"runs/one/{path.name}")
    s3.direct.upload_file(files[0], s3.bucket, "launches/one/output-0.txt")
    (found,) = read(f"s3://{s3.bucket}/runs/one")
    assert found == dataclasses.replace(read(str(local))[0], run=found.run)
    (found,) = read(f"s3://{s3.bucket}/launches/one/output-0.txt")
    assert found.tokens_per_s == 1600
    with pytest.raises(UserError, match="there is no two"):
        read(f"s3://{s3.bucket}/runs/two")


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"parameters": 7}, "parameters 7 and"),
        ({"batch": 8}, "sequences on each device 8.0 and 2.0"),
        ({"device_kind": "Tesla V100"}, "kind of device Tesla V100 and cpu"),
        ({"dtype": "float16"}, "dtype float16 and float32"),
        ({"mem_len": 12}, "mem_len 12 and 16"),
        ({"fsdp": True}, "fsdp True and False"),
    ],
)
def test_other_runs_cannot_be_compared(changed, said, files, tmp_path):
    (tmp_path / "1.txt").write_text(output(MEASURED[1] | changed))
    with pytest.raises(UserError) as error:
        scaling.main([*files, "--out", str(tmp_path / "a.png")])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name a RUN"),
        (["nowhere"], "there is no file or folder nowhere"),
        (["README.md"], "README.md has no line of JSON"),
        (["configs"], "configs is no run with log lines: there is no config.json"),
        (["README.md", "--out", "nowhere/a.png"], "--out nowhere/a.png is not a file"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        scaling.main(words)
    assert said in str(error.value) and "\n" not in str(error.value)
