"""Files that all hosts of a run need: brought to the launcher's bucket once, fetched by each host.

A host fetches them before it has any program of AWS, by a URL that is signed and holds for an hour.
Whoever knows the URL can read the file, so it is no word of a command.
"""

from dataclasses import dataclass
from pathlib import Path

from launcher import objects
from launcher.aws import Account, explained

URL_SECONDS = 3600


@dataclass(frozen=True)
class Shared:
    """The launcher's bucket as a place for such files; each has a name that tells its content."""

    account: Account
    bucket: str

    def has(self, key: str) -> bool:
        """Whether the file is there already."""
        return objects.exists(self.account, self.bucket, key)

    @explained()
    def upload(self, key: str, path: Path) -> None:
        """Brings a file there; large ones go in parts, and are there when all parts are."""
        self.account.client("s3").upload_file(
            str(path), self.bucket, key, ExtraArgs={"ExpectedBucketOwner": self.account.id}
        )

    @explained()
    def url(self, key: str) -> str:
        """Where the file can be read without further leave."""
        return self.account.client("s3").generate_presigned_url(
            "get_object", Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=URL_SECONDS
        )
