"""Checkpoints of several processes, with a shared folder and with a store instead of one."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from tests import checkpoint_processes
from tests.checkpoint_processes import DAMAGES, SPECS, Outcome, found, number_of, run
from txl_jax.checkpoint import Checkpoints
from txl_jax.checkpoint_reader import restore_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[Outcome]:
    """What two processes of two devices said that went through all scenarios."""
    words = (scenario.__name__ for scenario in checkpoint_processes.SCENARIOS)
    return run(folder, 2, 2, *words)


@pytest.fixture(scope="module")
def four(folder: Path, both: list[Outcome]) -> list[Outcome]:
    """What four processes of a device each said that restored it."""
    return run(folder, 4, 1, "restore")


def test_what_two_processes_save_they_restore(both: list[Outcome]) -> None:
    for outcome in both:
        assert outcome["steps"] == [1, 2, 3]
        assert outcome["now"] == 3
        assert [outcome[f"whole {kind}"] for kind in SPECS] == [3] * len(SPECS)


def test_four_processes_restore_it(four: list[Outcome]) -> None:
    for outcome in four:
        assert [outcome[f"whole {kind}"] for kind in SPECS] == [3] * len(SPECS)


@pytest.mark.parametrize("devices", [4, 2, 1])
@pytest.mark.parametrize("kind", SPECS)
def test_one_process_restores_it(
    folder: Path, both: list[Outcome], devices: int, kind: str
) -> None:
    with Checkpoints(folder / "damaged" / "whole") as checkpoints:
        assert found(checkpoints, kind, devices) == 3


def test_params_alone_are_put_together(folder: Path, both: list[Outcome]) -> None:
    cases: list[tuple[Any, int]] = [("latest", 3), ("best", 9), (2, 2)]
    for which, number in cases:
        like = checkpoint_processes.abstract("plain", 1)
        params, info = restore_params(folder / "run", like["params"], which)
        assert info == {"number": number}
        rest = checkpoint_processes.state_of(number, "plain")
        rest = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), rest, like)
        assert number_of(rest | {"params": params}, like) == number


@pytest.mark.parametrize(
    "damage", [f"{kind} {name}" for kind, names in DAMAGES.items() for name in names]
)
def test_all_take_the_step_before_a_damaged_one(
    both: list[Outcome], four: list[Outcome], damage: str
) -> None:
    name = damage.replace("/", " ")
    exchanged = damage.startswith("exchange")
    for outcome in (*both, *four):
        step = outcome[f"{name} zero"]
        assert step == (1 if exchanged else 2)
    if damage == "delete commit.json":
        return  # it never was a checkpoint
    for outcomes in (both, four):
        said = [
            re.findall(rf"checkpoint .*/{name}/3.5 is damaged \((.*)\); going back to", out.errors)
            for out in outcomes
        ]
        unit = damage.split()[1].split("/")[0]
        if unit.startswith("part-"):
            half = len(outcomes) // 2
            assert [len(lines) for lines in said] == (
                [1] * half + [0] * half if unit == "part-0" else [0] * half + [1] * half
            )
        else:
            assert [len(lines) for lines in said] == [1] * len(outcomes)
        assert all(line.startswith(unit) for lines in said for line in lines)


def test_all_take_the_best_that_is_whole_everywhere(both: list[Outcome]) -> None:
    assert [outcome["agreed"] for outcome in both] == [1, 1]


def test_all_restore_what_all_see(both: list[Outcome]) -> None:
    for outcome in both:
        assert outcome["agreed, not seen by 0"] == outcome["agreed, not seen by 1"] == 1
    line = "best/2.0 is damaged (commit.json is not seen here); going back to 1.0\n"
    assert [line in outcome.errors for outcome in both] == [False, True]


def test_a_part_that_never_comes_is_named_and_the_next_step_is_committed(
    both: list[Outcome],
) -> None:
    first, second = both
    assert re.fullmatch(
        r"checkpoint .*/never/2\.0 is not whole: part-1 did not come from other processes; "
        "earlier checkpoints are unharmed",
        first["refusal"],
    )
    assert re.fullmatch(
        r"cannot write checkpoint .*/never/2\.0: .*; earlier checkpoints are unharmed",
        second["refusal"],
    )
    assert [outcome["left"] for outcome in both] == [["3.0", "4.0", "best"]] * 2


def test_a_process_that_is_late_is_waited_for(both: list[Outcome]) -> None:
    assert [outcome["slow"] for outcome in both] == [[2, 3]] * 2


def test_that_a_part_is_late_is_said(both: list[Outcome]) -> None:
    first, second = both
    assert re.fullmatch(
        r"checkpoint .*/late/1\.0 is not whole after 0 s: part-1 did not come from other processes "
        "yet; training goes on\n",
        first["late"],
    )
    assert second["late"] == ""


def test_a_dropped_upload_does_not_hold_up_the_next(both: list[Outcome]) -> None:
    for outcome in both:
        assert outcome["first"] == ["1.0+"]
        assert outcome["waiting"] == ["1.0+", "2.0"]
        assert outcome["newer"] == ["1.0+", "3.0+"]
        assert outcome["found"] == 3


def test_a_store_that_is_away_holds_up_nothing_and_the_disk_stays_free(
    both: list[Outcome],
) -> None:
    for outcome in both:
        assert outcome["away"] == "the store is away"
        assert outcome["spool"][-2:] == ["6.0", "7.0"]
        assert len(outcome["spool"]) <= 3
        assert outcome["back"] == ["3.0+", "7.0+"]


def test_each_downloads_what_it_needs_and_has_not(both: list[Outcome]) -> None:
    first, second = both
    for outcome in both:
        assert (outcome["again"], outcome["twice"], outcome["nothing"]) == (7, 7, [])
    assert {name.split("/")[2] for name in first["downloads"]} == {"whole", "part-0"}
    wrong = [name for name in second["downloads"] if "/part-" in name]
    assert len(wrong) == 1 and wrong[0].startswith("checkpoints/7.0/part-1/arrays/")


def test_what_is_damaged_in_the_store_is_left_by_all(both: list[Outcome]) -> None:
    for outcome in both:
        assert outcome["damaged"] == 3
        assert outcome["last"] == ["3.0+", "5.1+"]
        assert outcome["copies"] == ["3.0", "5.1"]
    first, second = both
    assert "/7.0 is damaged (part-0/arrays/" in first.errors
    assert "/7.0 is damaged" not in second.errors
