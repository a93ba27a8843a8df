"""The user data of a host, read and run as cloud-init does."""

import email
import json
import shlex
import signal
import stat
import subprocess
import time
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from launcher.bootstrap import HostKey, StopRules, user_data
from launcher.on_host import keeper
from tests.launcher.refused import refuse

LIMIT = 16384
"""Bytes of user data that EC2 takes, before base64."""
KEY = HostKey.of(b"a secret", "launch-1")

pytestmark = [pytest.mark.processes, pytest.mark.cloud]


def parts(text: str) -> dict[str, Message]:
    message = email.message_from_string(text)
    assert message.get_content_type() == "multipart/mixed" and not message.defects
    found: Any = message.get_payload()
    return {part.get_content_type(): part for part in found}


def script(text: str) -> str:
    return str(parts(text)["text/x-shellscript-per-boot"].get_payload())


def test_ssh_takes_the_key(tmp_path):
    path = tmp_path / "key"
    path.write_text(KEY.private)
    path.chmod(0o600)
    read = subprocess.run(["ssh-keygen", "-y", "-f", path], capture_output=True, text=True)
    assert read.stdout.split() == KEY.public.split(), read.stderr


def test_a_launch_has_always_the_same_key_and_no_other_has_it():
    assert HostKey.of(b"a secret", "launch-1") == KEY
    others = [HostKey.of(b"a secret", "launch-2"), HostKey.of(b"another", "launch-1")]
    assert len({key.public for key in [KEY, *others]}) == 3
    assert "PRIVATE" in KEY.private and "PRIVATE" not in repr(KEY)


def test_sshd_gets_its_key_before_it_starts():
    config = str(parts(user_data(KEY, "ubuntu", StopRules()))["text/cloud-config"].get_payload())
    first, text = config.split("\n", 1)
    assert first == "#cloud-config"
    assert json.loads(text) == {
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": KEY.private, "ed25519_public": KEY.public},
    }


def test_it_is_small_enough_and_plain():
    text = user_data(KEY, "ubuntu", StopRules())
    assert text.isascii() and len(text) < LIMIT / 2
    assert "a secret" not in text
    assert text == user_data(KEY, "ubuntu", StopRules())


def test_hosts_that_are_kept_have_no_keeper():
    assert parts(user_data(KEY, "ubuntu", None)).keys() == {"text/cloud-config"}


class Machine:
    """What the script finds on a host: tools that record what they are called with."""

    def __init__(self, folder: Path):
        self.home = folder / "home of o'neil"
        self.home.mkdir()
        self.tools = folder / "tools"
        self.tools.mkdir()
        refuse(self.tools)
        self.calls = folder / "calls"
        for name in ("shutdown", "systemctl", "systemd-run"):
            self.tool(name, f'for word; do printf "%s\\0" "$word"; done >>{self.calls}\n')
        self.tool("getent", f'[ "$*" = "passwd $LOGIN" ] && echo "x:x:0:0::{self.home}:/bin/sh"\n')

    def tool(self, name: str, does: str) -> None:
        path = self.tools / name
        path.write_text(f'#!/bin/sh\nprintf "\\n%s\\0" {name} >>{self.calls}\n{does}')
        path.chmod(0o755)

    def boot(self, text: str, login: str) -> list[list[str]]:
        """Runs the script; the calls of the tools."""
        environ = {"PATH": f"{self.tools}:/usr/bin:/bin", "LOGIN": login}
        subprocess.run(["sh", "-c", script(text)], env=environ, cwd=self.tools)
        calls = self.calls.read_text().split("\n")[1:]
        return [call.split("\0")[:-1] for call in calls]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_first_of_all_a_shutdown_is_scheduled(machine):
    calls = machine.boot(user_data(KEY, "ubuntu", StopRules()), "ubuntu")
    assert calls[0] == ["shutdown", "--no-wall", "-h", "+30"]
    rules = StopRules(max_hours=0.1)
    assert ["shutdown", "--no-wall", "-h", "+6"] in machine.boot(
        user_data(KEY, "ubuntu", rules), "ubuntu"
    )


@pytest.mark.parametrize("broken", ["getent", "systemd-run", "mkdir", "cat"])
def test_it_stays_scheduled_if_the_rest_fails(machine, broken):
    machine.tool(broken, "exit 1\n")
    calls = machine.boot(user_data(KEY, "ubuntu", StopRules()), "ubuntu")
    assert calls[0][0] == "shutdown" and calls[-1][0] == broken
    assert not Path("/txl").exists()


def test_upgrades_that_nobody_asked_for_are_switched_off(machine):
    machine.tool("systemctl", f'printf "%s " "$*" >>{machine.calls}; exit 1\n')
    machine.boot(user_data(KEY, "ubuntu", StopRules()), "ubuntu")
    said = machine.calls.read_text()
    for unit in ("apt-daily.timer", "apt-daily-upgrade.timer", "unattended-upgrades.service"):
        assert f"disable --now {unit} " in said


@pytest.mark.parametrize("login", ["ubuntu", "o'neil", "$(touch pwned)", "a; touch pwned"])
def test_the_keeper_is_started_in_the_home_of_the_login(machine, login):
    rules = StopRules(max_hours=3, after_success=1 / 60)
    calls = machine.boot(user_data(KEY, login, rules), login)
    (start,) = (call for call in calls if call[0] == "systemd-run")
    folder = machine.home / "txl"
    assert "Restart=always" in start
    *command, run = start[start.index("RestartSec=10") + 1 :]
    assert run == "/run"
    assert (folder / "keeper.py").read_text() == Path(keeper.__file__).read_text()
    assert (folder / keeper.BOOTED).exists()
    assert not list(machine.tools.glob("pwned"))
    for path, mode in ((folder, 0o700), (folder / "keeper.py", 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path

    trainer = subprocess.Popen(["sleep", "600"])
    (folder / "pid").write_text(f"{trainer.pid}\n")
    (folder / "status").write_text("0")
    (machine.tools / "run").mkdir()  # nothing of this machine's own
    command.append(str(machine.tools / "run"))
    running = subprocess.Popen(command, env={"PATH": f"{machine.tools}:/usr/bin:/bin"})
    end = time.monotonic() + 300
    while "\0+0\0" not in machine.calls.read_text():
        assert running.poll() is None and time.monotonic() < end, shlex.join(command)
        time.sleep(0.05)
    for process in (running, trainer):
        process.send_signal(signal.SIGKILL)
        process.wait()
