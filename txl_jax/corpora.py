"""Where text comes from: the corpus that a config names."""

from txl_jax import folders, layouts
from txl_jax.config import DataConfig
from txl_jax.documents import Corpus, unreadable
from txl_jax.errors import UserError


def open_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that cfg names; its files are listed, not yet read.

    Raises UserError where there is no such folder, no file in it, or it cannot be read.
    """
    try:
        if cfg.dataset == "synthetic":
            raise UserError(
                "--dataset synthetic has nothing to learn from: add --throughput, or name a real "
                "data set"
            )
        if cfg.dataset == "text":
            return folders.text(cfg)
        if cfg.text_dir:
            raise UserError("--text-dir is read only with --dataset text: add it")
        if cfg.dataset == "stdlib":
            return folders.stdlib()
        return layouts.named(cfg)
    except OSError as error:
        raise unreadable(error) from None
