"""Puts the trainers of a run to work again, on hosts that stand ready."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from launcher import hardware, lookup, objects, reach, record, setup
from launcher.aws import Account
from launcher.progress import Progress
from launcher.record import Record
from launcher.runs import Run
from launcher.shared import Shared
from launcher.source import Source
from txl_jax.errors import UserError


def known_launch(account: Account, run: Run) -> tuple[str, Record, str]:
    """The bucket of a run, the record of its launch, and that record's version.

    Raises UserError if what it was launched with is not known any more.
    """
    bucket = lookup.check_bucket(account, run.logdir.removeprefix("s3://").split("/")[0])
    known, version = record.read(account, bucket, run.name)
    if known is None or known.launch != run.launch:
        raise UserError(
            f"what {run.name} was launched with is not known any more: s3://{bucket}/"
            f"{record.key(run.name)} is another launch's, or is gone"
        )
    return bucket, known, version


@contextlib.contextmanager
def kept_source(account: Account, bucket: str, known: Record) -> Iterator[Path]:
    """The archive that a run was launched with, brought from S3 for as long as the block lasts.

    Raises UserError if it is not there any more.
    """
    key = source_key(known.source)
    content = objects.read(account, bucket, key)
    if content is None:
        raise UserError(f"the source that {bucket} had of this run is gone: {key}")
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        path = Path(folder, "source.tar.gz")
        path.write_bytes(content)
        yield path


def replace_source(
    account: Account, bucket: str, run: Run, known: Record, version: str, source: Source
) -> Record:
    """Keeps another source for a run, and notes it in the record of its launch; returns that.

    Raises UserError if the run is launched by another command at this moment.
    """
    objects.write(account, bucket, source_key(source.sha256), source.path.read_bytes())
    revision = source.revision + "-dirty" * source.dirty
    changed = dataclasses.replace(known, source=source.sha256, revision=revision)
    record.write(account, bucket, run.name, changed, version)
    return changed


def train(
    account: Account, run: Run, known: Record, archive: Path, private: bool, console: Console
) -> None:
    """Prepares all hosts of a run, which are running, and starts their trainers.

    `archive`: of the source that the record names.

    Raises UserError: names the hosts where that failed. They run on.
    """
    kind = hardware.describe(account, run.hosts[0].kind)
    image = hardware.image(account, kind, known.options["image"])
    bucket = run.logdir.removeprefix("s3://").split("/")[0]
    work = setup.Work(
        config=known.config,
        words=known.words,
        logdir=run.logdir,
        output=f"s3://{bucket}/launches/{run.name}",
        archive=archive,
        sha256=known.source,
        coordinator=run.hosts[0].private_ip,
        gpus=kind.gpus,
        needs_driver=image.needs_driver,
        efa_interfaces=kind.efa_interfaces,
        network_gbps=kind.network_gbps,
        shared=Shared(account, bucket),
    )
    with Progress(console) as progress:
        progress.begin("SSH", reach.WAIT_SECONDS)
        with reach.reached(account, run, private) as hosts:
            progress.watch(hosts.names, hosts.seconds)
            for name, seconds in setup.phases(hosts, work, progress.say):
                progress.begin(name, seconds)


def source_key(sha256: str) -> str:
    """Where the bucket keeps a source."""
    return f"sources/{sha256}.tar.gz"
