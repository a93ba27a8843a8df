"""Where hosts fetch what they all need."""

from urllib.parse import parse_qs, urlsplit

import boto3
import pytest

from launcher.aws import Account
from launcher.shared import URL_SECONDS, Shared

BUCKET = "txl-123456789012-us-west-2"


def url(monkeypatch: pytest.MonkeyPatch, region: str, endpoint: str = "") -> str:
    """A signed URL; nothing is asked for it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    caller = "arn:aws:iam::123456789012:user/ada"
    session = boto3.Session(region_name=region)
    account = Account(region, "123456789012", caller, "ada", region, session)
    return Shared(account, BUCKET).url("sources/a.tar.gz")


@pytest.mark.parametrize(
    ("region", "host"),
    [
        # Of a young bucket, the host without the region sends on to this one, which refuses what
        # was signed for that.
        ("us-west-2", "s3.us-west-2.amazonaws.com"),
        ("eu-central-1", "s3.eu-central-1.amazonaws.com"),
        ("us-east-1", "s3.amazonaws.com"),
    ],
)
def test_files_are_fetched_from_the_buckets_own_region(monkeypatch, region, host):
    found = urlsplit(url(monkeypatch, region))
    assert (found.scheme, found.netloc) == ("https", f"{BUCKET}.{host}")
    words = parse_qs(found.query)
    assert words["X-Amz-Expires"] == [str(URL_SECONDS)]
    assert f"/{region}/s3/" in words["X-Amz-Credential"][0]


def test_a_server_with_an_address_of_its_own_has_the_bucket_in_the_path(monkeypatch):
    found = url(monkeypatch, "us-west-2", "http://127.0.0.1:9")
    assert found.startswith(f"http://127.0.0.1:9/{BUCKET}/sources/a.tar.gz?")
