"""`python -m txl_jax.sharding report`: what a train step takes and sends, on up to 128 devices.

Each number of devices needs a process of its own: this file is also the program of it.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest

from tests.layouts import QUICKLY
from tests.tiny import ROOT, one_line
from txl_jax import account, config, sharding
from txl_jax.account import Account
from txl_jax.collectives import Collective
from txl_jax.config import Config
from txl_jax.errors import UserError

GIB = 2**30
V100 = 32 * GIB
KINDS = {
    "plain": ("--accumulate", "2"),
    "zero": ("--zero", "1", "--accumulate", "2"),
    "fsdp": ("--fsdp",),
    "half": ("--zero", "1", "--dtype", "float16"),
}
LAYERS = 3


def small(devices: int, kind: str) -> Config:
    """Every axis that may be split is divided by 128, or another of the same parameter is."""
    shape = {"n-layer": LAYERS, "d-model": 128, "n-head": 2, "d-head": 16, "d-inner": 256}
    shape |= {"tgt-len": 8, "mem-len": 8, "batch": 2 * devices, "n-token": 384, "optim": "lamb"}
    words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    return config.load("quickstart", [*words, "--cutoffs", "128", "256", *KINDS[kind]])


def program(devices: int) -> None:
    """Prints the account of every kind as JSON."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = sharding.make_mesh()
    found = {kind: account.account(small(devices, kind), mesh) for kind in KINDS}
    print(json.dumps({kind: dataclasses.asdict(one) for kind, one in found.items()}))


def command(*words: str) -> tuple[int, str, str]:
    """Status, output and error output of `python …`."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"} | QUICKLY,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


Accounts = dict[str, Account]


@pytest.fixture(
    scope="module",
    params=[8, pytest.param(64, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)],
)
def accounts(request: pytest.FixtureRequest) -> Accounts:
    """The accounts of every kind on that many devices."""
    status, output, errors = command("-m", "tests.test_account", str(request.param))
    assert status == 0, errors

    def read(one: dict[str, Any]) -> Account:
        sent = (Collective(**{**c, "types": tuple(c["types"])}) for c in one.pop("collectives"))
        return Account(**one, collectives=tuple(sent))

    found = {kind: read(one) for kind, one in json.loads(output).items()}
    assert all(one.devices == request.param for one in found.values())
    return found


def split_parameters(select: Callable[[str], bool]) -> int:
    """Number of the parameters that may be split and whose name is selected, by hand."""
    d, width, inner, e = 128, 2 * 16, 256, 128
    layer = {"w_q": d * width, "w_kv": 2 * d * width, "w_r": d * width, "w_o": d * width}
    layer |= {"w_in": d * inner, "w_out": d * inner}
    sizes = {f"layers/{name}": LAYERS * size for name, size in layer.items()}
    sizes |= {"embedding/tables": 384 * e}
    return sum(size for name, size in sizes.items() if select(name))


TABLES, SPLIT_OF_A_LAYER = 3, 6
"""Parameters that are split, those of all layers being one: XLA joins none of them on the CPU."""
SUMS = 3
"""All-reduces: gradients of what is whole, and norms of all for LAMB and for the clipping."""


def number(found: Account, kind: str) -> int:
    """How many collectives of a kind there are; one in a loop counts once."""
    return sum(one.kind == kind for one in found.collectives)


def sent(found: Account, kind: str, types: tuple[str, ...] = ("f32",)) -> int:
    """Bytes of all collectives of a kind; they must be of these types, and among all devices."""
    chosen = [one for one in found.collectives if one.kind == kind]
    assert {(one.types, one.group) for one in chosen} == {(types, found.devices)}
    return sum(one.bytes * (one.runs or 0) for one in chosen)


def test_without_zero_one_all_reduce_of_the_gradients_is_all(accounts):
    found = accounts["plain"]
    (only,) = found.collectives
    # The loss and the number of targets too; with two parts, still once.
    assert (only.kind, only.runs, only.group) == ("all-reduce", 1, found.devices)
    assert only.types == ("f32",)
    assert only.bytes == 4 * found.parameters + 8


@pytest.mark.parametrize(("kind", "types", "size"), [("zero", "f32", 4), ("half", "f16", 2)])
def test_with_zero_parameters_are_gathered_once_and_gradients_scattered(
    accounts, kind, types, size
):
    found, split = accounts[kind], split_parameters(lambda _: True)
    assert {one.runs for one in found.collectives} == {1}
    assert sent(found, "all-gather", (types,)) == size * split
    assert sent(found, "reduce-scatter") == 4 * split
    for of_parameters in ("all-gather", "reduce-scatter"):
        assert number(found, of_parameters) == TABLES + SPLIT_OF_A_LAYER
    assert number(found, "all-reduce") <= SUMS
    # What is whole on every device, and norms.
    assert sent(found, "all-reduce") < 4 * 3 * (found.parameters - split)
    assert {one.kind for one in found.collectives} == {"all-gather", "reduce-scatter", "all-reduce"}


def test_with_fsdp_layers_are_gathered_within_the_loops_over_them(accounts):
    found = accounts["fsdp"]
    layers = split_parameters(lambda name: name.startswith("layers/"))
    ends = split_parameters(lambda name: not name.startswith("layers/"))
    assert {one.runs for one in found.collectives} == {1, LAYERS}
    for one in found.collectives:
        assert (one.runs == LAYERS) == ("while/body" in one.op_name)
    assert sent(found, "reduce-scatter") == 4 * (layers + ends)
    assert number(found, "reduce-scatter") == TABLES + SPLIT_OF_A_LAYER
    assert number(found, "all-gather") <= TABLES + 2 * SPLIT_OF_A_LAYER
    assert number(found, "all-reduce") <= SUMS
    # Forward, and again backward, but for what only the forward pass needs.
    gathered = sent(found, "all-gather")
    assert 4 * (2 * layers + ends) >= gathered > 4 * (1.5 * layers + ends)
    assert sent(found, "all-reduce") < 4 * 3 * (found.parameters - layers - ends)


def test_bytes_are_those_of_the_parameters_that_lie_on_a_device(accounts):
    plain, zero, fsdp = (accounts[kind] for kind in ("plain", "zero", "fsdp"))
    assert plain.parameter_bytes == plain.gradient_bytes == 4 * plain.parameters
    split = split_parameters(lambda _: True)
    for found in (zero, fsdp):
        own = found.parameters - split + split // found.devices
        assert found.parameters == plain.parameters
        assert found.parameter_bytes == 4 * own
        # Two moments, and the count of steps.
        assert found.optimizer_bytes == 8 * own + 4
    assert zero.gradient_bytes == 4 * zero.parameters
    layers = split_parameters(lambda name: name.startswith("layers/"))
    whole = fsdp.parameters - layers + layers // fsdp.devices
    assert fsdp.gradient_bytes == 4 * whole
    # Three layers, two sequences on each device, eight places; and how many of them are filled.
    assert plain.memory_bytes == 4 * LAYERS * 2 * 8 * 128 + 4
    for found in accounts.values():
        assert found.temporary_bytes > found.gradient_bytes - found.parameter_bytes
        assert 0 < found.other_bytes < 2000


def test_the_report_says_it(accounts):
    found = accounts["fsdp"]
    shown = account.show("small", small(found.devices, "fsdp"), found)
    assert f"small: {found.devices} devices, {found.parameters:,} parameters" in shown
    assert f"{found.total_bytes:,}" in shown
    total = sum(one.bytes * (one.runs or 0) for one in found.collectives)
    lines = shown.split("collectives of a step")[1].splitlines()[1:]
    assert sum(int(line.split("arrays")[1].split()[0].replace(",", "")) for line in lines) == total


def report(*words: str) -> tuple[int, str, str]:
    return command("-m", "txl_jax.sharding", "report", *words)


def test_the_command_takes_the_machines_of_the_experiment():
    tiny = ("--n-layer", "1", "--d-model", "16", "--d-inner", "16", "--tgt-len", "4")
    status, output, errors = report("--machines", "2", "--gpus", "3", "--batch", "12",
        "--eval-batch", "6", "--n-token", "50", *tiny)  # fmt: skip
    assert (status, errors) == (0, "")
    assert output.startswith("quickstart: 6 devices, ")
    assert "each device: 2 sequences of 4 tokens in 1 part, float32, zero 0, no remat" in output
    assert "  1 all-reduce of f32, 1 x " in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["report"], "the vocabulary of dataset stdlib is not known before it is read: give its"),
        (["report", "--n-token", "50", "--devices", "-1"], "devices is -1; it has to be"),
        (["plan"], "plan is no command of txl_jax.sharding; there is: report"),
        ([], "nothing is no command"),
    ],
)
def test_what_cannot_be_reported_is_refused(words, says):
    with pytest.raises(UserError, match=says) as refusal:
        sharding.main(words)
    assert "\n" not in str(refusal.value)


def test_a_batch_that_the_devices_cannot_divide_is_refused():
    status, _, errors = report("--n-token", "50", "--devices", "7")
    assert "batch is 16, which 7 devices cannot divide" in one_line(status, errors)


def test_known_data_sets_have_known_vocabularies():
    assert account.with_known_vocabulary(config.load("enwik8_base")).model.n_token == 204
    given = config.load("enwik8_base", ["--n-token", "300"])
    assert account.with_known_vocabulary(given) == given


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight_machines", "eight_machine_fp16_large", "test_16"])
def test_the_forks_experiments_fit_its_gpus(name):
    """By an upper bound; a tenth is left to CUDA and what its libraries set aside."""
    status, output, errors = report("--config", name)
    assert (status, errors) == (0, "")
    total = next(line for line in output.splitlines() if line.startswith("  total "))
    assert int(total.split()[1].replace(",", "")) < 0.9 * V100


if __name__ == "__main__":
    program(int(sys.argv[1]))
