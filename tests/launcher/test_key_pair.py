"""The caller's SSH key pair, with which paramiko really signs."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from moto.ssm.models import ssm_backends

from launcher import key_pair
from launcher.things import Thing
from tests.launcher.cloud import ACCOUNT, REGION, Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

NAME = "txl-moto"
PARAMETER = f"/txl/keys/{NAME}"


@pytest.fixture
def ec2(aws: Cloud) -> Any:
    return aws.client("ec2")


@pytest.fixture
def ssm(aws: Cloud) -> Any:
    return aws.client("ssm")


def registered(ec2: Any) -> str:
    """Public half that EC2 gives to hosts."""
    (found,) = ec2.describe_key_pairs(KeyNames=[NAME], IncludePublicKey=True)["KeyPairs"]
    return found["PublicKey"]


def public_half(path: Path) -> str:
    key = paramiko.Ed25519Key.from_private_key_file(str(path))
    return f"{key.get_name()} {key.get_base64()}"


def test_a_key_pair_has_its_halves_where_they_belong(account, ec2, ssm):
    path = key_pair.ensure(account)
    assert path == Path.home() / ".ssh" / "txl" / f"{ACCOUNT}-{REGION}-{NAME}"
    assert registered(ec2) == public_half(path)
    stored = ssm.get_parameter(Name=PARAMETER, WithDecryption=True)["Parameter"]
    assert stored["Type"] == "SecureString"
    assert stored["Value"] == path.read_text()
    for found in (
        ssm.list_tags_for_resource(ResourceType="Parameter", ResourceId=PARAMETER)["TagList"],
        ec2.describe_key_pairs(KeyNames=[NAME])["KeyPairs"][0]["Tags"],
    ):
        assert found == [{"Key": "txl:made-by", "Value": "txl-launcher"}]


def test_nobody_else_on_the_machine_can_read_the_private_half(account):
    path = key_pair.ensure(account)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    key_pair.ensure(account)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_would_be_made_is_said_once(account):
    assert key_pair.missing(account) == [
        f"key pair {NAME}, its private half in the Parameter Store as {PARAMETER}"
    ]
    assert not (Path.home() / ".ssh").exists()
    key_pair.ensure(account)
    assert key_pair.missing(account) == []


def test_another_machine_gets_the_same_key(account, ec2):
    path = key_pair.ensure(account)
    first = path.read_text()
    path.unlink()
    assert key_pair.ensure(account).read_text() == first
    path.unlink()
    assert key_pair.fetch(account, NAME).read_text() == first
    assert registered(ec2) == public_half(path)


def test_launches_at_once_get_the_same_key(account, ec2):
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda _: key_pair.ensure(account), range(8)))
    (path,) = paths
    assert registered(ec2) == public_half(path)
    assert key_pair.missing(account) == []


def test_of_two_keys_made_at_once_the_first_that_is_stored_is_everybodys(
    account, aws, monkeypatch, tmp_path
):
    """Between looking for a key and storing one, another machine does all of it."""
    other = tmp_path / "other"
    new = key_pair._new_private_half

    def after_another_machine() -> str:
        monkeypatch.setattr(key_pair, "_new_private_half", new)
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("HOME", str(other))
            key_pair.ensure(account)
        return new()

    monkeypatch.setattr(key_pair, "_new_private_half", after_another_machine)
    path = key_pair.ensure(account)
    theirs = other / ".ssh" / "txl" / path.name
    assert path.read_text() == theirs.read_text()
    assert registered(aws.client("ec2")) == public_half(path)


def test_a_key_whose_stored_half_was_lost_is_stored_again_from_this_machine(account, ssm, ec2):
    path = key_pair.ensure(account)
    kept = path.read_text()
    ssm.delete_parameter(Name=PARAMETER)
    assert key_pair.missing(account)
    key_pair.ensure(account)
    stored = ssm.get_parameter(Name=PARAMETER, WithDecryption=True)["Parameter"]["Value"]
    assert (path.read_text(), stored) == (kept, kept)


def test_a_key_whose_private_half_is_lost_everywhere_is_replaced(account, ssm, ec2):
    path = key_pair.ensure(account)
    before = registered(ec2)
    ssm.delete_parameter(Name=PARAMETER)
    path.unlink()
    key_pair.ensure(account)
    assert registered(ec2) == public_half(path) != before


def test_a_damaged_copy_on_this_machine_is_replaced(account):
    path = key_pair.ensure(account)
    kept = path.read_text()
    path.write_text("no key")
    assert key_pair.ensure(account).read_text() == kept


def test_a_key_pair_of_that_name_that_is_somebody_elses_is_left_alone(account, ec2):
    ec2.create_key_pair(KeyName=NAME)
    with pytest.raises(UserError, match=f"{NAME} in us-east-1 was not made by this launcher"):
        key_pair.ensure(account)
    assert len(ec2.describe_key_pairs()["KeyPairs"]) == 1


def test_a_stored_half_that_is_no_key_is_named(account, ssm):
    ssm.put_parameter(Name=PARAMETER, Value="no key", Type="SecureString")
    with pytest.raises(UserError, match=f"{PARAMETER} holds no SSH key"):
        key_pair.ensure(account)


def test_a_home_that_cannot_be_written_is_named(account, tmp_path):
    (tmp_path / "home").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot keep the SSH key in .*: Not a directory"):
        key_pair.ensure(account)


@pytest.mark.parametrize("name", ["../../x", "txl-../x", "theirs", "txl-a b", "txl-x\n", ""])
def test_keys_that_are_not_the_launchers_are_not_asked_for(name, account, aws):
    with pytest.raises(UserError, match="is not a key pair of this launcher") as error:
        key_pair.fetch(account, name)
    assert str(error.value).isprintable()


def test_a_key_that_is_nowhere_is_named(account):
    with pytest.raises(UserError, match="no private half of the key pair txl-bob"):
        key_pair.fetch(account, "txl-bob")


def test_an_unused_key_pair_is_removed_from_everywhere(account, ec2):
    assert key_pair.unused(account, set()) == []
    path = key_pair.ensure(account)
    assert key_pair.unused(account, {NAME}) == []
    assert key_pair.unused(account, {"other"}) == [Thing("key pair", NAME)]
    key_pair.remove(account, NAME)
    key_pair.remove(account, NAME)
    assert ec2.describe_key_pairs()["KeyPairs"] == []
    assert PARAMETER not in ssm_backends[ACCOUNT][REGION]._parameters
    assert not path.exists()


def test_a_key_pair_of_that_name_that_is_somebody_elses_is_not_removed(aws, account):
    aws.client("ec2").create_key_pair(KeyName="txl-moto")
    assert key_pair.unused(account, set()) == []
