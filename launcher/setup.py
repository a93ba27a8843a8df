"""Prepares hosts and starts the trainer on them; every phase may be done again after a crash."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.remote import Hosts
from txl_jax.config import Config

SESSION = "txl"
"""Name of the tmux session that holds the trainer."""


@dataclass(frozen=True)
class Work:
    """What hosts are prepared for."""

    name: str
    """Name of the run."""
    config: Config
    words: tuple[str, ...]
    """Words of the trainer as typed: `--config NAME …`, without cluster addresses and --logdir."""
    logdir: str
    """s3://BUCKET/runs/NAME; with --hosts also a folder."""
    output: str
    """s3://BUCKET/launches/NAME, where the hosts' output goes; empty: it stays on the hosts."""
    archive: Path
    """The source, tar.gz."""
    sha256: str
    """Of the archive."""
    coordinator: str
    """Address of host 0 in the private network."""
    gpus: int
    """GPUs of a host; 0: it trains on its CPU."""
    needs_driver: bool
    efa_interfaces: int
    network_gbps: float
    """Rate of a host's network; 0: not known."""


def phases(hosts: Hosts, work: Work, say: Callable[[str], None]) -> Iterator[tuple[str, float]]:
    """Prepares the hosts and starts the trainer, phase by phase.

    Yields the name of a phase, and the seconds that it may take at most, before it is done; it is
    done when the next one comes. `say` gets warnings.

    Raises UserError: names the hosts where the phase failed.
    """
    raise NotImplementedError


def stop_trainer(hosts: Hosts, timeout: float = 180.0) -> None:
    """Has the trainers save and end, and waits for that; none may be running."""
    raise NotImplementedError
