"""The folder of a run: which config it belongs to, and what started it when.

    config.json     the config, every field, as `dataclasses.asdict`
    run.json        {"starts": [...]}: command, versions, source revision, devices and time of each
                    start, the first one first
    imported.json   only where the weights come from another program: which one's they are, and what
                    was not known of them; such a run has no state to go on from

Whether a run is finished is the step of its newest checkpoint, not a file here.
"""

import dataclasses
import json
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from txl_jax import storage
from txl_jax.config import Config
from txl_jax.errors import UserError

CONFIG = "config.json"
STARTS = "run.json"
IMPORTED = "imported.json"
TRIAL = ".trial-"
"""Begins the names of files that are there for a moment, to see where a folder is seen."""
_LEFT_OVER = re.compile(rf"{re.escape(CONFIG)}.*{re.escape(storage.DRAFT)}$|{re.escape(TRIAL)}")
"""Names of what a start leaves that was killed: drafts of a config, trials."""
_SOURCE = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "tokenizers"),
    *("boto3", "nvidia-cublas", "nvidia-cublas-cu12"),
    *(f"jax-cuda{cuda}-{part}" for cuda in (12, 13) for part in ("plugin", "pjrt")),
    *(f"nvidia-{name}-cu{cuda}" for cuda in (12, 13) for name in ("cudnn", "nccl")),
)
"""Those that a result may depend on, and which of them there are depends on the machine."""
_MAY_DIFFER = {
    *("train.batch", "train.accumulate", "train.eval_batch"),
    *("train.logdir", "train.checkpoint_minutes", "data.data_dir"),
}


def open_run(logdir: Path, cfg: Config, *, command: Sequence[str], devices: str) -> int:
    """Makes `logdir` the folder of the run of `cfg`, or checks that it already is.

    A run goes on under the config that it began with, so that what stands in its folder is one
    experiment. What may differ from start to start are fields that cannot change a loss, but by
    rounding: train.logdir and data.data_dir (folders that were moved), train.checkpoint_minutes,
    train.accumulate and all of cluster. Besides, what other devices may have to divide, and this
    does change losses: train.batch (from then on; a rate scaled by optim.lr_batch is that of the
    new batch) and train.eval_batch (those of validations, a little). config.json then takes the
    new values, and run.json has the command that asked for them.

    `command` is the command line, word by word; `devices` says in words what it runs on. Of several
    processes the first one calls this.

    Returns the number of starts before this one.

    Raises UserError as `check`, before anything is written, and when writing fails all the same.
    """
    starts = check(logdir, cfg)
    with writable(logdir):
        logdir.mkdir(parents=True, exist_ok=True)
        _write(logdir / CONFIG, dataclasses.asdict(cfg))
        _write(logdir / STARTS, {"starts": [*starts, _this_start(command, devices)]})
    return len(starts)


def check(logdir: Path, cfg: Config) -> list[dict[str, Any]]:
    """The starts so far of the run of `cfg` in `logdir`; none where there is no run yet.

    Writes nothing. Raises UserError: the folder belongs to another config (the message lists the
    fields), holds other things but no run, its config cannot be read, or nothing can be written to
    it, because of its permissions or because the disk is full.
    """
    with _readable(logdir):
        is_run = (logdir / CONFIG).exists()
        if not is_run and logdir.exists():
            _check_empty(logdir)
    starts: list[dict[str, Any]] = []
    if is_run:
        if (logdir / IMPORTED).exists():
            raise UserError(
                f"{logdir} holds imported weights and no run that could go on; take another "
                f"--logdir, and start from these weights with --init-from {logdir} "
                f"--vocab-file {logdir / 'vocab.json'}"
            )
        there = read_config(logdir)
        n_token = cfg.model.n_token or there.model.n_token  # 0: not known yet
        model = dataclasses.replace(cfg.model, n_token=n_token)
        _check_same(logdir, there, dataclasses.replace(cfg, model=model))
        starts = _read_starts(logdir)
    with writable(logdir):
        storage.check_writable(logdir)
    return starts


def read_config(logdir: Path) -> Config:
    """The config of the run in `logdir`.

    Raises UserError when there is no run in that folder, or its config is damaged or was written by
    a version with other fields.
    """
    with _readable(logdir):
        if not logdir.is_dir():
            raise UserError(f"no run in {logdir}: there is no such folder")
        if not (logdir / CONFIG).exists():
            raise UserError(f"no run in {logdir}: {CONFIG} is missing from it")
    path = logdir / CONFIG
    return parse_config(_read(path), str(path))


def parse_config(content: Any, where: str) -> Config:
    """The config that a run's config.json, already read as JSON, holds; `where` names the file.

    Raises UserError when it is damaged or was written by a version with other fields.
    """
    return _from_dict(Config, content, where)


def _check_empty(logdir: Path) -> None:
    if not logdir.is_dir():
        raise UserError(f"{logdir} is a file; --logdir takes a folder")
    names = sorted(path.name for path in logdir.iterdir())
    others = [name for name in names if not _LEFT_OVER.match(name)]
    if others:
        raise UserError(
            f"{logdir} holds other things ({', '.join(others[:3])}{', …' * (len(others) > 3)}) and "
            f"no run; take another --logdir or empty it"
        )


def _check_same(logdir: Path, there: Config, here: Config) -> None:
    if differ := differences(there, here):
        raise UserError(
            f"{logdir} belongs to a run of another config ({'; '.join(differ)}); "
            f"take another --logdir, or delete the folder to start anew"
        )


def differences(there: Config, here: Config) -> list[str]:
    """The fields, with both values, by which a run of `there` cannot go on as one of `here`."""
    return [
        f"{name}: {old!r} there, {new!r} here"
        for (name, old), (_, new) in zip(_fields(there), _fields(here), strict=True)
        if old != new and name not in _MAY_DIFFER and not name.startswith("cluster.")
    ]


def _fields(cfg: Config) -> Iterator[tuple[str, Any]]:
    for section in dataclasses.fields(cfg):
        part = getattr(cfg, section.name)
        for field in dataclasses.fields(part):
            yield f"{section.name}.{field.name}", getattr(part, field.name)


def _from_dict(kind: type, values: Any, where: str) -> Any:
    """The dataclass `kind` from what `dataclasses.asdict` and JSON made of it."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is damaged: {values!r} is not a {kind.__name__}")
    hints = get_type_hints(kind)
    missing, unknown = sorted(hints.keys() - values.keys()), sorted(values.keys() - hints.keys())
    if missing or unknown:
        raise UserError(
            f"{where} was written by another version of this program (fields missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}); use the "
            f"source revision named in {STARTS}, or another --logdir"
        )
    fields = {}
    for name, hint in hints.items():
        value = values[name]
        if dataclasses.is_dataclass(hint):
            value = _from_dict(hint, value, where)  # pyright: ignore[reportArgumentType]
        elif isinstance(value, list):
            value = tuple(value)
        if not fits(value, hint):
            raise UserError(f"{where} is damaged: {name} cannot be {value!r}")
        fields[name] = value
    return kind(**fields)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON (its lists as tuples) has the type of a config's field."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, args[0]) for item in value)
    if hint is float:
        return type(value) in (float, int)
    return type(value) is (NoneType if hint is None else hint)


def _this_start(command: Sequence[str], devices: str) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "versions": {"python": platform.python_version()} | versions(),
        "source": _source_revision(),
        "devices": devices,
    }


def versions() -> dict[str, str]:
    """Those of `PACKAGES` that are installed, and their versions."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _source_revision() -> str | None:
    """The commit of the source, with `-dirty` when files were modified; None without git."""
    if not (_SOURCE / ".git").exists():
        return None
    git = ["git", "-C", str(_SOURCE), "--no-optional-locks"]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*git, *describe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _read_starts(logdir: Path) -> list[dict[str, Any]]:
    path = logdir / STARTS
    # A run that was killed between its two files has no start on record.
    starts = _read(path) if path.exists() else {"starts": []}
    if not isinstance(starts, dict) or not isinstance(starts.get("starts"), list):
        raise UserError(f"{path} is damaged; delete it to go on without the history of the run")
    return starts["starts"]


def _read(path: Path) -> Any:
    with _readable(path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or take another --logdir"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _write(path: Path, content: Any) -> None:
    storage.write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def writable(logdir: Path) -> Iterator[None]:
    """Turns an OSError of writing in the run's folder into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run's folder {logdir}: {error.strerror or error}; "
            f"take a --logdir that is writable and has space"
        ) from error
