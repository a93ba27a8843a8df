"""The bucket: closed, and nobody else's."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import ClientError

from launcher import log_bucket
from launcher.aws import Account
from launcher.things import TAGS, Thing
from tests.launcher.cloud import ACCOUNT, OTHER_ACCOUNT, Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]

OWN = f"txl-{ACCOUNT}-us-east-1"
WORDS = [f"bucket {OWN}: private, encrypted, over TLS only"]


@pytest.fixture
def s3(aws: Cloud) -> Any:
    return aws.client("s3")


def test_the_bucket_is_the_accounts_own_in_the_region_or_the_one_that_is_named(account, aws):
    assert log_bucket.bucket_name(account, "") == OWN
    assert log_bucket.bucket_name(aws.account("eu-west-1"), "") == f"txl-{ACCOUNT}-eu-west-1"
    assert log_bucket.bucket_name(account, "mine") == "mine"


@pytest.mark.parametrize(
    "name", ["ab", "A-bucket", "with.dot", "../x", "a" * 64, "x\n", "-abc", "abc-"]
)
def test_what_can_be_no_bucket_is_refused(name, account):
    with pytest.raises(UserError, match="cannot be a bucket"):
        log_bucket.bucket_name(account, name)


def test_a_new_bucket_is_private_encrypted_and_over_tls_only(account, s3):
    assert log_bucket.missing(account, OWN) == WORDS
    log_bucket.ensure(account, OWN)
    assert log_bucket.missing(account, OWN) == []
    public = s3.get_public_access_block(Bucket=OWN)["PublicAccessBlockConfiguration"]
    assert len(public) == 4 and all(public.values())
    (rule,) = s3.get_bucket_encryption(Bucket=OWN)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (ownership,) = s3.get_bucket_ownership_controls(Bucket=OWN)["OwnershipControls"]["Rules"]
    assert ownership["ObjectOwnership"] == "BucketOwnerEnforced"
    (statement,) = json.loads(s3.get_bucket_policy(Bucket=OWN)["Policy"])["Statement"]
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == (
        "Deny",
        "*",
        "s3:*",
    )
    assert statement["Resource"] == [f"arn:aws:s3:::{OWN}", f"arn:aws:s3:::{OWN}/*"]
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert s3.get_bucket_tagging(Bucket=OWN)["TagSet"] == TAGS
    (abandoned,) = s3.get_bucket_lifecycle_configuration(Bucket=OWN)["Rules"]
    assert abandoned["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 7


def test_a_bucket_lies_in_the_region_of_the_hosts(aws):
    account = aws.account("eu-west-1")
    bucket = log_bucket.bucket_name(account, "")
    log_bucket.ensure(account, bucket)
    where = aws.client("s3").get_bucket_location(Bucket=bucket)["LocationConstraint"]
    assert where == "eu-west-1"
    with pytest.raises(UserError, match=f"{bucket} is in eu-west-1 .* would be in us-east-1"):
        log_bucket.missing(aws.account("us-east-1"), bucket)


def test_a_second_launch_changes_nothing(account, s3):
    log_bucket.ensure(account, OWN)
    asked: list[str] = []
    account.client("s3").meta.events.register(
        "before-call.s3", lambda model, **_: asked.append(model.name), unique_id="asked"
    )
    log_bucket.ensure(account, OWN)
    account.client("s3").meta.events.unregister("before-call.s3", unique_id="asked")
    assert asked
    assert [name for name in asked if not name.startswith(("Get", "Head"))] == []


def test_every_request_says_whose_the_bucket_must_be(account, s3):
    owners: list[Any] = []
    account.client("s3").meta.events.register(
        "before-parameter-build.s3",
        lambda params, model, **_: owners.append((model.name, params.get("ExpectedBucketOwner"))),
        unique_id="owners",
    )
    log_bucket.ensure(account, OWN)
    log_bucket.unused(account)
    log_bucket.remove(account, OWN)
    account.client("s3").meta.events.unregister("before-parameter-build.s3", unique_id="owners")
    assert {owner for name, owner in owners if name != "CreateBucket"} == {ACCOUNT}


def test_launches_at_once_make_one_bucket(account, s3):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: log_bucket.ensure(account, OWN), range(8)))
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == [OWN]
    assert log_bucket.missing(account, OWN) == []


def test_a_bucket_that_was_opened_is_closed_again_and_keeps_other_rules(account, s3):
    log_bucket.ensure(account, OWN)
    own_rule = {
        "Sid": "Theirs",
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:DeleteObject",
        "Resource": f"arn:aws:s3:::{OWN}/runs/precious/*",
    }
    policy = {"Version": "2012-10-17", "Statement": [own_rule]}
    s3.put_bucket_policy(Bucket=OWN, Policy=json.dumps(policy))
    assert log_bucket.missing(account, OWN) == [
        f"settings of the bucket {OWN}: private, encrypted, over TLS only"
    ]
    log_bucket.ensure(account, OWN)
    statements = json.loads(s3.get_bucket_policy(Bucket=OWN)["Policy"])["Statement"]
    assert [statement["Sid"] for statement in statements] == ["Theirs", "TlsOnly"]
    s3.delete_public_access_block(Bucket=OWN)
    assert log_bucket.missing(account, OWN)
    log_bucket.ensure(account, OWN)
    assert log_bucket.missing(account, OWN) == []


def test_a_launch_that_was_killed_after_making_the_bucket_is_completed(account, s3):
    s3.create_bucket(Bucket=OWN)
    log_bucket.ensure(account, OWN)
    assert s3.get_bucket_tagging(Bucket=OWN)["TagSet"] == TAGS
    assert log_bucket.missing(account, OWN) == []


def test_a_bucket_that_the_user_made_is_used_as_it_stands(account, s3):
    s3.create_bucket(Bucket="mine")
    assert log_bucket.missing(account, "mine") == []
    log_bucket.ensure(account, "mine")
    with pytest.raises(ClientError, match="NoSuchBucketPolicy"):
        s3.get_bucket_policy(Bucket="mine")


def test_a_named_bucket_that_is_missing_is_made_and_closed(account, s3):
    log_bucket.ensure(account, "mine")
    assert s3.get_bucket_policy(Bucket="mine")
    assert s3.get_bucket_tagging(Bucket="mine")["TagSet"] == TAGS


def test_a_bucket_of_somebody_else_is_refused(aws, account):
    """moto answers for all accounts alike, so the refusal of S3 stands in the client."""
    aws.client("s3", OTHER_ACCOUNT).create_bucket(Bucket=OWN)
    forbidden(account)
    for act in (log_bucket.missing, log_bucket.ensure):
        with pytest.raises(UserError, match=f"{OWN} belongs to another account.*--bucket"):
            act(account, OWN)
    allowed(account)
    assert aws.client("s3", OTHER_ACCOUNT).list_buckets()["Buckets"][0]["Name"] == OWN


def test_a_bucket_that_somebody_else_makes_meanwhile_is_refused(aws, account):
    def make(**_: object) -> None:
        aws.client("s3", OTHER_ACCOUNT).create_bucket(Bucket="coveted")

    events = account.client("s3").meta.events
    events.register("before-call.s3.CreateBucket", make, unique_id="make")
    try:
        with pytest.raises(UserError, match="coveted belongs to another account"):
            log_bucket.ensure(account, "coveted")
    finally:
        events.unregister("before-call.s3.CreateBucket", unique_id="make")


def forbidden(account: Account) -> None:
    """S3 answers a question for a bucket of which another account is said to be the owner so."""

    class Response:
        status_code = 403

    answer = (Response(), {"Error": {"Code": "403", "Message": "Forbidden"}})
    account.client("s3").meta.events.register(
        "before-call.s3.HeadBucket", lambda **_: answer, unique_id="forbidden"
    )


def allowed(account: Account) -> None:
    account.client("s3").meta.events.unregister("before-call.s3.HeadBucket", unique_id="forbidden")


def test_an_empty_bucket_is_unused_and_can_be_removed(account, s3):
    assert log_bucket.unused(account) == []
    log_bucket.ensure(account, OWN)
    s3.delete_bucket_policy(Bucket=OWN)  # moto would take this client's HTTP for no TLS
    s3.put_object(Bucket=OWN, Key="runs/trial/config.json", Body=b"{}")
    assert log_bucket.unused(account) == []
    s3.delete_object(Bucket=OWN, Key="runs/trial/config.json")
    assert log_bucket.unused(account) == [Thing("bucket", OWN)]
    log_bucket.remove(account, OWN)
    log_bucket.remove(account, OWN)
    assert s3.list_buckets()["Buckets"] == []
