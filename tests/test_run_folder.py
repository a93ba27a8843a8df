import dataclasses
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

import pytest

import txl_jax
from txl_jax.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from txl_jax.errors import UserError
from txl_jax.run_folder import TRIAL, check, open_run, read_config

COMMAND = ["python", "-m", "txl_jax.train", "--prompt", "a b's"]


def start(logdir: Path, cfg: Config | None = None) -> int:
    return open_run(logdir, cfg or Config(), command=COMMAND, devices="4 cpu")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_with(tmp_path: Path, **changes) -> Path:
    """A run whose config.json was edited: a section's fields are set, or removed by `...`."""
    start(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for section, fields in changes.items():
        for name, value in fields.items():
            config[section][name] = value
            if value is ...:
                del config[section][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_config_comes_back_as_it_was(tmp_path):
    cfg = Config(
        model=ModelConfig(d_embed=32, tie_projs=(False, True), same_length=True, dropout=0.1),
        data=DataConfig(dataset="text", text_dir="a/é"),
        optim=OptimConfig(lr=1 / 3, clip=1),
        train=TrainConfig(max_tokens=2**40),
    )
    start(tmp_path / "runs" / "one", cfg)
    assert read_config(tmp_path / "runs" / "one") == cfg
    written = json.loads((tmp_path / "runs" / "one" / "config.json").read_text())
    assert written["model"]["tie_projs"] == [False, True]
    assert written["optim"]["lr"] == 1 / 3
    assert sorted(content(tmp_path / "runs" / "one")) == ["config.json", "run.json"]


def test_a_check_gives_the_starts_and_writes_nothing(tmp_path):
    logdir = tmp_path / "runs" / "one"
    assert check(logdir, Config()) == []
    assert list(tmp_path.iterdir()) == []
    start(logdir)
    before = content(logdir)
    assert check(logdir, Config()) == json.loads(before["run.json"])["starts"]
    assert content(logdir) == before


def test_each_start_is_recorded(tmp_path):
    start(tmp_path)
    start(tmp_path)
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert first["command"] == "python -m txl_jax.train --prompt 'a b'\"'\"'s'"
    assert first["devices"] == "4 cpu"
    assert first["versions"]["python"] == platform.python_version()
    packages = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"]
    assert {name: first["versions"][name] for name in packages} == {
        name: metadata.version(name) for name in packages
    }
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert second.keys() == first.keys()


def test_starts_are_counted(tmp_path):
    assert [start(tmp_path) for _ in range(3)] == [0, 1, 2]


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    start(tmp_path)
    before = content(tmp_path)
    other = Config(optim=OptimConfig(lr=0.003), model=ModelConfig(d_embed=64, n_layer=2))
    with pytest.raises(UserError) as caught:
        start(tmp_path, other)
    differ = "model.n_layer: 4 there, 2 here; model.d_embed: None there, 64 here; "
    assert f"({differ}optim.lr: 0.001 there, 0.003 here)" in str(caught.value)
    assert "--logdir" in str(caught.value)
    assert content(tmp_path) == before


def test_every_field_but_the_free_ones_must_agree(tmp_path):
    start(tmp_path)
    free = []
    for section in dataclasses.fields(Config):
        part = getattr(Config(), section.name)
        for field in dataclasses.fields(part):
            other = dataclasses.replace(part, **{field.name: "another"})
            try:
                start(tmp_path, dataclasses.replace(Config(), **{section.name: other}))
            except UserError as error:
                assert f"{section.name}.{field.name}: " in str(error)
            else:
                free.append(field.name)
                (tmp_path / "config.json").unlink()
                (tmp_path / "run.json").unlink()
                start(tmp_path)
    cluster = [field.name for field in dataclasses.fields(ClusterConfig)]
    train = ["batch", "accumulate", "eval_batch", "checkpoint_minutes", "logdir"]
    assert free == ["data_dir", *train, *cluster]


def test_what_may_differ_is_taken_over(tmp_path):
    start(tmp_path)
    moved = Config(
        data=DataConfig(data_dir="elsewhere"),
        train=TrainConfig(batch=32, accumulate=2, checkpoint_minutes=9.0, logdir="x"),
    )
    with (tmp_path / "config.json").open() as reader:
        start(tmp_path, moved)
        assert json.load(reader)["data"]["data_dir"] == "data"  # a reader's file does not change
    assert read_config(tmp_path) == moved


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": 3}', "\0\0\0", "\xff"])
def test_a_damaged_config_is_one_line(tmp_path, text):
    start(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    for use in (read_config, start):
        with pytest.raises(UserError, match=r"config.json") as caught:
            use(tmp_path)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n_layer", "six"), ("n_layer", 2.5), ("n_layer", None), ("n_layer", True)),
        *(("d_embed", "x"), ("dropout", "0"), ("dtype", "float8"), ("same_length", 0)),
        *(("tie_projs", [1]), ("tie_projs", True)),
    ],
)
def test_a_field_of_another_type_is_one_line(tmp_path, field, value):
    config_with(tmp_path, model={field: value})
    with pytest.raises(UserError, match=f"config.json is damaged: {field} cannot be"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": ..., "n_layers": 4}, "fields missing: n_layer; unknown: n_layers"),
        ({"n_layers": 4}, "fields missing: none; unknown: n_layers"),
        ({"n_layer": ..., "d_head": ...}, "fields missing: d_head, n_layer; unknown: none"),
    ],
)
def test_a_config_of_another_version_is_one_line(tmp_path, fields, message):
    config_with(tmp_path, model=fields)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_a_damaged_history_is_one_line(tmp_path):
    start(tmp_path)
    for text in ("{", "[]", '{"starts": 1}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run.json is damaged"):
            start(tmp_path)


def test_a_start_that_was_killed_between_the_files_is_taken_up(tmp_path):
    left = tmp_path / "config.json.0123456789abcdef.tmp"
    for path in (tmp_path / "config.json.tmp", left):
        path.write_text('{"mod')
    start(tmp_path)
    (tmp_path / "run.json").unlink()
    left.unlink()
    start(tmp_path)
    assert sorted(content(tmp_path)) == ["config.json", "run.json"]
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


def test_what_a_killed_start_leaves_is_in_nobodys_way(tmp_path):
    for name in ("config.json.tmp", f"{TRIAL}4f2a"):
        (tmp_path / name).write_text("")
    start(tmp_path)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\) and no run"):
        start(tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"years"}
    with pytest.raises(UserError, match=r"no run in .*: config.json is missing"):
        read_config(tmp_path)


def test_no_folder_or_a_file(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; --logdir takes a folder"):
        start(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write the run's folder .*Not a directory"):
        start(tmp_path / "file" / "run")


@contextmanager
def not_as_root() -> Iterator[None]:
    """Root may write everywhere; a test of permissions has to be somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["", "run"])
def test_an_unwritable_folder_is_one_line(name):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        closed = Path(folder) / "closed"
        closed.mkdir()
        closed.chmod(0o555)
        with (
            not_as_root(),
            pytest.raises(UserError, match=r"cannot write the run's folder .*Permission denied"),
        ):
            start(closed / name)


def test_an_unreadable_folder_is_one_line(tmp_path):
    start(tmp_path / "run")
    tmp_path.chmod(0)
    try:
        with not_as_root(), pytest.raises(UserError, match=r"cannot read .*Permission denied"):
            read_config(tmp_path / "run")
    finally:
        tmp_path.chmod(0o755)


def test_a_full_disk_is_one_line_and_damages_nothing(tmp_path):
    start(tmp_path)
    before = content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write the run's folder .*too large"):
            start(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: content(tmp_path)[name] for name in before} == before
    start(tmp_path)
    assert read_config(tmp_path) == Config()


REVISION = "import txl_jax.run_folder as r; print(r._source_revision())"


def test_the_source_revision(tmp_path):
    """Absent without git, the commit's name with it, -dirty after a change."""
    source = Path(txl_jax.__file__).parent
    shutil.copytree(source, tmp_path / "txl_jax", ignore=shutil.ignore_patterns("__pycache__"))

    def run(*command: str, **env: str) -> str:
        plain = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=plain | env, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def revision(**env: str) -> str:
        return run(sys.executable, "-c", REVISION, **env)

    assert revision() == "None"
    run("git", "init", "-q")
    assert revision() == "None"
    run("git", "add", "txl_jax")
    run("git", *("-c", "user.name=n", "-c", "user.email=e"), "commit", "-q", "-m", "first")
    run("git", "tag", "v1")
    commit = run("git", "rev-parse", "HEAD")
    assert revision() == commit
    (tmp_path / "txl_jax" / "__init__.py").write_text("")
    assert revision() == commit + "-dirty"
    assert revision(PATH="/nowhere") == "None"
