"""The one kind of error that is the user's to mend, and how a command reports it."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

USAGE_STATUS = 2
RESTART_STATUS = 75
"""A trainer that can go on from its last checkpoint if it is started again (EX_TEMPFAIL)."""
INTERRUPTED_STATUS = 130
BROKEN_PIPE_STATUS = 141


class UserError(Exception):
    """Something the user can put right: one line says what is wrong and what would be right."""


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main(sys.argv[1:])` and exits with its status.

    A `UserError` becomes one line on standard error and exit status 2, Ctrl-C exit status 130.
    A reader that closed the pipe (`| head`) ends it quietly. Anything else is a bug and keeps its
    traceback.
    """
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USAGE_STATUS
    except KeyboardInterrupt:
        print(file=sys.stderr)
        status = INTERRUPTED_STATUS
    except BrokenPipeError:
        # Python writes what is left at exit, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE_STATUS
    sys.exit(status)
