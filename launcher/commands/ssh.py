"""Logs in to a host of a run, in the terminal where it trains.

The terminal is a tmux session: Ctrl-B D leaves it, and training goes on. Without one, a shell.
"""

import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launcher import lookup, reach
from launcher.aws import Account
from launcher.names import printable
from launcher.options import OnHosts, RunName
from launcher.runs import Host, Run
from txl_jax.errors import UserError

# The session's name is that of on_host/start.sh.
_ATTACH = 'tmux attach -t =txl 2>/dev/null || exec "${SHELL:-/bin/bash}" -l'

_BRING_MOSH = (
    "command -v mosh-server >/dev/null || { sudo -n apt-get -q update && "
    "sudo -n apt-get -qy -o DPkg::Lock::Timeout=120 install mosh; }"
)


@dataclass(frozen=True, kw_only=True)
class Options(OnHosts):
    """Options of the command."""

    name: RunName
    """Run whose host it is."""
    host: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="I")] = 0
    """Number of the host."""
    mosh: bool = False
    """By mosh, which lives through a bad network and a closed laptop."""


def main(options: Options) -> int:
    """Exit status of ssh or mosh. Raises UserError without such a host or program."""
    program = "mosh" if options.mosh else "ssh"
    if not shutil.which(program):
        raise UserError(f"{program} is not installed on this machine")
    account = Account.open(options.region)
    run = lookup.running(account, options.name)
    host = _numbered(run, options.host)
    if not host.host_key:
        raise UserError(f"host {host.index} of {run.name} has no SSH key in its tags")
    private = run.private(options.private_ip)
    key = reach.prepared(account, run, private)
    if options.mosh:
        reach.admit_mosh(account, run, private)
    address = run.address(host, private)
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        known = Path(folder, "known_hosts")
        known.write_text(f"{address} {host.host_key}\n")
        ssh = ["ssh", *_settings(key, known)]
        who = f"{host.user}@{address}"
        if options.mosh:
            _bring_mosh([*ssh, who])
            words = ["mosh", f"--ssh={shlex.join(ssh)}", who, "--", "sh", "-c", _ATTACH]
        else:
            words = [*ssh, "-t", who, _ATTACH]
        return subprocess.run(words).returncode


def _bring_mosh(ssh: list[str]) -> None:
    """Installs what mosh needs on the host, if it is not there; no image has it.

    Raises UserError, with the last line of what was said, if it cannot be.
    """
    done = subprocess.run([*ssh, _BRING_MOSH], stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        said = (done.stdout + done.stderr).decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it says nothing")
        raise UserError(
            f"the host has no mosh, and it cannot be installed ({printable(last)}): log in "
            "without --mosh"
        )


def _settings(key: Path, known_hosts: Path) -> list[str]:
    """Only this key, only this host's key, and nothing of the user's own settings."""
    settings = [
        "IdentitiesOnly=yes",
        "StrictHostKeyChecking=yes",
        f'UserKnownHostsFile="{known_hosts}"',
        "GlobalKnownHostsFile=/dev/null",
        "UpdateHostKeys=no",
        "ForwardAgent=no",
        "ServerAliveInterval=15",
        "LogLevel=ERROR",
    ]
    options = [word for setting in settings for word in ("-o", setting)]
    return ["-F", "/dev/null", "-i", str(key), *options]


def _numbered(run: Run, number: int) -> Host:
    for host in run.hosts:
        if host.index == number:
            return host
    known = ", ".join(str(host.index) for host in run.hosts)
    raise UserError(f"no host {number} of {run.name} is running; there are {known}")
