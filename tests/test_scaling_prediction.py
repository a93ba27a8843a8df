"""Predictions against arithmetic by hand; they need neither a GPU nor a network."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.tiny import ROOT
from txl_jax import config, instance_types, scaling
from txl_jax.errors import UserError
from txl_jax.flops import peak_flops, train_flops_per_token
from txl_jax.scaling_model import NETWORK_LATENCY, NVLINK_LATENCY


def predicted(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    scaling.main(["predict", "--config", "test_16", *words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_prediction_from_a_measurement_by_hand(capsys):
    """16 x 384 tokens at 3,072 a second are 2 s. 1.14 GB cross NVLink at 0.77 x 150 GB/s and the
    network at 6.25 GB/s: on 16 hosts in a ring, on 128 along trees, as that is fewer turns."""
    found = predicted(["--measured", "3072"], capsys)
    by_hosts = {one["hosts"]: one for one in found["hosts"]}
    assert list(by_hosts) == [1, 2, 4, 8, 16, 32, 64, 128]
    size = 4 * 285_170_506
    inside = 2 * 7 * (size / 8 / (0.77 * 150e9) + 10 * NVLINK_LATENCY)
    between = {
        1: 0.0,
        16: 2 * 15 * (size / 16 / 6.25e9 + 10 * NETWORK_LATENCY),
        128: 2 * (size / 6.25e9 + 10 * 7 * NETWORK_LATENCY),
    }
    for hosts, seconds in between.items():
        one = by_hosts[hosts]
        assert one["ms_per_step"] == pytest.approx(1e3 * (2 + inside + seconds))
        assert one["communication_ms"] == pytest.approx(1e3 * (inside + seconds))
        rate = hosts * 8 * 6144 / (2 + inside + seconds)
        assert one["tokens_per_s"] == pytest.approx(rate)
        assert one["sequences_per_s"] == pytest.approx(rate / 384)
        assert one["efficiency"] == pytest.approx((2 + inside) / (2 + inside + seconds))
        assert one["dollars_per_hour"] == pytest.approx(31.212 * hosts)
        hours = 300 * 2048 * 384 / rate / 3600
        assert (one["hours"], one["dollars"]) == pytest.approx((hours, 31.212 * hosts * hours))
    assert between[128] < 2 * 127 * (size / 128 / 6.25e9 + 10 * NETWORK_LATENCY)


def test_a_prediction_from_flops_on_another_machine(capsys):
    words = ["--instance-type", "p4d.24xlarge", "--mfu", "0.4", "--overlap", "1", "--price", "10"]
    one = predicted(words, capsys)["hosts"][3]
    flops = 6144 * train_flops_per_token(config.load("test_16").model)
    assert one["ms_per_step"] == pytest.approx(1e3 * flops / (0.4 * 312e12))
    assert (one["communication_ms"], one["efficiency"]) == (0, 1)
    assert one["dollars_per_hour"] == 80


def test_all_assumptions_are_printed_with_a_prediction(capsys):
    scaling.main(["predict", "--config", "test_16"])
    printed = capsys.readouterr().out
    told = predicted([], capsys)
    for one in told["assumptions"]:
        assert all(text in printed for text in one.values())
    values = " ".join(one["value"] for one in told["assumptions"])
    for value in ("16 sequences of 384", "1.141 GB", "125 T/s", "22%", "150 GB/s x 0.77"):
        assert value in values
    for value in ("100 Gbit/s x 0.5", "3.4 and 17 µs", "$31.212 an hour"):
        assert value in values
    hosts = [line.split()[:2] for line in printed.splitlines()[3:11]]
    assert hosts[4] == ["16", "128"] and "scaling check" in printed


@pytest.mark.parametrize(
    "words, said",
    [
        (["--instance-type", "p4d"], "--instance-type takes p3.16xlarge, p3dn.24xlarge, p4d"),
        (["--measured", "0"], "measured is 0; it has to be above 0"),
        (["--mfu", "1.5"], "mfu is 1.5; it has to be above 0 and at most 1"),
        (["--mfu", "1", "--measured", "1"], "leave one of them out"),
        (["--overlap", "2"], "overlap is 2; it has to be from 0 to 1"),
        (["--price", "nan"], "price is nan; it has to be above 0"),
        (["--zero", "1"], "leave them out"),
        (["--batch", "100"], "use a multiple of 128"),
        (["--dtype", "float32"], "name its tokens/s with --measured"),
        (["--dtype", "bfloat16"], "use --dtype float16"),
        (["--dataset", "stdlib", "--n-token", "0"], "give its size with --n-token"),
        (["--mesured", "1"], "did you mean --measured"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(words, said):
    with pytest.raises(UserError) as error:
        scaling.main(["predict", "--config", "test_16", *words])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_ends_the_command_with_status_2():
    words = ["predict", "--config", "test_16", "--overlap", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "txl_jax.scaling", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: overlap is 2; it has to be from 0 to 1\n"


def test_every_instance_type_has_a_peak():
    assert [kind.name for kind in instance_types.TYPES] == [
        *("p3.16xlarge", "p3dn.24xlarge", "p4d.24xlarge", "p4de.24xlarge"),
        *("p5.48xlarge", "p5en.48xlarge"),
    ]
    for kind in instance_types.TYPES:
        assert instance_types.find(kind.name) is kind and peak_flops(kind.gpu, "float16")
