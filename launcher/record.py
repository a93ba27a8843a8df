"""The launch record: what a run was launched with, in S3 before anything is started.

    launches/NAME.json

The same command typed again finds in it the launch that it has to go on with. It is written anew
by every launch of the name. What is read here anybody with the bucket could have written: what is
not of the right form counts as no record.
"""

import dataclasses
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_type_hints

from launcher import objects
from launcher.aws import Account
from launcher.names import printable
from launcher.request import LaunchCommand
from txl_jax import run_folder
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.json_values import parse

_MAKE_HOSTS = (
    *("zone", "image", "subnet", "reservation", "capacity_block", "nospot", "max_price"),
    *("max_hours", "keep"),
)
"""Options by which hosts differ that were started with other ones."""

TRAIN, STOP, END = "train", "stop", "end"
"""What may be asked of a run."""
_LAUNCH = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ZONE = re.compile(r"[a-z0-9-]{1,40}")


class Taken(UserError):
    """Another command has written the record meanwhile."""


@dataclass(frozen=True)
class Record:
    """One launch of a run."""

    launch: str
    """Its id, which no other launch has."""
    owner: str
    """ARN of the caller."""
    started: datetime
    config: Config
    words: tuple[str, ...]
    """The trainer's words, as `Request.trainer_words`."""
    options: dict[str, Any]
    """The launcher's own options, as far as they make hosts what they are."""
    zones: tuple[str, ...]
    """In the order in which they are tried."""
    source: str
    """SHA-256 of the source's archive."""
    corpus: str
    """Hash of the corpus that the hosts were brought; empty: they needed none."""
    revision: str
    """The source's commit, with `-dirty` where files were changed; empty: none."""
    attempt: str = ""
    """Which command went on with the launch last (`hold.py`); empty: not known."""
    wish: str = TRAIN
    """What a person asked of the run last: that it trains, stands stopped, or ends. Watchers go by
    it."""


def new_launch() -> str:
    """The id of a new launch."""
    return secrets.token_hex(8)


def key(name: str) -> str:
    """Where the record of a run is in the bucket."""
    return f"launches/{name}.json"


def options(command: LaunchCommand) -> dict[str, Any]:
    """What `Record.options` holds of a command."""
    return {name: getattr(command, name) for name in _MAKE_HOSTS}


def write(account: Account, bucket: str, name: str, record: Record, replaces: str) -> None:
    """Writes the record of a run, in place of an earlier launch's, of the version `replaces`.

    Raises Taken if another launch of the name was faster.
    """
    content = dataclasses.asdict(record) | {"started": record.started.isoformat()}
    try:
        objects.write_json(account, bucket, key(name), content, replaces)
    except objects.Changed:
        raise Taken(
            f"the run {name} is launched by another command at this moment; take another --name"
        ) from None


def read(account: Account, bucket: str, name: str) -> tuple[Record | None, str]:
    """The record of a run, None if there is none to be used, and its version in the bucket."""
    content, version = objects.read_version(account, bucket, key(name))
    try:
        return _parsed(parse(content)), version
    except (KeyError, TypeError, ValueError, UserError):
        return None, version


def differences(record: Record, command: LaunchCommand) -> list[str]:
    """By what a command would make another run, or other hosts, than the record says."""
    there, here = record.config, command.experiment
    found = run_folder.differences(there, here)
    if there.train.batch != here.train.batch:
        found.append(f"train.batch: {there.train.batch!r} there, {here.train.batch!r} here")
    for name in ("machines", "instance_type", "zero", "fsdp"):
        old, new = getattr(there.cluster, name), getattr(here.cluster, name)
        if old != new:
            found.append(f"cluster.{name}: {old!r} there, {new!r} here")
    for name, new in options(command).items():
        if (old := record.options.get(name)) != new:
            found.append(f"{name}: {old!r} there, {new!r} here")
    return [printable(difference) for difference in dict.fromkeys(found)]


def _parsed(content: Any) -> Record:
    """Raises one of several errors for what is no record."""
    names = ("launch", "owner", "source", "corpus", "revision", "started")
    texts = {name: content[name] for name in names}
    texts["attempt"] = content.get("attempt", "")
    texts["wish"] = content.get("wish", TRAIN)
    words, zones, known = content["words"], content["zones"], content["options"]
    if not isinstance(words, list) or not isinstance(zones, list):
        raise TypeError("a list is none")
    if not all(isinstance(text, str) for text in [*texts.values(), *words, *zones]):
        raise TypeError("a text is none")
    if not _LAUNCH.fullmatch(texts["launch"]) or not all(map(_ZONE.fullmatch, zones)):
        raise ValueError("a name is none")
    if texts["wish"] not in (TRAIN, STOP, END):
        raise ValueError("a wish is none")
    hashes = [texts["source"], *([texts["corpus"]] if texts["corpus"] else [])]
    if not all(map(_SHA256.fullmatch, hashes)):
        raise ValueError("a checksum is none")
    hints = get_type_hints(LaunchCommand)
    if set(known) != set(_MAKE_HOSTS) or not all(
        run_folder.fits(value, hints[name]) for name, value in known.items()
    ):
        raise TypeError("an option is none")
    started = datetime.fromisoformat(texts.pop("started"))
    return Record(
        **texts,
        started=started if started.tzinfo else started.replace(tzinfo=UTC),
        config=run_folder.parse_config(content["config"], "the launch record"),
        words=tuple(words),
        options=known,
        zones=tuple(zones),
    )
