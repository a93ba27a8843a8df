"""Compiled programs outlive the process: where, for whom, and what is done when they cannot."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tests.tiny import ROOT, WORDS, Shell, files, learned, wait_for_step
from txl_jax import compilation_cache

pytest_plugins = ["tests.tiny_runs"]

SETTINGS: dict[str, Any] = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": None,
    "jax_compilation_cache_max_size": -1,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
"""Those of a process whose user has set none, but that quick programs are kept as well."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder of its own for this process."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for settings in (SETTINGS, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()
        if settings is not before:
            yield tmp_path


def folder() -> str | None:
    return getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (pyright)


def most() -> int:
    return getattr(jax.config, "jax_compilation_cache_max_size")  # noqa: B009 (pyright)


def compile_something(number: int) -> None:
    jax.jit(lambda: jax.numpy.arange(7) * number).lower().compile()


def programs(folder: Path) -> dict[str, bytes]:
    return {name: found for name, found in files(folder).items() if name.endswith("-cache")}


def test_programs_lie_in_the_home_folder_and_are_limited(home):
    compilation_cache.keep_programs()
    compiled = home / ".cache" / "txl_jax" / "compiled"
    assert folder() == str(compiled)
    assert compiled.stat().st_mode & 0o777 == 0o700
    assert most() == compilation_cache.MAX_BYTES
    compile_something(1)
    assert len(programs(compiled)) == 1


def test_the_oldest_give_way(home, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 12_000)
    compilation_cache.keep_programs()
    compiled = home / ".cache" / "txl_jax" / "compiled"
    compile_something(1)
    (first,) = programs(compiled)
    for number in range(2, 9):
        compile_something(number)
    left = programs(compiled)
    assert left and first not in left
    assert sum(map(len, left.values())) <= 12_000


def test_the_folder_of_caches_may_be_another(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    compilation_cache.keep_programs()
    assert folder() == str(home / "caches" / "txl_jax" / "compiled")
    assert not (home / ".cache").exists()


def test_what_the_user_has_set_goes_before(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    compilation_cache.keep_programs()
    assert folder() and most() == -1
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    compilation_cache.keep_programs()
    assert folder() == "elsewhere" and most() == -1


def test_it_is_off_where_jax_keeps_nothing(home):
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.keep_programs()
    assert folder() is None
    assert not files(home)


@pytest.mark.parametrize(
    "home_folder, complaint",
    [
        ("/dev/null", "[Errno 20] Not a directory: '/dev/null/.cache"),
        ("here", "there is no home folder"),
    ],
)
def test_a_folder_that_cannot_be_is_one_line(home, home_folder, complaint, monkeypatch, capsys):
    monkeypatch.setenv("HOME", home_folder)
    monkeypatch.chdir(home)
    compilation_cache.keep_programs()
    assert folder() is None
    output, errors = capsys.readouterr()
    assert not output and errors.count("\n") == 1
    assert errors.startswith(f"compiled programs are not kept: {complaint}")
    assert not files(home)


def test_programs_that_others_may_have_put_there_are_not_run(home, capsys):
    compiled = home / ".cache" / "txl_jax" / "compiled"
    compiled.mkdir(parents=True)
    compiled.chmod(0o770)
    compilation_cache.keep_programs()
    assert folder() is None
    said = f"compiled programs are not kept: others may write to {compiled}\n"
    assert capsys.readouterr().err == said


def test_a_program_that_was_written_by_half_is_compiled_anew(home, recwarn):
    """Killed while JAX writes: it would warn of that program at every start, and never mend it."""
    compilation_cache.keep_programs()
    compiled = home / ".cache" / "txl_jax" / "compiled"
    compile_something(1)
    ((name, whole),) = programs(compiled).items()
    compile_something(2)
    (compiled / name).write_bytes(whole[: len(whole) // 2])
    (compiled / name.replace("-cache", "-atime")).unlink()

    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    jax.clear_caches()
    compilation_cache.keep_programs()
    assert len(programs(compiled)) == 1 and name not in programs(compiled)
    compile_something(1)
    assert len(programs(compiled)) == 2 and name in programs(compiled)
    assert not recwarn.list


@pytest.mark.slow
@pytest.mark.processes
def test_the_next_start_has_them_and_learns_the_same_bit_for_bit(shell: Shell, tmp_path: Path):
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("XDG_CACHE_HOME", None)

    def train(name: str) -> list[dict[str, Any]]:
        """What it learned in the first steps."""
        logdir = shell.home / "runs" / name
        words = [*WORDS, "--log-every", "1", "--logdir", str(logdir)]
        process = shell.start("train", *words, env=environment)
        wait_for_step(process, logdir, 9)
        process.terminate()
        _, errors = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM and not errors, errors
        return [line for line in learned(logdir) if line["step"] < 10]

    compiled = tmp_path / ".cache" / "txl_jax" / "compiled"
    first = train("first")
    kept = programs(compiled)
    assert any(name.startswith("jit_train_step-") for name in kept)
    assert train("second") == first
    assert programs(compiled).keys() == kept.keys()
