"""What hosts may do: use their bucket, and nothing else."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from launcher import host_role
from launcher.things import TAGS, Thing
from tests.launcher.cloud import ACCOUNT, Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

BUCKET = f"txl-{ACCOUNT}-us-east-1"
NAME = f"txl-host-us-east-1-{BUCKET}"


@pytest.fixture
def iam(aws: Cloud) -> Any:
    return aws.client("iam")


def statements(iam: Any) -> list[dict[str, Any]]:
    return iam.get_role_policy(RoleName=NAME, PolicyName="txl-host")["PolicyDocument"]["Statement"]


def test_a_profile_gives_hosts_the_role(account, iam):
    assert host_role.missing(account, BUCKET) == [
        f"role and instance profile {NAME}: the bucket {BUCKET} alone"
    ]
    assert host_role.ensure(account, BUCKET) == NAME
    assert host_role.missing(account, BUCKET) == []
    profile = iam.get_instance_profile(InstanceProfileName=NAME)["InstanceProfile"]
    (role,) = profile["Roles"]
    assert role["RoleName"] == NAME
    assert profile["Tags"] == TAGS
    assert iam.get_role(RoleName=NAME)["Role"]["Tags"] == TAGS
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert iam.list_attached_role_policies(RoleName=NAME)["AttachedPolicies"] == []


def test_hosts_may_use_their_bucket_and_no_other(account, iam):
    host_role.ensure(account, BUCKET)
    arn = f"arn:aws:s3:::{BUCKET}"
    assert {s["Resource"] for s in statements(iam)} == {arn, f"{arn}/*"}
    actions = {action for s in statements(iam) for action in s["Action"]}
    assert all(action.startswith("s3:") for action in actions)
    assert {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"} <= actions
    assert not any("*" in action or "Policy" in action or "Acl" in action for action in actions)


def test_launches_at_once_make_one_role(account, iam):
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: host_role.ensure(account, BUCKET), range(8))) == {NAME}
    assert [role["RoleName"] for role in iam.list_roles()["Roles"]] == [NAME]
    assert host_role.missing(account, BUCKET) == []


def test_a_second_launch_only_looks(account):
    host_role.ensure(account, BUCKET)
    asked: list[str] = []
    events = account.client("iam").meta.events
    events.register("before-call.iam", lambda model, **_: asked.append(model.name), unique_id="x")
    host_role.ensure(account, BUCKET)
    events.unregister("before-call.iam", unique_id="x")
    assert asked
    assert [name for name in asked if not name.startswith("Get")] == []


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_launch_that_was_killed_between_is_completed(done, account, iam):
    """After the role, after its policy, after the profile."""
    events = account.client("iam").meta.events
    left = [done]

    def kill(model: Any, **_: Any) -> None:
        if not model.name.startswith("Get"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1

    events.register("before-call.iam", kill, unique_id="kill")
    with pytest.raises(KeyboardInterrupt):
        host_role.ensure(account, BUCKET)
    events.unregister("before-call.iam", unique_id="kill")
    assert host_role.missing(account, BUCKET)
    host_role.ensure(account, BUCKET)
    assert host_role.missing(account, BUCKET) == []


def test_a_policy_that_was_widened_is_set_again(account, iam):
    host_role.ensure(account, BUCKET)
    anything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
    iam.put_role_policy(
        RoleName=NAME,
        PolicyName="txl-host",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [anything]}),
    )
    assert host_role.missing(account, BUCKET)
    host_role.ensure(account, BUCKET)
    assert len(statements(iam)) == 2


def test_each_bucket_has_its_role(account, iam):
    host_role.ensure(account, BUCKET)
    host_role.ensure(account, "mine")
    (resource,) = {s["Resource"].removesuffix("/*") for s in statements(iam)}
    assert resource.endswith(BUCKET)


def test_names_fit_into_iam_and_differ(account):
    first = host_role.profile_name(account, "b" * 62 + "1")
    second = host_role.profile_name(account, "b" * 62 + "2")
    assert len(first) == len(second) == 64
    assert first != second


def test_a_role_of_that_name_that_is_somebody_elses_is_left_alone(account, iam):
    iam.create_role(RoleName=NAME, AssumeRolePolicyDocument="{}")
    with pytest.raises(UserError, match=f"{NAME} was not made by this launcher"):
        host_role.ensure(account, BUCKET)
    assert iam.list_role_policies(RoleName=NAME)["PolicyNames"] == []


def test_roles_that_no_instance_has_are_unused_and_can_be_removed(account, aws, iam):
    assert host_role.unused(account, set()) == []
    host_role.ensure(account, BUCKET)
    host_role.ensure(aws.account("eu-west-1"), "elsewhere")
    iam.create_role(RoleName="theirs", AssumeRolePolicyDocument="{}")
    assert host_role.unused(account, {NAME}) == []
    assert host_role.unused(account, set()) == [Thing("role", NAME)]
    host_role.remove(account, NAME)
    host_role.remove(account, NAME)
    names = sorted(role["RoleName"] for role in iam.list_roles()["Roles"])
    assert names == ["theirs", "txl-host-eu-west-1-elsewhere"]
    profiles = iam.list_instance_profiles()["InstanceProfiles"]
    assert [profile["InstanceProfileName"] for profile in profiles] == names[1:]
