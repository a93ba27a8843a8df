"""An AWS account in one region, and what the errors of AWS mean to the user."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    InvalidRegionError,
    LoginError,
    NoAuthTokenError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as AwsConnectionError

from launcher.names import PROG, printable, quoted
from txl_jax.config import nearest
from txl_jax.errors import UserError

_ATTEMPTS = 5
_SIGNED_OFF = (LoginError, NoAuthTokenError, SSOError, TokenRetrievalError)
UNREACHABLE = (AwsConnectionError, HTTPClientError)
"""What boto3 raises when the network or AWS is away."""
_NO_CREDENTIALS = (CredentialRetrievalError, NoCredentialsError, PartialCredentialsError)

_DENIED = {
    *("AccessDenied", "AccessDeniedException", "AuthorizationError"),
    *("Client.UnauthorizedOperation", "UnauthorizedOperation", "403"),
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_UNKNOWN_KEYS = {
    *("AuthFailure", "IncompleteSignature", "InvalidAccessKeyId", "InvalidClientTokenId"),
    *("InvalidToken", "SignatureDoesNotMatch", "UnrecognizedClientException"),
}
_CLOCK = {"RequestExpired", "RequestTimeTooSkewed"}
THROTTLED = {
    *("RequestLimitExceeded", "RequestThrottled", "SlowDown", "Throttling"),
    *("ThrottlingException", "TooManyRequestsException"),
}
"""Codes of answers that say: not so fast."""
_QUOTAS = {"MaxSpotInstanceCountExceeded", "TooManyBuckets"}

_ACTION = re.compile(r"perform:? ([a-z0-9-]+:[A-Za-z0-9*]+)")
_RESOURCE = re.compile(r"on resource: (\S+)")

# Names that programs make up for the sessions of a role, and EC2 for those of an instance.
_MADE_UP_SESSION = re.compile(r"(botocore-|aws-sdk-|aws-go-sdk-|AWSCLI-).*|i-[0-9a-f]{8,}|[0-9]+")


@dataclass(frozen=True)
class Account:
    """Whose credentials are used, and where."""

    region: str
    id: str
    """The account's twelve digits."""
    caller: str
    """ARN of the caller; without the session's name where a machine makes one up each time."""
    user: str
    """The caller's short name: letters, digits, `.`, `_` and `-`."""
    configured: str
    """The region of commands that name none; empty: they have to name one."""
    _session: boto3.Session = field(repr=False, compare=False)
    _clients: dict[tuple[str, str, int], Any] = field(
        default_factory=dict, repr=False, compare=False
    )
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, region: str = "") -> "Account":
        """The account whose credentials boto3 finds; `region` goes before the configured one.

        Raises UserError without credentials or region, or if AWS does not know them.
        """
        with explained():
            session = boto3.Session(region_name=region or None)
            chosen = _check_region(session)
            configured = (boto3.Session() if region else session).region_name or ""
            identity = session.client("sts", config=_settings(_ATTEMPTS)).get_caller_identity()
        caller, user = _who(identity["Arn"])
        return cls(chosen, identity["Account"], caller, user, configured, session)

    @property
    def partition(self) -> str:
        """First part of the account's ARNs: aws, aws-cn or aws-us-gov."""
        return self.caller.split(":")[1]

    def command(self, verb: str, *words: str) -> str:
        """What to type for a command of the launcher to be about this region."""
        where = ("--region", self.region) if self.region != self.configured else ()
        return f"`{quoted([*PROG.split(), verb, *words, *where])}`"

    def client(self, service: str, region: str = "", attempts: int = _ATTEMPTS) -> Any:
        """boto3's client of a service, in the account's region or another; threads may share it.

        Args:
          attempts: how often a request is sent before AWS' refusal to serve it counts.
        """
        key = service, region or self.region, attempts
        with self._lock:  # a session must not make two clients at once
            if key not in self._clients:
                settings = _settings(attempts)
                if service == "s3":
                    # Otherwise boto3 signs URLs as some regions refuse, and for the host of all
                    # regions, which sends on to the bucket's own where the signature is wrong.
                    settings = settings.merge(
                        Config(signature_version="s3v4", s3={"addressing_style": "virtual"})
                    )
                self._clients[key] = self._session.client(
                    service, region_name=key[1], config=settings
                )
            return self._clients[key]


@contextmanager
def explained() -> Iterator[None]:
    """Turns whatever boto3 raises in the block into a UserError: one line, and what to do.

    It also decorates functions. Requests with wrong parameters are bugs and stay as they are.
    """
    try:
        yield
    except ParamValidationError:
        raise
    except (BotoCoreError, Boto3Error, ClientError) as error:
        raise UserError(_explain(error)) from error


def error_code(error: ClientError) -> str:
    """The code of AWS' answer, such as `InsufficientInstanceCapacity`."""
    return error.response.get("Error", {}).get("Code", "")


def is_quota(error: ClientError) -> bool:
    """Whether AWS says that the account has as many of something as it may have."""
    code = error_code(error)
    return code in _QUOTAS or code.endswith("LimitExceeded")


def error_message(error: ClientError) -> str:
    """The words of AWS' answer in one line."""
    message = error.response.get("Error", {}).get("Message", "")
    return printable(" ".join(message.split()))


def _settings(attempts: int) -> Config:
    return Config(
        connect_timeout=5,
        # RunInstances takes its time when it starts many hosts.
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
    )


def _check_region(session: boto3.Session) -> str:
    region = session.region_name
    if not region:
        raise UserError("no AWS region: name one with --region, or run `aws configure`")
    known = [
        name
        for partition in session.get_available_partitions()
        for name in session.get_available_regions("ec2", partition)
    ]
    if region not in known:
        raise UserError(f"there is no AWS region {printable(region)!r}{nearest(region, known)}")
    return region


def _who(arn: str) -> tuple[str, str]:
    """The caller's ARN, without a session name that is made up each time, and a short name."""
    head, _, rest = arn.partition("/")
    if not rest:
        return arn, arn.rpartition(":")[2]  # the account's root
    *path, name = rest.split("/")
    if head.endswith("assumed-role") and _MADE_UP_SESSION.fullmatch(name):
        arn, name = f"{head}/{'/'.join(path)}", path[-1]
    return arn, re.sub(r"[^A-Za-z0-9._-]", "-", name)[:64]


def _explain(error: Exception) -> str:
    if isinstance(error, ClientError):
        return _explain_answer(error)
    line = printable(" ".join(str(error).split()))
    if isinstance(error, _SIGNED_OFF):
        return f"the sign-on to AWS has ended ({line}): run `aws sso login` or `aws login`"
    if isinstance(error, _NO_CREDENTIALS):
        return f"no AWS credentials ({line}): run `aws configure`, or set AWS_PROFILE"
    if isinstance(error, ProfileNotFound):
        return f"{line}: correct AWS_PROFILE, or run `aws configure --profile NAME`"
    if isinstance(error, (NoRegionError, InvalidRegionError)):
        return f"{line}: name a region with --region, or run `aws configure`"
    if isinstance(error, UNREACHABLE):
        return f"AWS cannot be reached ({line}): check the network and the region"
    return f"AWS: {line}"


def _explain_answer(error: ClientError) -> str:
    code, message, operation = error_code(error), error_message(error), error.operation_name
    if code in _DENIED:
        action = _ACTION.search(message)
        on = _RESOURCE.search(message)
        return (
            f"AWS denies {action[1] if action else operation}"
            f"{f' on {on[1]}' if on else ''}: ask the account's administrator for this permission"
        )
    if code in _EXPIRED:
        return "the AWS credentials have expired: run `aws sso login`, or fetch new ones"
    if code in _UNKNOWN_KEYS:
        return f"AWS does not accept the credentials ({code}: {message}): run `aws configure`"
    if code in _CLOCK:
        return f"AWS finds the time of the request wrong ({code}): set this machine's clock"
    if code in THROTTLED:
        return f"AWS asks to slow down ({code} at {operation}): try again in a minute"
    if is_quota(error):
        return f"a quota of the account is reached ({code}: {message}): raise it in Service Quotas"
    return f"AWS refuses {operation} ({code}: {message})"
