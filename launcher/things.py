"""What the launcher makes in an account and leaves there: how it is marked and named."""

from dataclasses import dataclass
from typing import Literal

from launcher import names

Kind = Literal["bucket", "key pair", "placement group", "role", "security group"]

TAGS = [{"Key": names.TAG_MADE_BY, "Value": names.MADE_BY}]
"""On everything, in the form that most services take."""


@dataclass(frozen=True)
class Thing:
    """One thing, in the account's region."""

    kind: Kind
    name: str


def is_ours(tags: list[dict[str, str]] | None) -> bool:
    """Whether the tags say that the launcher made it."""
    return TAGS[0] in (tags or [])
