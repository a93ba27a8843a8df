"""What a launch would do and cost. Everything is read and checked, and nothing is made."""

import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from launcher import (
    ec2,
    hardware,
    log_bucket,
    network,
    objects,
    record,
    runs,
    security_group,
    speed,
    standing,
    trainer,
)
from launcher.aws import Account
from launcher.hardware import Image, InstanceType, Prices
from launcher.names import printable, quoted
from launcher.network import Network
from launcher.record import Record
from launcher.request import LaunchCommand, Request
from launcher.runs import Run
from launcher.security_group import Source
from launcher.speed import Speed
from txl_jax import corpora, run_folder
from txl_jax.checks import check_capability, check_experiment, check_throughput
from txl_jax.config import Config
from txl_jax.errors import UserError

RESULTS = "results.json"
"""What a run writes in its folder when it has finished."""

_OF_A_MODEL = (run_folder.CONFIG, run_folder.IMPORTED)
"""One of these is in the folder of a run, or of weights that were imported."""
_CAPABILITIES = {"K80": 3.7, "M60": 5.2, "P4": 6.1, "V100": 7.0, "T4": 7.5, "T4g": 7.5}
"""Compute capability of the GPUs that lack a type; EC2 does not tell it."""


@dataclass(frozen=True)
class Rental:
    """What is rented for a launch."""

    account: str
    region: str
    kind: InstanceType
    image: Image
    spot: bool
    reserved: str
    """Capacity reservation or capacity block; empty: none."""
    zones: tuple[str, ...]
    """In the order in which they are tried: the cheapest first."""
    prices: dict[str, float]
    """US dollars an hour of one host, by zone, where it is known."""
    on_demand: float | None
    """US dollars an hour of one host on demand; None: not known."""
    max_price: float | None
    """US dollars an hour that a spot host may cost; None: as much as on demand."""
    max_hours: float | None
    """Hours after which hosts stop, whatever they do; None: never."""
    ssh: tuple[Source, ...]
    """Where SSH may come from."""
    creates: tuple[str, ...]
    """What is made in the account, in words."""

    def price(self, machines: int) -> float | None:
        """US dollars an hour of all hosts in the first zone; None: not known."""
        price = self.prices.get(self.zones[0])
        return None if price is None else machines * price

    def bound(self, machines: int) -> float | None:
        """US dollars an hour that all hosts cost at most, in whatever zone; None: not known."""
        if self.spot:
            most = self.on_demand if self.max_price is None else self.max_price
        else:
            most = max(self.prices.values(), default=None)
        return None if most is None else machines * most

    def near(self, zones: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the zones where hosts stand in a cluster placement group, if they can at all."""
        return zones if self.kind.clusters else ()


@dataclass(frozen=True)
class Plan:
    """A launch, as it would be."""

    name: str
    config: str
    machines: int
    gpus: int | None
    """Of each machine; None: they will be counted there."""
    batch: int
    """Sequences in a step, over all devices."""
    peak_lr: float
    max_tokens: int
    speed: Speed | None
    """As it was measured; None: unknown."""
    logdir: str
    """Empty: the trainer's own choice."""
    trainer: tuple[str, ...]
    """Words after `python` on host I."""
    rental: Rental | None
    """None: the machines run already."""
    runs: tuple[Run, ...]
    """What stands under this name, or ended within the hour, whoever started it."""
    record: Record | None
    """Of the latest launch of this name."""
    version: str
    """Of the record in the bucket."""
    others: str
    """ARN of whoever launched the run that this goes on with; empty: the caller, or nobody."""

    @property
    def standing(self) -> tuple[Run, ...]:
        """The runs of which hosts stand."""
        return tuple(
            run for run in self.runs if any(host.state in runs.STANDING for host in run.hosts)
        )

    @property
    def hours(self) -> float | None:
        """Hours that training is expected to take; None: unknown."""
        return self.max_tokens / self.speed.tokens_per_s / 3600 if self.speed else None


def check(cfg: Config) -> None:
    """What can be wrong with an experiment that nobody has to be asked for.

    Raises UserError, in one line, for the first thing that is.
    """
    check_experiment(cfg, devices=1)  # how many there are, EC2 has to tell
    if cfg.train.throughput:
        check_throughput(cfg)
    if cfg.data.dataset == "synthetic" and not cfg.train.throughput:
        corpora.open_corpus(cfg.data)
    if cfg.data.vocab_file and not Path(cfg.data.vocab_file).exists():
        raise UserError(f"--vocab-file {cfg.data.vocab_file}: there is no such file or folder")


def make(account: Account, request: Request) -> Plan:
    """The plan of a launch on AWS, the corpus as `Request.with_corpus` has it.

    Raises UserError: the instance type is not offered, the GPUs do not divide the batch, the run
    of this name is another one or has finished, the bucket belongs to somebody else …
    """
    command = request.command
    cfg, name = command.experiment, command.name
    bucket = log_bucket.bucket_name(account, command.bucket)
    with ThreadPoolExecutor() as threads:
        kind = threads.submit(hardware.describe, account, cfg.cluster.instance_type)
        beginning = threads.submit(_check_beginning, account, cfg, bucket)
        place = threads.submit(network.find, account, command.subnet)
        known_runs = threads.submit(runs.find, account, name, all_users=True, gone=True)
        known = threads.submit(record.read, account, bucket, name)
        earlier = threads.submit(_check_earlier, account, bucket, name, cfg)
        measured = threads.submit(speed.last_measured, account, bucket, command.config, cfg)
        image = threads.submit(hardware.image, account, kind.result(), command.image)
        prices = threads.submit(hardware.prices, account, kind.result())
        reserved = threads.submit(_reserved_zone, account, command, kind.result())
        ssh = threads.submit(_sources, command, place.result())
    beginning.result()
    earlier.result()
    _check_owner(account, request, known.result()[0])
    ec2.check_reachable(kind.result(), cfg.cluster.machines, command.private_ip)
    check_on(cfg, kind.result().gpus, _gpu_name(kind.result()))
    zones = _zones(command, kind.result(), prices.result(), place.result(), reserved.result())
    rental = Rental(
        account=account.id,
        region=account.region,
        kind=kind.result(),
        image=image.result(),
        spot=command.spot,
        reserved=command.reservation or command.capacity_block,
        zones=zones,
        prices=prices_of(command, zones, prices.result()),
        on_demand=prices.result().on_demand,
        max_price=command.max_price,
        max_hours=None if command.keep else command.max_hours,
        ssh=ssh.result(),
        creates=(),
    )
    creates = standing.missing(account, command, rental.near(zones))
    logdir = f"s3://{bucket}/runs/{name}"
    return dataclasses.replace(
        _work(request, cfg.cluster.machines, logdir),
        gpus=rental.kind.gpus,
        speed=measured.result(),
        rental=dataclasses.replace(rental, creates=tuple(creates)),
        runs=tuple(known_runs.result()),
        record=known.result()[0],
        version=known.result()[1],
        others=_others(account, known.result()[0]),
    )


def make_listed(request: Request, machines: int) -> Plan:
    """The plan of a launch on machines that run already, so many of them."""
    return _work(request, machines, request.command.experiment.train.logdir)


def check_on(cfg: Config, gpus: int, gpu_name: str = "") -> None:
    """Raises UserError unless the experiment can run on its machines, with so many GPUs each.

    `gpu_name`: what EC2 calls the GPUs; empty: not known.
    """
    check_experiment(cfg, cfg.cluster.machines * max(1, gpus))
    if gpu_name in _CAPABILITIES:
        check_capability(cfg.model.dtype, _CAPABILITIES[gpu_name], gpu_name)


def show(plan: Plan) -> Table:
    """The plan for people."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in _rows(plan):
        table.add_row(title, Text(text))
    return table


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    rental = plan.rental
    found = {
        "name": plan.name,
        "config": plan.config,
        "machines": plan.machines,
        "batch": plan.batch,
        "peak_lr": plan.peak_lr,
        "max_tokens": plan.max_tokens,
        "tokens_per_s": plan.speed.tokens_per_s if plan.speed else None,
        "measured_in": plan.speed.run if plan.speed else None,
        "hours": plan.hours,
        "logdir": plan.logdir,
        "command": ["python", *plan.trainer],
    }
    if rental is None:
        return found
    price = rental.price(plan.machines)
    return found | {
        "account": rental.account,
        "region": rental.region,
        "instance_type": rental.kind.name,
        "gpus": rental.kind.gpus,
        "image": rental.image.id,
        "spot": rental.spot,
        "zones": list(rental.zones),
        "prices": rental.prices,
        "on_demand": rental.on_demand,
        "price_per_hour": price,
        "highest_price_per_hour": rental.bound(plan.machines),
        "expected_price": _times(price, plan.hours),
        "max_hours": rental.max_hours,
        "ssh_from": [str(source) for source in rental.ssh],
        "creates": list(rental.creates),
        "stands": [host.instance_id for run in plan.standing for host in run.hosts],
    }


def _work(request: Request, machines: int, logdir: str) -> Plan:
    """The part of a plan that is the same on all machines."""
    command = request.command
    cfg = command.experiment
    return Plan(
        name=command.name,
        config=command.config,
        machines=machines,
        gpus=None,
        batch=cfg.train.batch,
        peak_lr=cfg.optim.peak_lr(cfg.train.batch),
        max_tokens=cfg.train.max_tokens,
        speed=None,
        logdir=logdir,
        trainer=trainer.command(request.trainer_words, logdir, machines, "HOST-0", "I"),
        rental=None,
        runs=(),
        record=None,
        version="",
        others="",
    )


def _check_beginning(account: Account, cfg: Config, bucket: str) -> None:
    """Raises UserError if the run is to start from what hosts cannot read, or from nothing."""
    for name in ("init_from", "init_upper_from"):
        folder = getattr(cfg.train, name)
        if folder and not folder.startswith(f"s3://{bucket}/"):
            raise UserError(
                f"{name} is {printable(folder)}, which the hosts cannot read: bring that run to "
                f"s3://{bucket}/runs/NAME (aws s3 cp --recursive) and name it so"
            )
        key = folder.removeprefix(f"s3://{bucket}/").strip("/")
        if folder and not any(
            objects.exists(account, bucket, f"{key}/{file}") for file in _OF_A_MODEL
        ):
            raise UserError(
                f"{name} is {printable(folder)}, where there is no run: {' or '.join(_OF_A_MODEL)} "
                "would be in its folder"
            )


def _check_owner(account: Account, request: Request, known: Record | None) -> None:
    """Raises UserError if a name that nobody typed is that of somebody else's run."""
    if others := _others(account, known):
        name = request.command.name
        if not request.named:
            raise UserError(
                f"a run {name} was launched by {others}: --name {name} goes on with it, another "
                "--name begins one of your own"
            )


def _others(account: Account, known: Record | None) -> str:
    return printable(known.owner) if known and known.owner != account.caller else ""


def _sources(command: LaunchCommand, place: Network | None) -> tuple[Source, ...]:
    own = security_group.own_public_address
    return tuple(security_group.sources(command.ssh_cidr, command.private_ip, place, own))


def _check_earlier(account: Account, bucket: str, name: str, cfg: Config) -> None:
    """Raises UserError if the folder of the run is that of another config, or of a finished run."""
    folder = f"runs/{name}"
    content = objects.read_json(account, bucket, f"{folder}/{run_folder.CONFIG}")
    if content is None:
        return
    try:
        there = run_folder.parse_config(content, f"s3://{bucket}/{folder}/{run_folder.CONFIG}")
    except UserError as error:
        raise UserError(printable(str(error))) from error
    known = cfg.model.n_token or there.model.n_token
    here = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_token=known))
    if differ := run_folder.differences(there, here):
        raise UserError(
            f"s3://{bucket}/{folder} belongs to a run of another config "
            f"({printable('; '.join(differ))}); take another --name"
        )
    if objects.exists(account, bucket, f"{folder}/{RESULTS}"):
        raise UserError(
            f"the run {name} has finished: its results are in s3://{bucket}/{folder}; take another "
            "--name"
        )


def _reserved_zone(account: Account, command: LaunchCommand, kind: InstanceType) -> str:
    reserved = command.reservation or command.capacity_block
    return hardware.reserved_zone(account, reserved, kind) if reserved else ""


def _gpu_name(kind: InstanceType) -> str:
    return kind.gpu_name if kind.gpus else ""


def _zones(
    command: LaunchCommand, kind: InstanceType, prices: Prices, place: Network | None, reserved: str
) -> tuple[str, ...]:
    """The zones to try, the cheapest first; those without a price last.

    Spare capacity is what makes spot prices low, so that this is the order for all hosts.

    Raises UserError if there is none.
    """
    offered = ", ".join(kind.zones)
    if command.zone and command.zone not in kind.zones:
        raise UserError(
            f"{kind.name} is not offered in {printable(command.zone)}; it is in {offered}"
        )
    only = {zone for zone in (command.zone, reserved) if zone}
    zones = [zone for zone in kind.zones if only <= {zone}]
    if place:
        zones = [zone for zone in zones if zone in place.subnets]
    if not zones:
        where = f"subnet {command.subnet}" if command.subnet else "default VPC"
        raise UserError(
            f"the {where} has no part in a zone where {kind.name} can be started "
            f"({', '.join(sorted(only)) or offered}); name another --subnet"
        )
    if command.max_price is not None:
        least = min((prices.spot.get(zone, 0.0) for zone in zones), default=0.0)
        zones = [zone for zone in zones if prices.spot.get(zone, 0.0) <= command.max_price]
        if not zones:
            raise UserError(
                f"a spot {kind.name} costs ${least:.2f} an hour or more now, and --max-price is "
                f"{command.max_price:g}; raise it, or wait"
            )
    return tuple(sorted(zones, key=lambda zone: (prices.spot.get(zone, math.inf), zone)))


def prices_of(command: LaunchCommand, zones: tuple[str, ...], prices: Prices) -> dict[str, float]:
    """US dollars an hour of a host that the command rents, by zone, where it is known."""
    if command.capacity_block:
        return dict.fromkeys(zones, 0.0)  # it has been paid for
    if command.spot:
        return {zone: prices.spot[zone] for zone in zones if zone in prices.spot}
    return {} if prices.on_demand is None else dict.fromkeys(zones, prices.on_demand)


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Titles and texts of the plan."""
    rental = plan.rental
    yield "run", f"{plan.name}, config {plan.config}, logs in {plan.logdir or 'the default folder'}"
    if rental:
        yield from _rental_rows(plan, rental)
    else:
        yield "hosts", f"{plan.machines}, which run already"
    devices = f" over {plan.machines * max(1, plan.gpus)} devices" if plan.gpus is not None else ""
    yield "batch", f"{plan.batch} sequences{devices}, learning rate {plan.peak_lr:.3g}"
    if plan.speed and plan.hours:
        measured = f"{plan.speed.tokens_per_s:,.0f} tokens/s, as measured in {plan.speed.run}"
        yield "speed", f"{measured}; {_duration(plan.hours)} for {plan.max_tokens:,} tokens"
    else:
        yield "speed", f"unknown: not measured on these machines yet; {plan.max_tokens:,} tokens"
    if plan.others:
        yield "note", f"it goes on with the run that {plan.others} launched"
    yield "command", quoted(["python", *plan.trainer])
    for run in plan.standing:
        states = ", ".join(f"{host.instance_id} {host.state}" for host in run.hosts)
        yield "stands", f"launched by {run.owner} {run.started:%Y-%m-%d %H:%M} UTC: {states}"


def _rental_rows(plan: Plan, rental: Rental) -> Iterator[tuple[str, str]]:
    market = rental.reserved or ("spot" if rental.spot else "on demand")
    yield "hosts", f"{plan.machines} x {_parts(rental.kind)}, {market}"
    yield (
        "where",
        f"account {rental.account}, "
        + ", then ".join(
            f"{zone} (${rental.prices[zone]:.2f} an hour each)" if zone in rental.prices else zone
            for zone in rental.zones
        ),
    )
    driver = "; the NVIDIA driver is installed" if rental.image.needs_driver else ""
    yield "image", f"{rental.image.id} {rental.image.name}{driver}"
    yield "price", _price_text(plan, rental)
    if rental.max_hours is None:
        yield (
            "end",
            "--keep: once they train, the hosts run, and cost, until they are stopped by hand",
        )
    else:
        yield (
            "end",
            f"hosts {'terminate' if rental.spot else 'stop'} 10 minutes after success, 60 minutes "
            f"after an error or the last step, and after {rental.max_hours:g} hours",
        )
        if plan.hours and plan.hours > rental.max_hours:
            yield (
                "note",
                f"that is before training ends: raise --max-hours above {plan.hours:.1f}, or give "
                "the same command again then; it goes on from the last checkpoint",
            )
    yield "SSH", f"from {', '.join(str(source) for source in rental.ssh)} alone"
    for words in rental.creates:
        yield "makes", words


def _parts(kind: InstanceType) -> str:
    parts = [f"{kind.vcpus} vCPUs", f"{kind.memory_gib:.0f} GiB"]
    if kind.gpus:
        parts.insert(0, f"{kind.gpus} {kind.gpu_name} of {kind.gpu_memory_gib:.0f} GiB")
    if kind.efa_interfaces:
        parts.append(f"EFA {kind.network_gbps:g} Gbit/s")
    return f"{kind.name} ({', '.join(parts)})"


def _price_text(plan: Plan, rental: Rental) -> str:
    price = rental.price(plan.machines)
    parts = ["unknown" if price is None else f"${price:,.2f} an hour now"]
    if rental.spot and rental.on_demand is not None:
        parts[0] += f" (on demand ${plan.machines * rental.on_demand:,.2f})"
    if price is not None and plan.hours is not None:
        parts.append(f"${price * plan.hours:,.2f} for the expected {_duration(plan.hours)}")
    bound = rental.bound(plan.machines)
    if bound is not None and rental.max_hours is not None:
        parts.append(f"at most ${bound * rental.max_hours:,.2f} in {rental.max_hours:g} hours")
    return "; ".join(parts)


def _duration(hours: float) -> str:
    minutes = math.ceil(60 * hours - 1e-6)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _times(price: float | None, hours: float | None) -> float | None:
    return None if price is None or hours is None else price * hours
