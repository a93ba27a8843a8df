"""Fixtures: runs that are trained once for all tests.

A pytest plugin: test modules say `pytest_plugins = ["tests.tiny_runs"]`.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.tiny import LOGDIR, WORDS, Shell, write_text


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    home = tmp_path_factory.mktemp("home")
    write_text(home / "text")
    # Tests that run in the background ignore Ctrl-C, and what they start would inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Shell(home, tmp_path_factory.mktemp("compiled"))
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def undisturbed(shell: Shell) -> tuple[str, str]:
    """Output and error output of the run of `WORDS` in `LOGDIR`, from beginning to end."""
    # It prints what it found in the text only where no earlier test had token files made.
    shutil.rmtree(shell.home / "data", ignore_errors=True)
    status, output, errors = shell.run("train", *WORDS)
    assert status == 0, errors
    return output, errors


@pytest.fixture(scope="session")
def finished(shell: Shell, undisturbed: tuple[str, str]) -> Path:
    """The folder of that run; tests that change something in it take a copy."""
    return shell.home / LOGDIR


@pytest.fixture
def copied(shell: Shell, finished: Path, tmp_path: Path) -> Shell:
    """As `shell`, in a copy of its home: its text and the finished run may be changed."""
    home = tmp_path / "home"
    for name in ("text", "data", LOGDIR):
        shutil.copytree(shell.home / name, home / name)
    return Shell(home, shell.cache)


@pytest.fixture(scope="module")
def compiled(shell: Shell) -> Iterator[None]:
    """For tests that train in this process: they share compiled programs as `Shell` does."""
    before = (False, False, None, 1.0)
    for settings in ((True, True, str(shell.cache), 0.0), before):
        jax.config.update("jax_disable_most_optimizations", settings[0])
        jax.config.update("jax_enable_compilation_cache", settings[1])
        jax.config.update("jax_compilation_cache_dir", settings[2])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", settings[3])
        compilation_cache.reset_cache()
        if settings is not before:
            yield
