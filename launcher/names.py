"""Names of runs and tags, and foreign text made safe to show and to pass on."""

import re
import shlex
from collections.abc import Iterable

from txl_jax.errors import UserError

TAG_MADE_BY = "txl:made-by"
"""On everything that the launcher makes; its value is MADE_BY."""
TAG_RUN = "txl:run"
TAG_HOST = "txl:host"
"""Number of the host in its run, from 0."""
TAG_OWNER = "txl:owner"
"""ARN of whoever launched the run."""
TAG_CONFIG = "txl:config"
TAG_LAUNCH = "txl:launch"
"""What one launch has in common and no other has."""
TAG_LOGDIR = "txl:logdir"
TAG_PRICE = "txl:price"
"""US dollars an hour of one host, when it was started."""
TAG_SPOT = "txl:spot"
"""`true` or `false`."""
TAG_HOST_KEY = "txl:host-key"
"""Public half of the hosts' SSH key, `ssh-ed25519 AAAA…`."""
TAG_USER = "txl:user"
"""Login name on the hosts."""
TAG_STARTED = "txl:started"
TAG_HOURS = "txl:hours"
"""For how many hours the host ran before it was last stopped."""
TAG_NAME = "Name"

MADE_BY = "txl-launcher"
PROG = "python -m launcher"

_RUN_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def check_run_name(name: str) -> str:
    """The name, if a run can have it: it becomes part of tags, S3 keys and paths.

    Raises UserError if it cannot.
    """
    if not is_run_name(name):
        raise UserError(
            f"{printable(name)!r} cannot be the name of a run: 1 to 40 small letters, digits and "
            "hyphens, the first no hyphen"
        )
    return name


def is_run_name(name: str) -> bool:
    """Whether a run can have this name."""
    return bool(_RUN_NAME.fullmatch(name))


def printable(text: str) -> str:
    """Foreign text in one line that cannot act on a terminal: what is not printable is escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def quoted(words: Iterable[str]) -> str:
    """Words as a shell reads them back, whatever is in them."""
    return shlex.join(words)
