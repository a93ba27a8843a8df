"""What a launched run leaves open, readable or executable: nothing that it should not."""

import base64
import json
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cloud import policy
from tests.cloud.cloud import LocalCloud, missing
from tests.cloud.typed import OPEN, TINY, Typed

pytest_plugins = ["tests.cloud.fixtures"]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.cloud,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
BUCKET = "txl-123456789012-us-east-1"
HOSTILE = "x'\"; touch PWNED; $(touch PWNED) `touch PWNED` \\\n&& touch PWNED #\u00e9"
"""A folder's name that a shell would make something else of."""


@dataclass
class Watched:
    """Every command line that was seen on this machine and its hosts."""

    seen: set[str] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.over.is_set():
            for process in psutil.process_iter():
                try:
                    self.seen.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.02)


@dataclass
class Launched:
    """A run of two hosts that trains, its words as hostile as words can be."""

    cloud: LocalCloud
    text: str
    command_lines: set[str]

    @property
    def hosts(self) -> list[Any]:
        return self.cloud.instances("running")

    def run(self, line: str) -> list[str]:
        """What each host says to a line of shell."""
        command = Typed(self.cloud.environ, "run", "safe", "--", line)
        assert command.end() == 0, command.text
        return command.lines


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    watched = Watched()
    thread = threading.Thread(target=watched.watch)
    with LocalCloud(tmp_path_factory.mktemp("cloud")) as cloud:
        thread.start()
        words = ["--config=quickstart", "--name=safe", "--machines=2", "--max-tokens=6400000"]
        launch = Typed(cloud.environ, *words, *TINY, f"--data-dir={HOSTILE}", "--yes", OPEN)
        status = launch.end()
        Typed(cloud.environ, "run", "safe", "--", "true").end()
        watched.over.set()
        thread.join()
        assert status == 0, launch.text
        yield Launched(cloud, launch.text, watched.seen)


def secrets_of(cloud: LocalCloud) -> dict[str, str]:
    """Texts that nobody may see who does not hold them."""
    (key,) = (cloud.folder / "laptop/.ssh/txl").iterdir()
    secrets = {
        "the caller's secret access key": cloud.environ["AWS_SECRET_ACCESS_KEY"],
        "the private half of the caller's key pair": key.read_text().splitlines()[2],
    }
    for host, keys in cloud._keys.items():
        secrets[f"the secret access key of {host}"] = keys["SecretAccessKey"]
        secrets[f"the session token of {host}"] = keys["Token"]
    return secrets


def host_key(launched: Launched) -> str:
    """A line of the private half of the hosts' own key."""
    path = launched.cloud.machines.folder(launched.hosts[0].id) / "spec.json"
    data = json.loads(path.read_text())["user_data"]
    return data["ssh_keys"]["ed25519_private"].splitlines()[2]


def test_only_ssh_from_the_caller_and_the_group_itself_are_let_in(launched: Launched) -> None:
    ec2 = launched.cloud.client("ec2")
    described = ec2.describe_instances(InstanceIds=[host.id for host in launched.hosts])
    groups = {
        group["GroupId"]
        for reservation in described["Reservations"]
        for instance in reservation["Instances"]
        for interface in instance["NetworkInterfaces"]
        for group in interface["Groups"]
    }
    (group_id,) = groups
    (group,) = ec2.describe_security_groups(GroupIds=[group_id])["SecurityGroups"]
    found = []
    for rule in group["IpPermissions"]:
        sources = [r["CidrIp"] for r in rule["IpRanges"]]
        sources += [r["CidrIpv6"] for r in rule["Ipv6Ranges"]]
        sources += [pair["GroupId"] for pair in rule["UserIdGroupPairs"]]
        found.append((rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort"), sources))
    assert sorted(found, key=str) == sorted(
        [("tcp", 22, 22, ["127.0.0.0/8"]), ("-1", None, None, [group_id])], key=str
    )
    outward = [
        pair["GroupId"]
        for rule in group["IpPermissionsEgress"]
        for pair in rule["UserIdGroupPairs"]
    ]
    assert outward == [group_id], "EFA asks for it"


def test_the_metadata_service_wants_a_token_and_does_not_pass_it_on(launched: Launched) -> None:
    for host in launched.hosts:
        assert host.metadata_options.http_tokens == "required"
        assert int(host.metadata_options.http_put_response_hop_limit) == 1


def test_the_role_gives_the_bucket_and_nothing_else(launched: Launched) -> None:
    own = launched.hosts[0].id
    role = launched.cloud._role(own)
    trusted = json.loads(role.assume_role_policy_document)["Statement"]
    assert [statement["Principal"] for statement in trusted] == [{"Service": "ec2.amazonaws.com"}]
    assert not role.managed_policies
    documents = list(role.policies.values())

    def may(action: str, resource: str, **context: str | list[str]) -> bool:
        names = {"userid": "aws:userid", "target": "ec2:InstanceID", "keys": "aws:TagKeys"}
        given = {names[name]: value for name, value in context.items()}
        return policy.allows(documents, action, resource, given)

    for action in ("GetObject", "PutObject", "DeleteObject"):
        assert may(f"s3:{action}", f"arn:aws:s3:::{BUCKET}/runs/safe/x")
        assert not may(f"s3:{action}", "arn:aws:s3:::another/runs/safe/x")
        assert not may(f"s3:{action}", f"arn:aws:s3:::{BUCKET}-2/x")
    assert may("s3:ListBucket", f"arn:aws:s3:::{BUCKET}")
    for action in ("s3:DeleteBucket", "s3:PutBucketPolicy", "s3:PutBucketAcl"):
        assert not may(action, f"arn:aws:s3:::{BUCKET}")
    for action in (
        "ec2:CreateTags",
        "ec2:RunInstances",
        "ec2:TerminateInstances",
        "iam:PassRole",
        "ssm:GetParameter",
    ):
        assert not may(action, "*", target=own, userid=f"AROA:{own}", keys=[])


def test_hosts_are_held_to_their_role(launched: Launched) -> None:
    """By what they ask for, not by what the policy says."""
    own = launched.hosts[0].id
    launched.cloud.client("s3").create_bucket(Bucket="another")
    python = "cd txl/work && . ../environment.sh && exec ../venv/bin/python -c "
    tag = f"Resources=['{own}'], Tags=[{{'Key': 'txl:owner', 'Value': 'x'}}]"
    tries = {
        f"boto3.client('s3').put_object(Bucket='{BUCKET}', Key='x', Body=b'')": True,
        f"boto3.client('ec2').create_tags({tag})": False,
        "boto3.client('s3').put_object(Bucket='another', Key='x', Body=b'')": False,
        "boto3.client('ssm').get_parameter(Name='/txl/keys/txl-laptop')": False,
    }
    script = "import boto3\n" + "".join(
        f"try: {code}; print({number}, 'allowed')\nexcept Exception: print({number}, 'denied')\n"
        for number, code in enumerate(tries)
    )
    said = launched.run(python + shlex.quote(script))
    assert len(said) == 2 * len(tries)
    assert {line for line in said if "allowed" in line} == {
        f"safe-{index}: {number} allowed"
        for index in range(len(launched.hosts))
        for number, allowed in enumerate(tries.values())
        if allowed
    }


def test_hosts_wait_for_a_slow_metadata_service(launched: Launched) -> None:
    ask = "import boto3; boto3.client('sts').get_caller_identity(); print('known')"
    launched.cloud.metadata.delay = 2.0
    said = launched.run(
        f"cd txl/work && . ../environment.sh && ../venv/bin/python -c {shlex.quote(ask)}"
    )
    launched.cloud.metadata.delay = 0.0
    assert sorted(said) == ["safe-0: known", "safe-1: known"]


def test_user_data_holds_no_secret_but_the_hosts_key(launched: Launched) -> None:
    found = launched.cloud.client("ec2").describe_instance_attribute(
        InstanceId=launched.hosts[0].id, Attribute="userData"
    )
    text = base64.b64decode(found["UserData"]["Value"]).decode()
    for what, secret in secrets_of(launched.cloud).items():
        assert secret not in text, what
    assert text.count("PRIVATE KEY") == 2, "where the one key begins and ends"
    assert host_key(launched) in text.replace("\\n", "\n")


def test_no_command_line_shows_a_secret(launched: Launched) -> None:
    seen = launched.command_lines
    assert any("txl_jax.train" in line for line in seen), "hosts' processes were watched"
    assert any("unpack" in line for line in seen)
    secrets = secrets_of(launched.cloud) | {"the hosts' key": host_key(launched)}
    for line in seen:
        for what, secret in secrets.items():
            assert secret not in line, what
        assert not re.search(r"X-Amz-(Signature|Credential)|Signature=", line), line


def test_nothing_that_is_kept_holds_a_secret(launched: Launched) -> None:
    """What the launcher printed, all of S3, and all files of the hosts' logins and logs."""
    cloud = launched.cloud
    texts = {"what the launcher printed": launched.text.encode()}
    s3 = cloud.client("s3")
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for entry in page["Contents"]:
            name = entry["Key"]
            texts[name] = s3.get_object(Bucket=BUCKET, Key=name)["Body"].read()
    for host in launched.hosts:
        for folder in (cloud.home(host.id), cloud.log(host.id)):
            for path in folder.rglob("*"):
                if path.is_file() and not path.is_symlink() and "venv" not in path.parts:
                    texts[str(path)] = path.read_bytes()
    secrets = secrets_of(cloud) | {"the hosts' key": host_key(launched)}
    for name, content in texts.items():
        for what, secret in secrets.items():
            assert secret.encode() not in content, f"{what} in {name}"


def test_files_of_hosts_and_laptop_are_their_owners_alone(launched: Launched) -> None:
    (key,) = (launched.cloud.folder / "laptop/.ssh/txl").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    for host in launched.hosts:
        folder = launched.cloud.home(host.id) / "txl"
        assert folder.stat().st_mode & 0o077 == 0
        for name in ("train.sh", "environment.sh", "output-0.txt", "output-1.txt", "setup.log"):
            path = folder / name
            assert not path.exists() or path.stat().st_mode & 0o077 == 0, name


def test_words_reach_the_trainer_as_typed_and_run_nothing(launched: Launched) -> None:
    s3 = launched.cloud.client("s3")
    record = s3.get_object(Bucket=BUCKET, Key="launches/safe.json")["Body"].read()
    assert f"--data-dir={HOSTILE}" in json.loads(record)["words"]
    for host in launched.hosts:
        work = launched.cloud.home(host.id) / "txl/work"
        assert (work / HOSTILE).is_dir(), "the folder with that name, and no other"
        names = [path.name for path in launched.cloud.home(host.id).rglob("PWNED")]
        assert not names
    assert not list(Path.cwd().rglob("PWNED"))


def test_the_bucket_is_private_encrypted_and_over_tls_only(launched: Launched) -> None:
    s3 = launched.cloud.client("s3")
    blocked = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert all(blocked.values())
    assert len(blocked) == 4
    rules = s3.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rules
    document = json.loads(s3.get_bucket_policy(Bucket=BUCKET)["Policy"])
    (statement,) = [s for s in document["Statement"] if s["Effect"] == "Deny"]
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert not [s for s in document["Statement"] if s["Effect"] == "Allow"]


def test_everything_that_was_made_says_who_made_it(launched: Launched) -> None:
    ec2, mark = launched.cloud.client("ec2"), {"Key": "txl:made-by", "Value": "txl-launcher"}
    made: list[list[dict[str, str]]] = [
        ec2.describe_key_pairs()["KeyPairs"][0]["Tags"],
        launched.cloud.client("s3").get_bucket_tagging(Bucket=BUCKET)["TagSet"],
    ]
    groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["txl-*"]}])
    made += [group["Tags"] for group in groups["SecurityGroups"]]
    made += [group["Tags"] for group in ec2.describe_placement_groups()["PlacementGroups"]]
    for reservation in ec2.describe_instances()["Reservations"]:
        made += [instance["Tags"] for instance in reservation["Instances"]]
    roles = launched.cloud.client("iam").list_roles(PathPrefix="/txl/")["Roles"]
    made += [
        launched.cloud.client("iam").list_role_tags(RoleName=role["RoleName"])["Tags"]
        for role in roles
    ]
    assert len(made) > 6
    for tags in made:
        assert mark in tags


def test_the_trainer_listens_in_the_private_network_only(launched: Launched) -> None:
    output = launched.cloud.home(launched.hosts[0].id) / "txl/output.txt"
    while "[Gloo] Rank 0 is connected" not in output.read_text():
        time.sleep(0.1)
    done = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True)
    addresses = {line.split()[3] for line in done.stdout.splitlines()}
    assert f"[::ffff:{launched.hosts[0].private_ip}]:8476" in addresses, "the coordinator"
    everywhere = {"0.0.0.0", "[::]", "*"}
    assert not [address for address in addresses if address.rpartition(":")[0] in everywhere]
