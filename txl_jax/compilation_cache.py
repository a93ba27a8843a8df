"""Compiled programs are kept on disk, so that a command which starts again need not compile them.

They lie in `$XDG_CACHE_HOME/txl_jax/compiled`, else in `~/.cache/txl_jax/compiled`. JAX's own
settings go before: JAX_COMPILATION_CACHE_DIR is another folder, JAX_ENABLE_COMPILATION_CACHE=false
none.
"""

import os
import sys
from pathlib import Path

import jax
from filelock import FileLock, Timeout

MAX_BYTES = 2 * 1024**3
"""The programs used last stay; that of a train step for CPUs takes 0.2 to 0.5 MB."""
_LOCK, _PROGRAM, _LAST_USE = ".lockfile", "-cache", "-atime"
"""What JAX calls its files (jax/_src/lru_cache.py)."""
_LOCK_SECONDS = 10.0
_WRITABLE_BY_OTHERS = 0o022


def keep_programs() -> None:
    """Turns the cache on, for a process that works alone; before anything is compiled.

    Of several processes JAX lets the first alone write, and nobody would start sooner. A folder
    that cannot be used is told in one line on standard error.
    """
    # What pyright knows of jax.config are its methods.
    kept = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009
    if not kept or getattr(jax.config, "jax_compilation_cache_dir") is not None:  # noqa: B009
        return
    try:
        folder = _folder()
        _prepare(folder)
    except (OSError, NotImplementedError, Timeout) as error:
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def _folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # to be ignored then, says the XDG Base Directory Specification
        caches = Path(os.path.expanduser("~")) / ".cache"
    if not caches.is_absolute():
        raise OSError("there is no home folder")
    return caches / "txl_jax" / "compiled"


def _prepare(folder: Path) -> None:
    """Makes the folder, or makes good what a process that was killed has left half done.

    Raises OSError, NotImplementedError or Timeout where the folder cannot be written or locked.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    # Programs are run as they are found.
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(f"others may write to {folder}")
    with FileLock(folder / _LOCK, timeout=_LOCK_SECONDS, is_singleton=False):
        # JAX writes the time of the last use after the program, and fails at those without.
        for program in folder.glob(f"*{_PROGRAM}"):
            if not program.with_name(program.name.removesuffix(_PROGRAM) + _LAST_USE).exists():
                program.unlink()
