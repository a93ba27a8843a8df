"""The command line: `python -m launcher COMMAND …`, or without a command a launch.

Each command is a module in `commands/`, with a frozen dataclass `Options` and `main(options)`; its
docstring is its help.
"""

import ast
import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import threading
from pathlib import Path

from launcher import commands
from launcher.names import PROG
from txl_jax.config import nearest, parse_words
from txl_jax.errors import UserError, run_command

_AGAIN_SECONDS = 0.05


def main(words: list[str]) -> int:
    """Exit status of the command or launch. Raises UserError for what is neither."""
    if not words or words == ["help"]:
        print(overview())
        return 0
    if words[0].startswith("-"):
        from launcher import launch  # what a command does not need takes half a second to import

        return launch.main(words)
    name, *rest = words
    if name not in _commands():
        raise UserError(f"there is no command {name!r}{nearest(name, _commands())}; see {PROG}")
    module = importlib.import_module(f"launcher.commands.{name}")
    options = parse_words(module.Options, None, f"{PROG} {name}", module.__doc__ or "", rest)
    return module.main(options)


def overview() -> str:
    """What can be typed, a line for each command."""
    lines = [
        f"{PROG} --config=NAME …         launch an experiment: rent hosts, prepare them, train",
        f"{PROG} --config=NAME --help    its settings, and those of a launch",
    ]
    lines += [f"{PROG} {name:<22} {_about(name)}" for name in _commands()]
    return "\n".join(lines)


def _commands() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def _about(name: str) -> str:
    """The first line of a command's help; read, as importing all of them takes a second."""
    source = (Path(commands.__file__).parent / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


def _interruptible(words: list[str]) -> int:
    """As `main`. Ctrl-C within a lock's own code may come out as an error about the lock."""
    try:
        return main(words)
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def _deliver_again(ignored: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C that came within what Python runs on its own, such as `__del__`, would be lost."""
    if ignored.exc_type is KeyboardInterrupt:
        # At once it would come within this, and be lost again.
        again = threading.Timer(_AGAIN_SECONDS, os.kill, [os.getpid(), signal.SIGINT])
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(ignored)


def _run() -> None:
    """As `run_command`, but does not wait for threads that wait for AWS or a host."""
    sys.unraisablehook = _deliver_again
    try:
        run_command(_interruptible)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    _run()
