"""A question before something that costs, or cannot be taken back."""

import sys

from txl_jax.errors import UserError

DECLINED_STATUS = 1
"""Exit status of a command that was told not to go on."""


def agreed(question: str, yes: bool) -> bool:
    """Whether somebody agrees; with `yes` nobody is asked.

    Raises UserError if nobody is there to be asked.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked: add --yes to go on without a question")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
