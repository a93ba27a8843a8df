"""Where text comes from: the corpus that a config names."""

import contextlib
from pathlib import Path

from txl_jax import code, downloads, folders, layouts, locks, wiki
from txl_jax import prepared as preparation
from txl_jax.config import DataConfig
from txl_jax.documents import Corpus, unreadable
from txl_jax.errors import UserError
from txl_jax.layouts import LAYOUTS
from txl_jax.sources import WORD_LISTS

_FOLDERS = {"text": folders.text, "code": code.code, "wiki": wiki.wiki}


def open_corpus(cfg: DataConfig) -> Corpus:
    """The corpus that cfg names; its files are listed, not yet read, and nothing is downloaded.

    A named data set is read from the user's own files in its folder below `cfg.data_dir`, if there
    are any, else from what `obtain` prepared.

    Raises UserError where there is no such folder, no file in it, or it cannot be read.
    """
    try:
        if cfg.dataset == "synthetic":
            raise UserError(
                "--dataset synthetic has nothing to learn from: add --throughput, or name a real "
                "data set"
            )
        if cfg.code_files and cfg.dataset != "code":
            raise UserError("--code-files is read only with --dataset code: add it")
        if cfg.dataset in _FOLDERS:
            return _FOLDERS[cfg.dataset](cfg)
        if cfg.text_dir:
            raise UserError("--text-dir is read only with --dataset text, code or wiki: add it")
        if cfg.dataset == "stdlib":
            return folders.stdlib()
        return _named(cfg)
    except OSError as error:
        raise unreadable(error, f"the corpus {cfg.dataset}") from None


def obtain(cfg: DataConfig) -> None:
    """Downloads and prepares the data set that cfg names, if it has a name and is nowhere yet.

    Several processes of a host may call it at the same time: one does it, the others wait.

    Raises UserError where that fails, as `builders.prepare` and `downloads.fetch`.
    """
    if not is_missing(cfg):
        return
    # It takes half a second to import, and only this needs it.
    from txl_jax import builders

    data_dir = Path(cfg.data_dir)
    folder = data_dir / preparation.FOLDER
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.alone(folder / ".lock", f"fills {folder}"))
        except OSError as error:
            raise UserError(
                f"cannot write to {folder}: {error.strerror}; name another folder with --data-dir"
            ) from None
        if preparation.word_list(data_dir, cfg):
            downloads.fetch(WORD_LISTS[cfg.dataset], data_dir / preparation.DOWNLOADS)
        builders.prepare(cfg.dataset, data_dir)


def _named(cfg: DataConfig) -> Corpus:
    layouts.check_vocab(cfg)
    if layouts.has_files(cfg):
        return layouts.named(cfg)
    found = preparation.prepared(cfg)
    if found is None:
        layout = LAYOUTS[cfg.dataset]
        raise UserError(
            f"{cfg.dataset} is not in {cfg.data_dir}: python -m txl_jax.data prepare --dataset "
            f"{cfg.dataset} --data-dir {cfg.data_dir} downloads it; or fill the folder "
            f"{Path(cfg.data_dir) / layout.folder}: {layout.source}"
        )
    return found


def is_missing(cfg: DataConfig) -> bool:
    """Whether `obtain` would download the data set that cfg names; UserError as that."""
    if cfg.dataset not in LAYOUTS:
        return False
    layouts.check_vocab(cfg)
    return not layouts.has_files(cfg) and preparation.prepared(cfg) is None
