"""Speed and cost of an experiment on 1 to 128 hosts: `python -m txl_jax.scaling predict`.

Every device keeps the sequences that it has in the experiment, so that a step takes more of them on
more hosts. `scaling_model` says how long it takes; how long a device computes comes from a
measurement on one, or from the FLOPs of a step and an assumed part of the peak.
"""

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax

from txl_jax import flops, instance_types, metrics, scaling_check
from txl_jax.account import with_known_vocabulary
from txl_jax.checks import check_batch, check_capability
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.instance_types import InstanceType
from txl_jax.model import abstract
from txl_jax.published import PIECES
from txl_jax.scaling_arguments import PredictArguments
from txl_jax.scaling_model import (
    NETWORK_FRACTION,
    NETWORK_LATENCY,
    NVLINK_FRACTION,
    NVLINK_LATENCY,
    all_reduce,
    links,
)
from txl_jax.tables import aligned

HOSTS = (1, 2, 4, 8, 16, 32, 64, 128)
UTILIZATION = 0.22
"""Of LARGE in bfloat16 with 16 sequences on one H100, 53.3 ms a step (bench/LOG.md, 2026-11-27)."""


class Assumption(NamedTuple):
    """What a prediction rests on."""

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class Workload:
    """What one device does in a step."""

    sequences: int
    tokens: int
    gradient_bytes: int
    """What it sums with all others."""
    compute: float
    """Seconds without the sum."""


@dataclass(frozen=True)
class Prediction:
    """A step on so many hosts, and what training costs."""

    hosts: int
    devices: int
    ms_per_step: float
    communication_ms: float
    """The part of it that is not hidden."""
    sequences_per_s: float
    tokens_per_s: float
    efficiency: float
    """Tokens/s against as many times those of one host, as a fraction."""
    dollars_per_hour: float
    hours: float
    """To train on the experiment's max_tokens."""
    dollars: float


def run(args: PredictArguments) -> None:
    """Prints the prediction that `args` ask for.

    Raises UserError: an instance type that is not known, a batch that its own devices cannot share,
    a type of number that the GPUs do not compute in, or whose peak is not known …
    """
    jax.config.update("jax_platforms", "cpu")
    cfg = with_known_vocabulary(args.experiment)
    kind = instance_types.find(cfg.cluster.instance_type)
    check(cfg, kind)
    work, assumed = workload(args, cfg, kind)
    price = kind.price if args.price is None else args.price
    found = predict(work, kind, args.overlap, price, cfg.train.max_tokens)
    assumed += _of_communication(args, kind)
    if args.json:
        told = {
            "config": args.config,
            "instance_type": kind.name,
            "assumptions": [one._asdict() for one in assumed],
            "hosts": [asdict(one) for one in found],
        }
        print(json.dumps(told))
    else:
        print(show(args.config, cfg, kind, found, assumed))


def check(cfg: Config, kind: InstanceType) -> None:
    """Raises UserError for an experiment that the model is not for, or that cannot run there."""
    if cfg.cluster.zero or cfg.cluster.fsdp:
        raise UserError(
            "with --zero and --fsdp parameters cross the devices too, and the model is that of one "
            "all-reduce of the gradients; leave them out"
        )
    devices = cfg.cluster.machines * cfg.cluster.gpus
    check_batch(devices, "batch", cfg.train.batch, cfg.train.accumulate)
    check_capability(cfg.model.dtype, kind.capability, kind.gpu)


def workload(
    args: PredictArguments, cfg: Config, kind: InstanceType
) -> tuple[Workload, list[Assumption]]:
    """What a device does, and what that was reckoned from."""
    devices = cfg.cluster.machines * cfg.cluster.gpus
    sequences = cfg.train.batch // devices
    tokens = sequences * cfg.model.tgt_len
    parameters = metrics.count(abstract(cfg.model)[1])
    assumed = [
        Assumption(
            "on each device",
            f"{sequences} sequences of {cfg.model.tgt_len} tokens",
            f"batch {cfg.train.batch} on {cfg.cluster.machines} x {cfg.cluster.gpus} devices",
        ),
        Assumption(
            "gradients",
            f"{4 * parameters / 1e9:.3f} GB",
            f"4 bytes for each of {parameters:,} parameters, summed once a step",
        ),
    ]
    if args.measured is not None:
        rate = args.measured
        assumed.append(Assumption("computing", f"{rate:,.0f} tokens/s a device", "--measured"))
    else:
        peak = flops.peak_flops(kind.gpu, cfg.model.dtype)
        if peak is None:
            raise UserError(
                f"dtype is {cfg.model.dtype}, for which no peak of a GPU is known: measure "
                "one device with --throughput and name its tokens/s with --measured"
            )
        per_token = flops.train_flops_per_token(cfg.model)
        mfu = UTILIZATION if args.mfu is None else args.mfu
        rate = mfu * peak / per_token
        assumed += [
            Assumption("FLOPs of a token", f"{per_token / 1e9:.2f} G", "flops.py"),
            Assumption(
                "peak of a device", f"{peak / 1e12:.0f} T/s", f"of one {kind.gpu}, data sheet"
            ),
            Assumption(
                "part of the peak",
                f"{mfu:.0%}",
                "--mfu" if args.mfu is not None else "LARGE on one H100 (bench/LOG.md)",
            ),
            Assumption("computing", f"{rate:,.0f} tokens/s a device", "the three before"),
        ]
    return Workload(sequences, tokens, 4 * parameters, tokens / rate), assumed


def predict(
    work: Workload, kind: InstanceType, overlap: float, price: float, max_tokens: int
) -> list[Prediction]:
    """The prediction for each of `HOSTS`.

    Args:
      overlap: the part of the communication that computing hides.
      price: US dollars an hour of one host.
    """
    found: list[Prediction] = []
    over = links(kind.nvlink, kind.network)
    for hosts in HOSTS:
        communication = all_reduce(work.gradient_bytes, hosts, kind.gpus, over, PIECES)
        exposed = (1 - overlap) * communication
        seconds = work.compute + exposed
        devices = hosts * kind.gpus
        tokens_per_s = devices * work.tokens / seconds
        first = found[0].tokens_per_s if found else tokens_per_s / hosts
        hours = max_tokens / tokens_per_s / 3600
        found.append(
            Prediction(
                hosts,
                devices,
                1e3 * seconds,
                1e3 * exposed,
                devices * work.sequences / seconds,
                tokens_per_s,
                tokens_per_s / (hosts * first),
                hosts * price,
                hours,
                hours * hosts * price,
            )
        )
    return found


def show(
    name: str,
    cfg: Config,
    kind: InstanceType,
    found: list[Prediction],
    assumed: list[Assumption],
) -> str:
    """The prediction for people, with all that it assumes."""
    rows = [
        (
            *("hosts", "GPUs", "ms/step", "of it comm.", "sequences/s", "tokens/s", "efficiency"),
            *("$/hour", "hours", "$"),
        )
    ]
    for one in found:
        rows.append(
            (
                f"{one.hosts}",
                f"{one.devices}",
                f"{one.ms_per_step:.1f}",
                f"{one.communication_ms:.1f}",
                f"{one.sequences_per_s:,.1f}",
                f"{one.tokens_per_s:,.0f}",
                f"{one.efficiency:.1%}",
                f"{one.dollars_per_hour:,.2f}",
                f"{one.hours:,.2f}",
                f"{one.dollars:,.2f}",
            )
        )
    worst, left_out = (f"{scaling_check.largest_error(fitted):.0%}" for fitted in (False, True))
    return "\n".join(
        [
            f"{name} on {kind.name} ({kind.gpus} x {kind.gpu}), {cfg.model.dtype}, "
            f"{cfg.train.max_tokens:,} tokens",
            "",
            aligned(rows),
            "",
            "Efficiency is against one host. Assumed:",
            *(f"  {one.what:<20}{one.value:<36}{one.source}" for one in assumed),
            "",
            "Not in it: hosts that are slower than others; validation, checkpoints, starts.",
            f"At published steps the model was up to {worst} off as it is, and up to {left_out} at",
            "those that its fit had not seen: python -m txl_jax.scaling check",
        ]
    )


def _of_communication(args: PredictArguments, kind: InstanceType) -> list[Assumption]:
    priced = f"on demand, {instance_types.PRICED}"
    return [
        Assumption(
            "NVLink",
            f"{kind.nvlink:.0f} GB/s x {NVLINK_FRACTION}",
            "data sheet; all-reduces on a p4d (scaling_model.py)",
        ),
        Assumption(
            "network",
            f"{kind.network:.0f} Gbit/s x {NETWORK_FRACTION}",
            "data sheet; all-reduces on p3dn and p4d (scaling_model.py)",
        ),
        Assumption(
            "latency of a hop",
            f"{1e6 * NVLINK_LATENCY:g} and {1e6 * NETWORK_LATENCY:g} µs",
            "NVLink: NCCL's table; network: all-reduces on p3dn",
        ),
        Assumption("all-reduces a step", f"{PIECES}", "as XLA splits LARGE's (bench/LOG.md)"),
        Assumption(
            "overlap",
            f"{args.overlap:.0%}",
            "--overlap" if args.overlap else "the sum begins when all gradients are there",
        ),
        Assumption(
            "price",
            f"${kind.price if args.price is None else args.price:g} an hour and host",
            priced if args.price is None else "--price",
        ),
    ]
