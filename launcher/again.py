"""Puts the trainers of a run to work again, on hosts that stand ready."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launcher import corpus, hardware, lookup, objects, reach, record, setup
from launcher.aws import Account
from launcher.corpus import Corpus
from launcher.hold import Hold, new_attempt
from launcher.names import PROG
from launcher.progress import Progress
from launcher.record import Record
from launcher.request import LaunchCommand
from launcher.runs import Run
from launcher.shared import Shared
from launcher.source import Source
from txl_jax import config
from txl_jax.errors import UserError

SSH_SECONDS = 600.0
"""For which a host may take from its start until SSH answers."""
_TRIES = 5


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


def check_whole(account: Account, run: Run, known: Record) -> None:
    """Raises UserError unless all hosts of a run are there: fewer would wait for the others."""
    machines = known.config.cluster.machines
    if len(run.hosts) != machines:
        raise UserError(
            f"{len(run.hosts)} hosts of {run.name} stand ready, and it trains on {machines}: "
            f"{account.command('watch', run.name)} replaces the others; "
            f"{account.command('kill', run.name)} ends them, and the command that launched it then "
            "goes on from the last checkpoint"
        )


def command_of(
    account: Account, bucket: str, name: str, known: Record, private_ip: bool
) -> LaunchCommand:
    """The command that launched a run, as its record tells, for hosts in the same account.

    Raises UserError if its words are none of a launch any more.
    """
    typed = config.parse(PROG, list(known.words), LaunchCommand)
    return dataclasses.replace(
        typed,
        experiment=known.config,
        name=name,
        region=account.region,
        bucket=bucket,
        private_ip=private_ip,
        **known.options,
    )


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


def keep_source(account: Account, bucket: str, known: Record, source: Source) -> Record:
    """Keeps another source in the bucket; returns the record that names it, as yet unwritten."""
    objects.write(account, bucket, source_key(source.sha256), source.path.read_bytes())
    revision = source.revision + "-dirty" * source.dirty
    return dataclasses.replace(known, source=source.sha256, revision=revision)


def ask(account: Account, run: Run, wish: str) -> None:
    """Writes into the record of a run what a person asks of it; what drives its hosts lets go.

    Does nothing where no record is, or another launch's. Raises UserError if it cannot be written.
    """
    if run.logdir:
        bucket = run.logdir.removeprefix("s3://").split("/")[0]
        ask_in(account, bucket, run.name, run.launch, wish)


def ask_in(account: Account, bucket: str, name: str, launch: str, wish: str) -> None:
    """As `ask`, of a run that may have no hosts."""
    for tries_left in reversed(range(_TRIES)):
        known, version = record.read(account, bucket, name)
        if known is None or known.launch != launch:
            return
        try:
            take_hold(account, bucket, name, dataclasses.replace(known, wish=wish), version)
            return
        except record.Taken:
            if not tries_left:
                raise


def take_hold(account: Account, bucket: str, name: str, known: Record, version: str) -> Hold:
    """Writes the record of a run in place of `version`; what drives its hosts lets go of them.

    Raises record.Taken if the run is launched by another command at this moment.
    """
    taken = dataclasses.replace(known, attempt=new_attempt())
    record.write(account, bucket, name, taken, version)
    return Hold(account, bucket, name, taken.attempt)


@contextlib.contextmanager
def what_stands_is_said(account: Account, run: Run, console: Console) -> Iterator[None]:
    """If the block is left by an error or Ctrl-C, says which hosts may run on, and what to do."""
    ids = ", ".join(host.instance_id for host in run.hosts)
    first, *others = (account.command(verb, run.name) for verb in ("start", "stop", "kill"))
    stand = (
        f"the hosts of {run.name} ({ids}) may run, and cost: {first} has them train, {others[0]} "
        f"stops them, {others[1]} ends them"
    )
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {stand}") from error
    except BaseException:
        with contextlib.suppress(OSError, SystemExit):  # nobody may be there to read it
            console.print(Text(stand), soft_wrap=True)
        raise


def prepared(account: Account, run: Run, bucket: str, known: Record, archive: Path) -> setup.Work:
    """What the hosts of a run are to be prepared for.

    `archive`: of the source that the record names.

    Raises UserError if their corpus is not in the bucket, or their image not to be had any more.
    """
    brought = None
    if known.corpus:
        if not objects.exists(account, bucket, key := corpus.key(known.corpus)):
            raise UserError(
                f"the corpus that {bucket} had of this run is gone: {key}; "
                f"{account.command('kill', run.name)} ends its hosts, and the command that "
                "launched it then brings the corpus again"
            )
        brought = Corpus(known.corpus, known.config.data, {})
    kind = hardware.describe(account, run.hosts[0].kind)
    image = hardware.image(account, kind, known.options["image"])
    return setup.Work(
        words=known.words,
        logdir=f"s3://{bucket}/runs/{run.name}",
        output=f"s3://{bucket}/launches/{run.name}",
        archive=archive,
        sha256=known.source,
        corpus=brought,
        coordinator=run.hosts[0].private_ip,
        gpus=kind.gpus,
        needs_driver=image.needs_driver,
        efa_interfaces=kind.efa_interfaces,
        network_gbps=kind.network_gbps,
        shared=Shared(account, bucket),
    )


def train(
    account: Account, run: Run, work: setup.Work, hold: Hold, private: bool, console: Console
) -> None:
    """Prepares all hosts of a run, which are running, and starts their trainers.

    Raises UserError: names the hosts where that failed. They run on.
    """
    with Progress(console) as progress:
        progress.begin("SSH", SSH_SECONDS)
        with reach.reached(account, run, private, SSH_SECONDS) as hosts:
            progress.watch(hosts.names, hosts.seconds)
            for name, seconds in setup.phases(hosts, work, progress.say):
                hold.check()
                progress.begin(name, seconds)


def source_key(sha256: str) -> str:
    """Where the bucket keeps a source."""
    return f"sources/{sha256}.tar.gz"
