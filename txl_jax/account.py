"""What a train step takes on each device, and what crosses the devices, before there is any.

    python -m txl_jax.sharding report --config=test_16 [--devices N] [--FIELD VALUE …]

The step is compiled for virtual CPU devices, and nothing is allocated: an experiment for 128 GPUs
is accounted for on a laptop. What lies on a device from step to step is the same on GPUs, and so
are the bytes that are sent; their compiler may join other collectives than the CPU's. Temporaries
are what XLA's CPU compiler plans. Its 16-bit products have operands and results in float32 too,
which GPUs do without: 16-bit totals were 8 to 27 % above the peaks that an H100 measured for three
such steps.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from txl_jax import config, metrics, preflight, sharding
from txl_jax.collectives import Collective, collectives
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.step import (
    TrainState,
    abstract_batch,
    abstract_state,
    make_train_step,
)

VOCABULARY = {"wikitext-103": 267_735, "enwik8": 204, "text8": 27, "lm1b": 793_470}
"""Entries of the vocabularies of data sets that do not change."""


@dataclass(frozen=True)
class ReportCommand(config.Command):
    """The words after `report`."""

    devices: int = 0
    """Devices to reckon with; 0: those of the experiment's machines."""


@dataclass(frozen=True)
class Account:
    """What a train step takes. Bytes are those on one device; all devices are alike."""

    devices: int
    parameters: int
    """Number of them, not bytes."""
    parameter_bytes: int
    gradient_bytes: int
    """float32, before the sum over the devices: whole but for layers that are gathered one by one.
    They are part of `temporary_bytes`."""
    optimizer_bytes: int
    memory_bytes: int
    """Segment memory."""
    other_bytes: int
    """The rest of the state, and the batch."""
    temporary_bytes: int
    """The most that activations, gradients and everything else within a step take at a time."""
    collectives: tuple[Collective, ...]

    @property
    def total_bytes(self) -> int:
        """What a step takes in all. The new state takes the place of the old one."""
        return (
            self.parameter_bytes
            + self.optimizer_bytes
            + self.memory_bytes
            + self.other_bytes
            + self.temporary_bytes
        )


def main(words: list[str]) -> int:
    """Prints the report that the words after `report` ask for.

    Raises UserError: an experiment that cannot run.
    """
    command = config.parse("python -m txl_jax.sharding report", words, ReportCommand)
    cfg = with_known_vocabulary(command.experiment)
    devices = command.devices or cfg.cluster.machines * cfg.cluster.gpus
    if devices < 1:
        raise UserError(f"devices is {devices}; it has to be at least 1, or 0 for the experiment's")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = sharding.make_mesh()
    preflight.check(cfg, mesh)
    print(show(command.config, cfg, account(cfg, mesh)))
    return 0


def with_known_vocabulary(cfg: Config) -> Config:
    """`cfg` with n_token filled in; raises UserError if only the text can say what it is."""
    if cfg.model.n_token:
        return cfg
    if cfg.data.dataset not in VOCABULARY:
        raise UserError(
            f"the vocabulary of dataset {cfg.data.dataset} is not known before it is read: give "
            "its size with --n-token"
        )
    n_token = VOCABULARY[cfg.data.dataset]
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_token=n_token))


def account(cfg: Config, mesh: Mesh) -> Account:
    """The account of the config's train step on the devices of `mesh`; nothing is allocated."""
    state = abstract_state(cfg, mesh)
    compiled = _compile(cfg, mesh, state)
    planned: Any = compiled.memory_analysis()
    parameter_bytes, optimizer_bytes, memory_bytes = map(
        _bytes_on_a_device, (state.params, state.opt_state, state.memory)
    )
    passed_in = planned.argument_size_in_bytes
    return Account(
        devices=mesh.devices.size,
        parameters=metrics.count(state.params),
        parameter_bytes=parameter_bytes,
        gradient_bytes=_gradient_bytes(cfg, mesh, state.params),
        optimizer_bytes=optimizer_bytes,
        memory_bytes=memory_bytes,
        other_bytes=passed_in - parameter_bytes - optimizer_bytes - memory_bytes,
        temporary_bytes=planned.temp_size_in_bytes
        + planned.output_size_in_bytes
        - planned.alias_size_in_bytes,
        collectives=tuple(collectives(compiled.as_text() or "")),
    )


def _compile(cfg: Config, mesh: Mesh, state: TrainState) -> jax.stages.Compiled:
    tokens = abstract_batch(cfg, mesh)
    # With more than one segment, so that the step has what it takes to begin an epoch.
    step: Any = make_train_step(cfg, mesh, segments=2)
    # The program is not run: its machine code need not be fast.
    return step.lower(state, tokens, tokens).compile({"xla_backend_optimization_level": 0})


def _bytes_on_a_device(tree: Any) -> int:
    def size(leaf: jax.ShapeDtypeStruct) -> int:
        assert leaf.sharding is not None
        part = leaf.sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(part, leaf.dtype).size * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _gradient_bytes(cfg: Config, mesh: Mesh, params: Any) -> int:
    by_layer = sharding.Layout.of(cfg, mesh).by_layer
    return sum(
        _bytes_on_a_device(part) if by_layer and name == "layers" else 4 * metrics.count(part)
        for name, part in params.items()
    )


def show(name: str, cfg: Config, found: Account) -> str:
    """The report, in lines."""
    layout = "fsdp" if cfg.cluster.fsdp else f"zero {cfg.cluster.zero}"
    each = cfg.train.batch // found.devices
    lines = [
        f"{name}: {found.devices} devices, {found.parameters:,} parameters",
        f"each device: {each} sequences of {cfg.model.tgt_len} tokens in {cfg.train.accumulate} "
        f"part{'s' if cfg.train.accumulate > 1 else ''}, {cfg.model.dtype}, {layout}, "
        f"{'remat' if cfg.model.remat else 'no remat'}",
        "",
        "bytes on each device",
        _row("parameters, float32", found.parameter_bytes),
        _row(f"optimizer state of {cfg.optim.optim}", found.optimizer_bytes),
        _row("segment memory", found.memory_bytes),
        _row("rest of the state, batch", found.other_bytes),
        _row("temporaries as the CPU compiler plans them", found.temporary_bytes),
        _row("(among them gradients, float32)", found.gradient_bytes),
        _row("total", found.total_bytes),
        "",
        "collectives of a step: runs x arrays, bytes on each device (in all runs)",
    ]
    if not found.collectives:
        lines.append("  none")
    return "\n".join(lines + _collective_lines(found.collectives))


def _row(what: str, number: int) -> str:
    return f"  {what:<44}{number:>18,}{number / 2**30:>9.2f} GiB"


def _collective_lines(found: tuple[Collective, ...]) -> list[str]:
    """A line for all collectives of a kind, in the same types, that run equally often."""
    alike: Counter[tuple[str, str, int | None]] = Counter()
    arrays, sizes = alike.copy(), alike.copy()
    for one in found:
        key = one.kind, ", ".join(one.types), one.runs
        alike[key] += 1
        arrays[key] += one.arrays
        sizes[key] += one.bytes
    lines = []
    for key, count in alike.items():
        kind, types, runs = key
        often = "?" if runs is None else f"{runs}"
        total = sizes[key] * (runs or 1)
        lines.append(
            _row(f"{count} {kind} of {types}, {often} x {arrays[key]} arrays", total)
            + (" for each run" if runs is None else "")
        )
    return lines
