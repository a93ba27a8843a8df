"""The same losses, to float32 rounding, however the devices are spread over processes, and whatever
is split, accumulated or computed again."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import layouts

pytestmark = pytest.mark.processes

PLAIN, ADAPTIVE = "", "cutoffs=2,div_val=2"
MIXED = ["zero=1,accumulate=2", f"fsdp=1,remat=1,{ADAPTIVE}"]
"""Together they have everything."""
EVERY = [
    ",".join(filter(None, words))
    for words in itertools.product(("", "zero=1", "fsdp=1"), ("", "accumulate=2"), ("", "remat=1"))
]
UNDROPPED = [f"dropout=0,dropatt=0{kind and ','}{kind}" for kind in (PLAIN, f"zero=1,{ADAPTIVE}")]


def on_one_device(folder: Path, *kinds: str) -> dict[str, Any]:
    """What every layout has to give."""
    found = layouts.run(folder, 1, 1, list(kinds))
    for one in found.values():
        assert np.isfinite(one["losses"]).all() and one["losses"][-1] < one["losses"][0] - 0.2
        assert (one["norms"] > 0.5).any()  # some gradients are clipped
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return on_one_device(tmp_path_factory.mktemp("alone"), PLAIN)


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory) -> dict[str, Any]:
    return on_one_device(tmp_path_factory.mktemp("adaptive"), ADAPTIVE)


@pytest.fixture(scope="module")
def undropped(tmp_path_factory) -> dict[str, Any]:
    kinds = [UNDROPPED[0], f"dropout=0,dropatt=0,{ADAPTIVE}"]
    return on_one_device(tmp_path_factory.mktemp("undropped"), *kinds)


def assert_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Losses within 5e-6 nats, gradient norms within 2e-6 of theirs, parameters within 5e-6."""
    for kind, got in found.items():
        words = [word for word in ("dropout=0,dropatt=0", ADAPTIVE) if word in kind]
        expected = alone[",".join(words)]
        np.testing.assert_allclose(got["losses"], expected["losses"], rtol=0, atol=5e-6)
        np.testing.assert_allclose(got["norms"], expected["norms"], rtol=2e-6)
        np.testing.assert_allclose(got["params"], expected["params"], rtol=0, atol=5e-6)


@pytest.mark.slow
def test_eight_devices_of_one_process(alone, adaptive, tmp_path):
    assert_same(layouts.run(tmp_path, 1, 8, MIXED), alone | adaptive)


def test_four_processes_of_two_devices(alone, tmp_path):
    assert_same(layouts.run(tmp_path, 4, 2, MIXED[:1]), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 2), (8, 1)])
def test_every_combination(processes, devices, alone, adaptive, undropped, tmp_path):
    assert abs(alone[PLAIN]["losses"] - undropped[UNDROPPED[0]]["losses"]).max() > 0.01
    found = layouts.run(tmp_path, processes, devices, EVERY + MIXED + UNDROPPED)
    assert_same(found, alone | adaptive | undropped)
