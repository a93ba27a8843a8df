"""What the command line of a launch asks for, checked as far as nobody has to be asked."""

import dataclasses
from dataclasses import dataclass

from launcher.corpus import Corpus
from launcher.names import PROG, check_run_name, quoted
from txl_jax import config
from txl_jax.config import Command
from txl_jax.errors import UserError

_ONLY_AWS = (
    *("region", "zone", "image", "subnet", "bucket", "reservation", "capacity_block", "nospot"),
    *("max_price", "max_hours", "private_ip", "ssh_cidr", "keep", "instance_type", "machines"),
)
"""Options that have no meaning on machines that already run."""


@dataclass(frozen=True)
class LaunchCommand(Command):
    """The words of the launcher's command line: the trainer's, and where and how to rent hosts."""

    name: str = ""
    """Name of the run, in EC2 and in S3; empty: that of the config."""
    region: str = ""
    """AWS region; empty: the one that `aws configure` or AWS_REGION names."""
    zone: str = ""
    """Availability zone, as us-east-1a; empty: all, the cheapest first."""
    image: str = ""
    """AMI, or SSM parameter that names one; empty: the newest Ubuntu that suits the GPU."""
    subnet: str = ""
    """Subnet of the hosts; empty: those of the default VPC."""
    bucket: str = ""
    """S3 bucket for logs and checkpoints; empty: txl-ACCOUNT-REGION, made if need be."""
    reservation: str = ""
    """Capacity reservation to start in, on demand."""
    capacity_block: str = ""
    """Capacity block for ML to start in, already paid for."""
    nospot: bool = False
    """On-demand hosts: dearer, and never taken away."""
    max_price: float | None = None
    """Highest spot price of a host, US dollars an hour; None: the on-demand price."""
    max_hours: float = 24.0
    """Hours after which a host stops, whatever it does."""
    private_ip: bool = False
    """Reach the hosts by their private addresses: from within the VPC, or through a VPN."""
    ssh_cidr: str = ""
    """Addresses that may connect by SSH, as 192.0.2.0/24; empty: this machine's alone."""
    keep: bool = False
    """Hosts do not stop by themselves, not even at --max-hours."""
    hosts: str = ""
    """Machines that already run, instead of AWS: user@a,user@b, or a file with one a line."""
    committed: bool = False
    """Send the source as it is committed; refuse if it was changed since."""
    dry_run: bool = False
    """Show the plan and do nothing."""
    yes: bool = False
    """Do not ask before renting."""
    json: bool = False
    """The plan, and in the end the hosts, as JSON on standard output; the rest goes to standard
    error."""

    @property
    def spot(self) -> bool:
        """Whether the hosts are spot ones; what is reserved never is."""
        return not (self.nospot or self.reservation or self.capacity_block)

    def follow_up(self, verb: str, *words: str) -> str:
        """What to type to do something with the run that this launches."""
        where = ("--region", self.region) if self.region else ()
        return quoted([*PROG.split(), verb, self.name, *words, *where])


@dataclass(frozen=True)
class Request:
    """A launch that somebody asks for."""

    command: LaunchCommand
    """Its `name` is filled in."""
    trainer_words: tuple[str, ...]
    """The words as typed, without the launcher's own and --logdir; and those of `with_corpus`."""
    named: bool
    """The run's name was typed; otherwise it is the config's, which others may use too."""

    def with_corpus(self, found: Corpus | None) -> "Request":
        """The same with the hosts' folders of a corpus in place of this machine's.

        So what is noted of the run, and compared, tells what the corpus is and not where it lay.
        """
        if found is None:
            return self
        experiment = dataclasses.replace(self.command.experiment, data=found.data)
        command = dataclasses.replace(self.command, experiment=experiment)
        return Request(command, (*self.trainer_words, *found.words), self.named)


def parse(words: list[str]) -> Request:
    """The request that a command line makes.

    Raises:
      UserError: as `config.parse`; options that exclude each other, or values that cannot be.
    """
    command = config.parse(PROG, words, LaunchCommand)
    _check(command, _typed(words))
    name = check_run_name(command.name or command.config.lower().replace("_", "-"))
    named = bool(command.name)
    return Request(dataclasses.replace(command, name=name), _without_own(words), named)


def _check(command: LaunchCommand, typed: set[str]) -> None:
    """Raises UserError for the first option that cannot be, or not together with another."""
    if command.local:
        raise UserError("--local trains on this machine: python -m txl_jax.train --local")
    machines = command.experiment.cluster.machines
    if machines < 1:
        raise UserError(f"machines is {machines}; it has to be at least 1")
    if not 0 < command.max_hours < 24 * 365:
        raise UserError(f"max_hours is {command.max_hours}; it has to be above 0, in hours")
    if command.max_price is not None:
        if not command.spot:
            raise UserError("--max-price is the highest price of spot hosts, and these are not")
        if not 0 < command.max_price < float("inf"):
            raise UserError(f"max_price is {command.max_price}; it has to be above 0, in dollars")
    if command.reservation and command.capacity_block:
        raise UserError("--reservation and --capacity-block: hosts start in one of them")
    if command.zone and command.subnet:
        raise UserError("--subnet lies in one zone already: leave --zone out")
    if command.hosts:
        if others := [name for name in _ONLY_AWS if name in typed]:
            options = ", ".join("--" + name.replace("_", "-") for name in others)
            raise UserError(f"--hosts are machines that already run: leave out {options}")
    elif command.experiment.train.logdir:
        raise UserError(
            "--logdir: a launched run is kept in s3://BUCKET/runs/NAME; choose with --bucket and "
            "--name"
        )


def _own() -> dict[str, bool]:
    """Options that the trainer does not get as they are, and whether each is a flag."""
    inherited = {field.name for field in dataclasses.fields(Command)}
    return {"logdir": False} | {
        field.name: field.type is bool
        for field in dataclasses.fields(LaunchCommand)
        if field.name not in inherited
    }


def _option(word: str) -> str:
    """The name of the option that a word begins with, as fields spell it; empty: none."""
    if not word.startswith("--"):
        return ""
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def _typed(words: list[str]) -> set[str]:
    return {_option(word) for word in words}


def _without_own(words: list[str]) -> tuple[str, ...]:
    """`words`, which have been parsed, without the launcher's own options and their values."""
    own, kept, left = _own(), [], iter(words)
    for word in left:
        name = _option(word)
        if name in own and not own[name]:
            if "=" not in word:
                next(left)
        elif name.removeprefix("no_") not in own:
            kept.append(word)
    return tuple(kept)
