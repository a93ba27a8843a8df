"""The caller's SSH key pair: public half in EC2, private half in the Parameter Store.

Any machine with the caller's credentials can so reach the hosts; each keeps a copy of the private
half in ~/.ssh/txl that only its user can read. The Parameter Store decides between two launches
that make the key at once.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from launcher.aws import Account, error_code, explained
from launcher.names import printable
from launcher.things import TAGS, Thing, is_ours
from txl_jax.errors import UserError

_NAME = re.compile(r"txl-[A-Za-z0-9._-]{1,64}")


def key_name(account: Account) -> str:
    """Name of the caller's key pair."""
    return f"txl-{account.user}"


@explained()
def missing(account: Account) -> list[str]:
    """What `ensure` would make, in words."""
    name = key_name(account)
    if _stored(account, name) and _registered(account, name):
        return []
    return [f"key pair {name}, its private half in the Parameter Store as {parameter(name)}"]


@explained()
def ensure(account: Account) -> Path:
    """Makes the caller's key pair; returns where its private half lies on this machine.

    Raises UserError if a key pair of that name is not the launcher's.
    """
    name = key_name(account)
    private = _stored(account, name) or _store(
        account, name, _copy_of(account, name) or _new_private_half()
    )
    public = _public_half(private)
    if not public:
        raise UserError(
            f"the parameter {parameter(name)} holds no SSH key: delete it, and a new one is made"
        )
    _register(account, name, public)
    return _keep(account, name, private)


@explained()
def fetch(account: Account, name: str) -> Path:
    """Where the private half of a key pair lies on this machine, brought here if need be.

    Raises UserError if it is not to be had: it is another user's, or was removed.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{printable(name)!r} is not a key pair of this launcher")
    private = _stored(account, name) or _copy_of(account, name)
    if not private:
        raise UserError(f"there is no private half of the key pair {name}: {parameter(name)}")
    return _keep(account, name, private)


def unused(account: Account, in_use: set[str]) -> list[Thing]:
    """The caller's key pair, if no instance has it (`in_use`: names of those that instances have).

    Raises UserError as AWS does.
    """
    name = key_name(account)
    with explained():
        known = _registered(account, name)
        stands = is_ours(known.get("Tags")) if known else bool(_stored(account, name))
    return [Thing("key pair", name)] if stands and name not in in_use else []


@explained()
def remove(account: Account, name: str) -> None:
    """Removes both halves, and this machine's copy."""
    account.client("ec2").delete_key_pair(KeyName=name)
    try:
        account.client("ssm").delete_parameter(Name=parameter(name))
    except ClientError as error:
        if error_code(error) != "ParameterNotFound":
            raise
    _path(account, name).unlink(missing_ok=True)


def parameter(name: str) -> str:
    """Where the Parameter Store has the private half of a key pair."""
    return f"/txl/keys/{name}"


def _path(account: Account, name: str) -> Path:
    return Path.home() / ".ssh" / "txl" / f"{account.id}-{account.region}-{name}"


def _stored(account: Account, name: str) -> str | None:
    try:
        answer = account.client("ssm").get_parameter(Name=parameter(name), WithDecryption=True)
    except ClientError as error:
        if error_code(error) != "ParameterNotFound":
            raise
        return None
    return answer["Parameter"]["Value"]


def _store(account: Account, name: str, private: str) -> str:
    """Stores a private half, unless one is there; returns the one that is there then."""
    try:
        account.client("ssm").put_parameter(
            Name=parameter(name),
            Description="Private half of the SSH key pair of Transformer-XL's hosts",
            Value=private,
            Type="SecureString",
            Tags=TAGS,
        )
    except ClientError as error:
        if error_code(error) != "ParameterAlreadyExists":
            raise
        return _stored(account, name) or private
    return private


def _new_private_half() -> str:
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


def _public_half(private: str) -> str | None:
    """None: it is no private half of an SSH key."""
    try:
        key = load_ssh_private_key(private.encode(), password=None)
    except (UnsupportedAlgorithm, ValueError):
        return None
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _registered(account: Account, name: str) -> dict[str, Any] | None:
    """EC2's description of a key pair."""
    try:
        answer = account.client("ec2").describe_key_pairs(KeyNames=[name], IncludePublicKey=True)
    except ClientError as error:
        if error_code(error) != "InvalidKeyPair.NotFound":
            raise
        return None
    return answer["KeyPairs"][0]


def _register(account: Account, name: str, public: str) -> None:
    ec2 = account.client("ec2")
    found = _registered(account, name)
    if found and not is_ours(found.get("Tags")):
        raise UserError(
            f"the key pair {name} in {account.region} was not made by this launcher: rename it"
        )
    if found and found["PublicKey"].split()[:2] == public.split():
        return
    if found:
        # Its private half is lost: nobody can use it any more.
        ec2.delete_key_pair(KeyName=name)
    try:
        ec2.import_key_pair(
            KeyName=name,
            PublicKeyMaterial=public.encode(),
            TagSpecifications=[{"ResourceType": "key-pair", "Tags": TAGS}],
        )
    except ClientError as error:
        # Another launch has done it meanwhile, with the same key: the Parameter Store has one.
        if error_code(error) != "InvalidKeyPair.Duplicate":
            raise


def _copy_of(account: Account, name: str) -> str | None:
    """This machine's copy of the private half; None: there is none that is whole."""
    try:
        private = _path(account, name).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return private if _public_half(private) else None


def _keep(account: Account, name: str, private: str) -> Path:
    path = _path(account, name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _copy_of(account, name) != private or path.stat().st_mode & 0o077:
            _write(path, private)
    except OSError as error:
        raise UserError(f"cannot keep the SSH key in {path}: {error.strerror}") from error
    return path


def _write(path: Path, private: str) -> None:
    """In one step, whoever else writes it at this moment; nobody else may ever read it."""
    handle, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "w") as file:
            file.write(private)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
