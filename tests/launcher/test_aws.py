"""The account, and what the errors of AWS become."""

import re
import threading
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, ParamValidationError

from launcher.aws import Account, explained
from tests.launcher.cloud import ACCOUNT, Cloud
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.fixtures"]


def words_of(error: Exception) -> str:
    with pytest.raises(UserError) as told, explained():
        raise error
    words = str(told.value)
    assert words.isprintable()
    return words


def answer(code: str, message: str = "as it is", operation: str = "RunInstances") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, operation)


def test_the_account_is_the_one_of_the_credentials(aws):
    account = aws.account()
    assert (account.id, account.region) == (ACCOUNT, "us-east-1")
    assert account.caller.startswith(f"arn:aws:sts::{ACCOUNT}:")
    assert account.user == "moto"
    assert account.partition == "aws"


def test_a_region_that_is_named_goes_before_the_configured_one(aws):
    assert aws.account("eu-west-1").region == "eu-west-1"
    assert aws.account("eu-west-1").client("ec2").meta.region_name == "eu-west-1"


def test_an_unknown_region_is_refused_with_the_nearest(aws):
    with pytest.raises(UserError, match=r"'us-eas-1' \(did you mean us-east-1\?\)"):
        aws.account("us-eas-1")


def test_without_a_region_it_says_what_to_do(aws, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(UserError, match=r"--region.*aws configure"):
        aws.account()


def test_without_credentials_it_says_what_to_do(aws, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"no AWS credentials.*aws configure"):
        aws.account()


def test_an_unknown_profile_is_named(aws, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "elsewhere")
    with pytest.raises(UserError, match=r"elsewhere.*AWS_PROFILE"):
        aws.account()


def test_an_expired_sign_on_says_what_to_do(aws, monkeypatch, tmp_path):
    config = tmp_path / "config"
    config.write_text(
        "[profile work]\nsso_start_url = https://127.0.0.1/start\nsso_region = us-east-1\n"
        "sso_account_id = 123456789012\nsso_role_name = x\nregion = us-east-1\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "work")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"sign-on to AWS has ended.*aws sso login"):
        aws.account()


def test_an_unreachable_aws_says_so(aws, monkeypatch):
    monkeypatch.setattr("launcher.aws._ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached.*127\.0\.0\.1:9.*network"):
        aws.account()


def test_a_client_is_made_once_however_many_threads_ask(account):
    clients: list[Any] = []
    threads = [
        threading.Thread(target=lambda: clients.append(account.client("ec2"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clients) == 8
    assert len({id(client) for client in clients}) == 1


def test_a_client_tries_as_often_as_it_is_told(aws, account):
    aws.refuse("DescribeRegions", "RequestLimitExceeded", status=503, times=2)
    with pytest.raises(UserError, match="slow down"), explained():
        account.client("ec2", attempts=1).describe_regions()
    assert account.client("ec2").describe_regions()["Regions"]


@pytest.mark.parametrize(
    ("arn", "caller", "user"),
    [
        ("arn:aws:iam::1:user/alice", "arn:aws:iam::1:user/alice", "alice"),
        ("arn:aws:iam::1:user/team/bob", "arn:aws:iam::1:user/team/bob", "bob"),
        ("arn:aws:iam::1:user/2048", "arn:aws:iam::1:user/2048", "2048"),
        ("arn:aws:iam::1:root", "arn:aws:iam::1:root", "root"),
        (
            "arn:aws:sts::1:assumed-role/Admin/eve@example.com",
            "arn:aws:sts::1:assumed-role/Admin/eve@example.com",
            "eve-example.com",
        ),
        (
            "arn:aws:sts::1:assumed-role/Admin/botocore-session-1700000000",
            "arn:aws:sts::1:assumed-role/Admin",
            "Admin",
        ),
        (
            "arn:aws:sts::1:assumed-role/Worker/i-0123456789abcdef0",
            "arn:aws:sts::1:assumed-role/Worker",
            "Worker",
        ),
        (
            "arn:aws:sts::1:assumed-role/A/i-robot",
            "arn:aws:sts::1:assumed-role/A/i-robot",
            "i-robot",
        ),
        ("arn:aws:iam::1:user/a b$(id)", "arn:aws:iam::1:user/a b$(id)", "a-b--id-"),
    ],
)
def test_a_caller_has_a_name_that_stays_and_that_files_can_have(
    arn, caller, user, monkeypatch, aws
):
    def as_somebody(session: boto3.Session, *words: Any, **more: Any) -> Any:
        client: Any = own(session, *words, **more)
        client.get_caller_identity = lambda: {"Arn": arn, "Account": "1"}
        return client

    own = boto3.Session.client
    monkeypatch.setattr(boto3.Session, "client", as_somebody)
    account = Account.open()
    assert (account.caller, account.user) == (caller, user)


def test_a_denied_action_is_named_without_what_nobody_can_read():
    words = words_of(
        answer(
            "UnauthorizedOperation",
            "You are not authorized to perform this operation. User: arn:aws:iam::1:user/bob is "
            "not authorized to perform: ec2:RunInstances on resource: "
            "arn:aws:ec2:us-east-1:1:instance/* because no identity-based policy allows the "
            "ec2:RunInstances action. Encoded authorization failure message: " + "x1Y" * 300,
        )
    )
    assert words == (
        "AWS denies ec2:RunInstances on arn:aws:ec2:us-east-1:1:instance/*: ask the account's "
        "administrator for this permission"
    )


def test_a_denial_that_does_not_name_the_action_names_the_operation():
    words = words_of(answer("UnauthorizedOperation", "You are not authorized", "CreateVpc"))
    assert words.startswith("AWS denies CreateVpc: ")
    assert words_of(answer("403", "Forbidden", "HeadBucket")).startswith("AWS denies HeadBucket: ")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ExpiredToken", "expired: run `aws sso login`"),
        ("InvalidClientTokenId", "does not accept the credentials.*aws configure"),
        ("AuthFailure", "does not accept the credentials.*aws configure"),
        ("RequestExpired", "clock"),
        ("RequestLimitExceeded", r"slow down \(RequestLimitExceeded at RunInstances\)"),
        ("ThrottlingException", "slow down"),
        ("VcpuLimitExceeded", "quota.*VcpuLimitExceeded: as it is.*Service Quotas"),
        ("MaxSpotInstanceCountExceeded", "quota.*Service Quotas"),
        ("SomethingElse", r"AWS refuses RunInstances \(SomethingElse: as it is\)"),
    ],
)
def test_each_answer_says_what_to_do(code, expected):
    assert re.search(expected, words_of(answer(code)))


def test_what_an_answer_says_cannot_act_on_the_terminal():
    assert "\\x1b[2J" in words_of(answer("Odd", "\x1b[2J\n  gone"))


def test_requests_with_wrong_parameters_are_bugs(account):
    with pytest.raises(ParamValidationError), explained():
        account.client("ec2").run_instances(MinCount="many")


def test_user_errors_pass_as_they_are():
    with pytest.raises(UserError, match=r"^as it was$"), explained():
        raise UserError("as it was")


def test_tests_cannot_reach_aws(aws: Cloud, account):
    for service in ("ec2", "iam", "pricing", "s3", "ssm", "sts"):
        assert account.client(service).meta.endpoint_url == aws.url


def test_a_command_that_is_told_names_the_region_unless_it_is_the_configured_one(aws, monkeypatch):
    assert aws.account().command("kill", "a") == "`python -m launcher kill a`"
    assert aws.account("us-east-1").command("kill", "a") == "`python -m launcher kill a`"
    elsewhere = "`python -m launcher kill a --region eu-west-1`"
    assert aws.account("eu-west-1").command("kill", "a") == elsewhere
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    told = aws.account("us-east-1").command("kill", "a")
    assert told == "`python -m launcher kill a --region us-east-1`"
