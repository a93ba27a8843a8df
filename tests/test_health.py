"""The check of hosts before a run, with processes on CPU devices."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.members import free_port
from txl_jax import health

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.processes


def start(*words: str, devices: int = 1, **environ: str) -> subprocess.Popen[str]:
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | environ
    return subprocess.Popen(
        [sys.executable, "-m", "txl_jax.health", *words],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit status, output and error output of each."""
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
        return [
            (process.returncode, *output)
            for process, output in zip(processes, outputs, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def together(number: int) -> list[list[str]]:
    """The words by which processes find one another."""
    address = f"127.0.0.1:{free_port()}"
    words = ["--coordinator", address, "--num-processes", str(number), "--process-id"]
    return [[*words, str(process)] for process in range(number)]


def found(output: str) -> dict:
    """The one line of JSON, after what gloo says."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == 1, output
    return json.loads(lines[0])


def test_two_hosts(tmp_path):
    words = together(2)
    first, second = end(*(start("--gpus", "2", *some, devices=2) for some in words))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "{" not in second[1]
    line = found(first[1])
    size, ms = line["bytes"], line.pop("ms")
    assert line.pop("bus_gbps") == pytest.approx(8 * 1.5 * size / (ms * 1e6))
    assert line == {
        "process": 0,
        "hosts": 2,
        "devices": 4,
        "device_kind": "cpu",
        "bytes": health.CPU_BYTES,
        "network_gbps": None,
        "network": "TCP",
        "warnings": [],
    }


def test_a_slow_network_is_warned_of_and_no_error():
    words = together(2)
    first, second = end(*(start("--gpus", "1", "--gbps", "1e6", *some) for some in words))
    assert (first[0], second[0]) == (0, 0), (first, second)
    (warning,) = found(first[1])["warnings"]
    pattern = (
        r"an all-reduce over 2 hosts ran at \d+\.\d Gbit/s through TCP, under half of the "
        r"network's 1e\+06 Gbit/s"
    )
    assert re.fullmatch(pattern, warning)
    assert f"warning: {warning}\n" in first[2] and "warning" not in second[2]


def test_one_host_has_no_network():
    (only,) = end(start("--gpus", "2", "--gbps", "1e6", "--local", devices=2))
    assert only[0] == 0, only
    line = found(only[1])
    assert (line["hosts"], line["network"], line["warnings"]) == (1, "none", [])


def test_a_host_that_lacks_a_device_is_named_by_all():
    words = together(2)
    good = start("--gpus", "2", *words[0], devices=2)
    bad = start("--gpus", "2", *words[1], devices=1)
    statuses = end(good, bad)
    assert [status for status, *_ in statuses] == [2, 2], statuses
    name = os.uname().nodename
    problem = f"host {name} sees 1 CPU devices and should see 2"
    assert f"error: {problem}" in statuses[1][2]
    assert re.search(rf"error: process 1 \(host {name}\): {problem}", statuses[0][2]), statuses


def test_gpus_that_are_not_there():
    (only,) = end(start("--gpus", "8", "--local", JAX_PLATFORMS=""))
    assert only[0] == 2
    assert f"error: host {os.uname().nodename} sees 0 GPU devices and should see 8" in only[2]


def test_what_takes_too_long_is_given_up():
    code = "from txl_jax import health; health.TIME_LIMIT = 1.0; health.main({words!r})"
    words = ["--gpus", "1", *together(2)[0]]  # nobody else comes
    done = subprocess.run(
        [sys.executable, "-c", code.format(words=words)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert f"error: host {os.uname().nodename} did not finish in 1 s" in done.stderr


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--gpus", "0", "--local"], "--gpus is 0; it has to be 1 or more"),
        (["--local"], "--gpus"),
        (["--gpus", "1"], "no cluster was found to join"),
        (["--gpus", "1", "--locl"], "did you mean --local?"),
    ],
)
def test_bad_words(words, problem):
    (only,) = end(start(*words))
    assert only[0] == 2 and problem in only[2] and only[2].startswith("error: ")
    assert len(only[2].splitlines()) == 1


# Lines as NCCL 2.28 and aws-ofi-nccl write them.
@pytest.mark.parametrize(
    "lines, network",
    [
        (["NET/IB : No device found.", "Using network Socket"], "TCP"),
        (
            [
                "NET/OFI Selected provider is efa, fabric is efa-direct (found 1 nics)",
                "Using network Libfabric",
            ],
            "EFA",
        ),
        (["NET/OFI Selected Provider is efa (found 4 nics)", "Using network AWS Libfabric"], "EFA"),
        (["NET/OFI Selected Provider is tcp;ofi_rxm", "Using network AWS Libfabric"], "TCP"),
        (["NET/OFI Selected Provider is cxi (found 2 nics)", "Using network Libfabric"], "cxi"),
        (["Using network IB"], "IB"),
        (["NCCL version 2.28.9+cuda13.0"], "unknown"),
    ],
)
def test_the_network_that_nccl_uses(lines, network):
    text = "".join(f"ip-10-0-0-4:568:978 [0] NCCL INFO {line}\n" for line in lines)
    assert health.network_in(text) == network


@pytest.mark.parametrize("devices, links", [(2, 1.0), (8, 1.75), (64, 1.96875)])
def test_bus_bandwidth_counts_what_a_ring_sends(devices, links):
    assert health.bus_bytes(devices, 100) == 100 * links
