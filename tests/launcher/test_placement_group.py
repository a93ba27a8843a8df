"""Cluster placement groups, which moto does not know: tests/launcher/cloud.py keeps them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher import placement_group
from launcher.things import TAGS, Thing
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

ZONES = ("us-east-1a", "us-east-1b")
NAMES = {zone: f"txl-moto-{zone}" for zone in ZONES}


def test_each_zone_has_its_group(aws, account):
    assert placement_group.missing(account, ZONES) == [
        "cluster placement groups txl-moto-us-east-1a, txl-moto-us-east-1b"
    ]
    assert placement_group.ensure(account, ZONES) == NAMES
    assert placement_group.missing(account, ZONES) == []
    for group in aws.placement_groups.values():
        assert (group["Strategy"], group["Tags"]) == ("cluster", TAGS)


def test_without_zones_there_is_nothing_to_make(aws, account):
    assert placement_group.missing(account, []) == []
    assert placement_group.ensure(account, []) == {}
    assert aws.placement_groups == {}


def test_only_what_is_missing_is_made(aws, account):
    placement_group.ensure(account, ZONES[:1])
    assert placement_group.missing(account, ZONES) == [
        "cluster placement group txl-moto-us-east-1b"
    ]
    placement_group.ensure(account, ZONES)
    placement_group.ensure(account, ZONES)
    assert len(aws.asked("CreatePlacementGroup")) == 2


def test_launches_at_once_make_one_of_each(aws, account):
    with ThreadPoolExecutor(8) as threads:
        assert all(
            made == NAMES
            for made in threads.map(lambda _: placement_group.ensure(account, ZONES), range(8))
        )
    assert set(aws.placement_groups) == set(NAMES.values())


def test_a_group_that_spreads_instances_is_refused(aws, account):
    placement_group.ensure(account, ZONES)
    aws.placement_groups["txl-moto-us-east-1a"]["Strategy"] = "spread"
    with pytest.raises(UserError, match="txl-moto-us-east-1a is of strategy spread, not cluster"):
        placement_group.ensure(account, ZONES)


def test_groups_that_no_instance_is_in_are_unused_and_can_be_removed(aws, account):
    placement_group.ensure(account, ZONES)
    aws.placement_groups["theirs"] = {
        **aws.placement_groups["txl-moto-us-east-1a"],
        "GroupName": "theirs",
    }
    aws.placement_groups["txl-moto-us-east-1f"] = {
        **aws.placement_groups["txl-moto-us-east-1a"],
        "GroupName": "txl-moto-us-east-1f",
        "Tags": [],
    }
    (unused,) = placement_group.unused(account, {"txl-moto-us-east-1a"})
    assert unused == Thing("placement group", "txl-moto-us-east-1b")
    placement_group.remove(account, unused.name)
    placement_group.remove(account, unused.name)
    assert set(aws.placement_groups) == {
        "txl-moto-us-east-1a",
        "theirs",
        "txl-moto-us-east-1f",
    }
