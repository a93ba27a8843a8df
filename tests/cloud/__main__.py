"""The local cloud for people: `make cloud`, or `python -m tests.cloud [FOLDER]`.

It prints what to export in another terminal, so that the launcher finds it, and runs until Ctrl-C.
FOLDER keeps the hosts' files; without it they are removed at the end.
"""

import contextlib
import errno
import shlex
import signal
import socket
import sys
import tempfile
from pathlib import Path

from tests.cloud.cloud import LocalCloud, missing
from txl_jax.errors import UserError, run_command

_SHOWN = ("HOME", "AWS_", "JAX_PLATFORMS")


def main(words: list[str]) -> int:
    """Exit status 0 after Ctrl-C or SIGTERM."""
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise UserError("python -m tests.cloud takes one word at most: a folder")
    if reason := missing():
        raise UserError(reason)
    _check_port()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with contextlib.ExitStack() as stack:
        folder = Path(words[0]).absolute() if words else None
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="txl-cloud-")))
        cloud = stack.enter_context(LocalCloud(folder, isolated=False))
        print("unset AWS_PROFILE AWS_SESSION_TOKEN AWS_SECURITY_TOKEN AWS_REGION")
        for name, value in sorted(cloud.environ.items()):
            if name.startswith(_SHOWN) and value != "":
                print(f"export {name}={shlex.quote(value)}")
        print(_ADVICE, file=sys.stderr, flush=True)
        sys.stdout.flush()
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


_ADVICE = """
The local cloud runs; export the lines above in another terminal, and there, for example:

    python -m launcher --config=quickstart --machines=4 --ssh-cidr 127.0.0.0/8
    python -m launcher ls
    python -m launcher tensorboard

Ctrl-C ends it, with all of its hosts."""


def _check_port() -> None:
    """Whether the hosts' sshd can have port 22 of loopback addresses."""
    try:
        socket.create_server(("127.1.0.4", 22)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(
            "port 22 of 127.1.0.4 is taken: another local cloud runs, or this machine's sshd "
            "listens on all addresses (ListenAddress in sshd_config gives it one)"
        ) from None


if __name__ == "__main__":
    run_command(main)
