"""Makes a page of pictures and numbers of a run: what it did, what it cost, how to repeat it.

It is one HTML file, with the pictures in it and beside it, and needs no network to be read. NAME is
a run whose files are in S3, or a folder of this machine.
"""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher import lookup, objects, record, runs, status
from launcher.aws import Account
from launcher.names import PROG, printable, quoted
from launcher.options import OfBucket, RunName
from launcher.record import Record
from launcher.request import LaunchCommand
from launcher.runs import Run
from txl_jax import report_page, report_plots, run_folder, storage, story
from txl_jax.errors import UserError
from txl_jax.story import Launch, RentedHost, Story

_PAGE = "index.html"
_READ = re.compile(
    r"(config|run|results)\.json|metrics\.jsonl|samples\.txt|heartbeats/\d{1,6}\.json"
)
"""Which files of a run's folder are read."""


@dataclass(frozen=True, kw_only=True)
class Options(OfBucket):
    """Options of the command."""

    name: RunName
    """Run whose report this is, or its folder on this machine."""
    out: str = ""
    """Folder of the report; empty: report-NAME."""


def main(options: Options) -> int:
    """Exit status 0. Raises UserError for what is no run, or has not begun yet."""
    folder = Path(options.name)
    local = "/" in options.name or (folder / run_folder.CONFIG).is_file()
    told = story.read(folder) if local else _from_s3(options)
    out = Path(options.out or f"report-{told.name}")
    pictures = report_plots.draw(told)
    with _writable(out):
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            if picture.png:
                storage.write_bytes(out / f"{picture.name}.png", picture.png)
        storage.write_bytes(out / _PAGE, report_page.page(told, pictures))
    print(printable(str(out / _PAGE)))
    return 0


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(str(out))}: {error.strerror or error}; take an --out that "
            "is writable and has space"
        ) from error


def _from_s3(options: Options) -> Story:
    """Brings what a run has left, for as long as it is read."""
    account = Account.open(options.region)
    bucket = lookup.bucket(account, options.name, options.bucket)
    root = f"runs/{options.name}/"
    written = objects.written(account, bucket, root)
    names = [key.removeprefix(root) for key in written if _READ.fullmatch(key.removeprefix(root))]
    if run_folder.CONFIG not in names:
        raise UserError(
            f"s3://{bucket}/{root} holds no run that has begun: {run_folder.CONFIG} is missing "
            f"from it; {account.command('ls', '--all')} lists the runs"
        )
    watched = objects.read_json(account, bucket, f"launches/{options.name}.watch.json")
    with tempfile.TemporaryDirectory(prefix="txl-") as temporary:
        folder = Path(temporary, options.name)
        objects.download(account, bucket, root, names, folder)
        return story.read(folder, watched, _launch(account, bucket, options.name))


def _launch(account: Account, bucket: str, name: str) -> Launch | None:
    """What EC2's tags and the launch record tell; None: nothing."""
    known, _ = record.read(account, bucket, name)
    found = lookup.preferred(account, runs.find(account, name, all_users=True, gone=True))
    if known is None and not found:
        return None
    now, seen = datetime.now(UTC), status.read(account, bucket, name).seen
    return Launch(
        command=_command(name, known) if known else "",
        revision=known.revision if known else "",
        own_corpus=bool(known and known.corpus),
        hosts=tuple(_hosts(found, now, seen)),
        cost=_cost(found, now, seen),
    )


def _command(name: str, known: Record) -> str:
    """What launches such a run again."""
    defaults = {field.name: field.default for field in dataclasses.fields(LaunchCommand)}
    words = [*PROG.split(), *known.words, "--name", name]
    for option, value in known.options.items():
        if value != defaults[option]:
            flag = "--" + option.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return quoted(words)


def _hosts(found: list[Run], now: datetime, seen: datetime | None) -> Iterator[RentedHost]:
    for run in found:
        for host in run.hosts:
            yield RentedHost(
                number=host.index,
                instance=host.instance_id,
                kind=host.kind,
                zone=host.zone,
                spot=host.spot,
                state=host.state,
                price=host.price,
                hours=host.hours(now, seen),
            )


def _cost(found: list[Run], now: datetime, seen: datetime | None) -> float | None:
    costs = [run.cost_so_far(now, seen) for run in found]
    known = [cost for cost in costs if cost is not None]
    return sum(known) if known and len(known) == len(costs) else None
