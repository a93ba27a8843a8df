"""A trained model, read back from the folder of its run."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from txl_jax import checkpoint_reader, run_folder, sharding, vocab
from txl_jax.checkpoint_reader import Gather
from txl_jax.config import Config
from txl_jax.errors import UserError
from txl_jax.mirror import pull
from txl_jax.model import abstract
from txl_jax.store import Store, is_remote, local_folder, open_store
from txl_jax.token_files import TokenFiles

CHECKPOINTS = "checkpoints"
VOCAB = "vocab.json"
_PATIENCE = 30.0
"""Seconds for which a person who wants to read waits for a store that is away."""


@dataclass(frozen=True)
class Trained:
    """What a run has made of its parameters so far."""

    logdir: Path
    cfg: Config
    vocab: vocab.Vocab
    params: Any
    """Parameters, repeated on every device."""
    step: int
    """Optimizer steps that made them."""
    fingerprint: str | None
    """Of the token files that it was trained on; None: imported, trained elsewhere."""

    def check_corpus(self, tokens: TokenFiles) -> None:
        """Raises UserError if `tokens` are not those that the run was trained on.

        Imported weights take any corpus; `cfg` has it read with their vocabulary.
        """
        if self.fingerprint is not None:
            check_corpus(self.logdir, self.fingerprint, tokens)


def check_corpus(logdir: Path, fingerprint: str, tokens: TokenFiles) -> None:
    """Raises UserError unless `fingerprint`, that of the run in logdir, is the one of `tokens`."""
    if fingerprint != tokens.fingerprint:
        raise UserError(
            f"the corpus has changed since the run in {logdir} began (its tokens were "
            f"{fingerprint[:12]}, now they are {tokens.fingerprint[:12]}): bring the old files "
            "back, or take another --logdir"
        )


def load_trained(logdir: str | Path, which: Literal["best", "latest"], mesh: Mesh) -> Trained:
    """The model of the run in `logdir` at its best validation loss, or at its latest step.

    Of a run in s3://BUCKET/FOLDER, what it takes is downloaded to the local folder first.

    Raises:
      UserError: no run is there, it has no checkpoint yet, or it is damaged; S3 is away.
    """
    url, store = str(logdir), None
    folder = local_folder(url)
    if is_remote(url):
        store = open_store(url)
        pull(store, folder, (run_folder.IMPORTED, VOCAB), _PATIENCE)
    cfg = run_folder.read_config(folder)
    params, info = _params(folder, store, cfg, which, mesh)
    if info["fingerprint"] is None:
        data = dataclasses.replace(cfg.data, vocab_file=str(folder / VOCAB))
        cfg = dataclasses.replace(cfg, data=data)
    return Trained(
        folder, cfg, vocab.load(folder / VOCAB), params, info["step"], info["fingerprint"]
    )


def best_of(
    folder: Path,
    store: Store | None,
    cfg: Config,
    tokens: TokenFiles,
    mesh: Mesh,
    gather: Gather,
) -> Trained:
    """The best model of a run in the process that has trained it, or in each of its processes.

    Args:
      folder, store, gather: where the run's checkpoints are, and how its processes agree on one, as
        in `Checkpoints`.
    """
    params, info = _params(folder, store, cfg, "best", mesh, gather)
    return Trained(folder, cfg, tokens.vocab, params, info["step"], info["fingerprint"])


def _params(
    folder: Path,
    store: Store | None,
    cfg: Config,
    which: Literal["best", "latest"],
    mesh: Mesh,
    gather: Gather | None = None,
) -> tuple[Any, dict[str, Any]]:
    everywhere = sharding.repeated(mesh)
    _, shapes = abstract(cfg.model)
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes
    )
    return checkpoint_reader.restore_params(folder / CHECKPOINTS, wanted, which, store, gather)
