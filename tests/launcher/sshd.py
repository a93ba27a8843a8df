"""Fixtures: hosts that SSH can reach, each a real sshd on an address of its own in 127.0.0.0/8.

A pytest plugin: test modules say `pytest_plugins = ["tests.launcher.sshd"]`.
"""

import dataclasses
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.bootstrap import HostKey
from launcher.remote import Hosts
from launcher.runs import Host, Run
from tests.launcher.refused import refuse

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
NETWORK = "127.21.7"


class Server:
    """A host: its own home and PATH, its own address; the login is that of the tests."""

    def __init__(self, folder: Path, number: int, host_key: HostKey, client_key: Path):
        self.folder, self.number, self.host_key = folder, number, host_key
        self.address = f"{NETWORK}.{number + 4}"
        self.home = folder / "home"
        self.tools = folder / "tools"
        """Comes first in PATH."""
        for path in (self.home, self.tools):
            path.mkdir(parents=True)
        refuse(self.tools)
        self.tmux = Path(tempfile.mkdtemp(prefix="tmux-"))  # its socket's path has to be short
        key = folder / "host_key"
        key.write_text(host_key.private)
        key.chmod(0o600)
        environ = {
            "HOME": self.home,
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "TMUX_TMPDIR": self.tmux,
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        }
        settings = f"""
            ListenAddress {self.address}:22
            HostKey {key}
            PidFile none
            AuthorizedKeysFile {client_key.with_suffix(".pub")}
            StrictModes no
            UsePAM no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PermitRootLogin yes
            LogLevel VERBOSE
            MaxStartups 100
            Subsystem sftp internal-sftp -d {self.home}
            SetEnv {" ".join(f'"{name}={value}"' for name, value in environ.items())}
            """
        (folder / "sshd_config").write_text(settings)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert SSHD
        with (self.folder / "log").open("ab") as log:
            words = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=log)
        end = time.monotonic() + 300
        while self.process.poll() is None and time.monotonic() < end:
            with socket.socket() as trial:
                if trial.connect_ex((self.address, 22)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError(self.log())

    def stop(self) -> None:
        """Ends sshd and, with it, the connections that it holds."""
        if self.process:
            children = subprocess.run(
                ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True
            )
            self.process.kill()
            self.process.wait()
            for pid in children.stdout.split():
                subprocess.run(["kill", pid], stderr=subprocess.DEVNULL)
            self.process = None

    def remove(self) -> None:
        """Ends what may go on in tmux."""
        self.stop()
        # Named: $TMUX of whoever runs the tests in tmux goes before TMUX_TMPDIR.
        words = ["tmux", "-S", str(self.tmux / f"tmux-{os.getuid()}" / "default"), "kill-server"]
        environ = {name: value for name, value in os.environ.items() if name != "TMUX"}
        subprocess.run(words, env=environ, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.tmux)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def tool(self, name: str, does: str) -> None:
        """A program of this host, a shell script."""
        path = self.tools / name
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)


class Machines:
    """Some hosts that are one run's."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.key = folder / "client_key"
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)]
        subprocess.run(command, check=True)
        self.host_key = HostKey.of(b"secret of the tests", "launch")
        self.servers: list[Server] = []
        self.free_address = f"{NETWORK}.2"
        """Where nothing listens."""

    def add(self, number: int) -> list[Server]:
        """Starts more hosts."""
        first = len(self.servers)
        for index in range(first, first + number):
            folder = self.folder / f"host-{index}"
            self.servers.append(Server(folder, index, self.host_key, self.key))
            self.servers[-1].start()
        return self.servers[first:]

    def run(self, **changes: Any) -> Run:
        """The run as its tags tell of it; `changes` are fields of all its hosts."""
        now = datetime.now(UTC)
        hosts = (
            Host(
                index=server.number,
                instance_id=f"i-{server.number}",
                private_ip=server.address,
                public_ip="",
                state="running",
                zone="us-east-1a",
                kind="p3dn.24xlarge",
                spot=True,
                price=None,
                launched=now,
                ended=None,
                host_key=self.host_key.public,
                user=getpass.getuser(),
                key_name="",
                reason="",
                reason_code="",
                hours_before=0.0,
            )
            for server in self.servers
        )
        hosts = tuple(dataclasses.replace(host, **changes) for host in hosts)
        return Run("night", "", "", "launch", "", now, hosts)

    def hosts(self, **changes: Any) -> Hosts:
        return Hosts.of(self.run(**changes), self.key, private=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[int], Machines]]:
    """Starts so many hosts."""
    if SSHD is None or not all(map(shutil.which, ("tmux", "curl"))):
        pytest.skip("a program is not installed: apt-get install openssh-server tmux curl")
    with socket.socket() as trial:
        try:
            trial.bind((f"{NETWORK}.1", 22))
        except PermissionError:
            pytest.skip("only root may listen at port 22, which hosts of a run have")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    found: list[Machines] = []

    def start(number: int) -> Machines:
        found.append(Machines(tmp_path))
        found[-1].add(number)
        return found[-1]

    yield start
    for some in found:
        for server in some.servers:
            server.remove()
