"""One host of the local cloud: a process tree that takes itself for a machine.

    python -I -S host.py SPEC

SPEC is the JSON file of a `machines.Spec`. The host has its own processes, mounts and name. It sees
the file system of this machine, but what it writes stays in memory and ends with it, apart from
the login's home and /var/log, which lie beside SPEC, and the folder that all hosts share; a stopped
host's other changes are kept too, beside SPEC. Programs that would change a machine are stand-ins
(stand_ins.py). Standard input brings commands; when it closes, or the process that started this one
ends, everything here is killed.

Standard library only, so that a host starts in a fraction of a second.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import linux
from inside import CONTROL, LOGIN, POWERED_OFF, STARTED, TOOLS, UNITS

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STAND_INS = [
    *("apt", "apt-get", "apt-mark", "cloud-init", "curl", "halt", "id", "modprobe", "nvidia-smi"),
    *("poweroff", "python3", "reboot", "service", "sha256sum", "shutdown", "snap", "sudo"),
    *("systemctl", "systemd-run", "update-initramfs", "wget"),
]
_DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
_LATER = {"nvidia-smi"}
"""Stand-ins that are there only once something installed them."""


class Init:
    """Process 1: starts what a machine starts, waits for who ended, and turns itself off."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.sshd: int | None = None
        self.services: dict[str, int] = {}
        self.restarted: dict[str, list[str]] = {}
        """Commands of services that are started again when they end."""
        self.off_at: float | None = None
        self.off_status = POWERED_OFF
        Path(UNITS).mkdir()
        os.mkfifo(CONTROL)
        self.control = os.open(CONTROL, os.O_RDWR)
        self.pending = b""

    def start(self) -> None:
        """As cloud-init's stages follow one another."""
        data = self.spec["user_data"]
        for script in data["every_boot_early"]:
            subprocess.run(self._script("boothook", script), **self._output())
        if self.spec["boot"] == 0:
            for entry in data["files"]:
                path = Path(entry["path"])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(entry["content"])
                path.chmod(int(entry["permissions"], 8))
            self._write_host_key(data["ssh_keys"])
        if self.spec["ssh"] == "up":
            self.start_sshd()
        if not os.fork():
            scripts = data["every_boot"] + (data["first_boot"] if self.spec["boot"] == 0 else [])
            for number, script in enumerate(scripts):
                subprocess.run(self._script(f"part-{number}", script), **self._output())
            Path(STARTED).parent.mkdir(exist_ok=True)
            Path(STARTED).write_text("{}")
            os._exit(0)

    def run(self) -> int:
        """Until the host is off; its exit status."""
        while self.off_at is None or time.time() < self.off_at:
            wait = 0.2 if self.off_at is None else max(0.0, min(0.2, self.off_at - time.time()))
            ready, _, _ = select.select([sys.stdin, self.control], [], [], wait)
            if sys.stdin in ready:
                self._obey(os.read(sys.stdin.fileno(), 4096) or self._kill())
            if self.control in ready:
                self._obey(os.read(self.control, 65536))
            self._reap()
        self._end_processes()
        return self.off_status

    def start_sshd(self) -> None:
        if self.sshd is None:
            self.sshd = self._spawn(["/usr/sbin/sshd", "-D", "-e"], "sshd.log")

    def stop_sshd(self) -> None:
        if self.sshd is not None:
            os.kill(self.sshd, signal.SIGTERM)

    def start_service(self, name: str, command: list[str], restart: bool) -> None:
        if name in self.services:
            return
        self.services[name] = self._spawn(command, f"{name}.log")
        Path(UNITS, name).touch()
        if restart:
            self.restarted[name] = command

    def _obey(self, text: bytes) -> None:
        *lines, self.pending = (self.pending + text).split(b"\n")
        for line in lines:
            with contextlib.suppress(OSError, KeyError):
                self._do(*json.loads(line))

    def _do(self, verb: str, *words: str) -> None:
        if verb == "off":
            seconds, status = words
            self.off_at, self.off_status = time.time() + float(seconds), int(status)
        elif verb == "stay":
            self.off_at = None
        elif verb == "pass" and self.off_at is not None:
            self.off_at -= float(words[0])
        elif verb == "ssh":
            self.start_sshd() if words == ("up",) else self.stop_sshd()
        elif verb == "restart-ssh":
            self.stop_sshd()
            while self.sshd is not None:
                self._reap()
            self.start_sshd()
        elif verb == "service":
            name, restart, *command = words
            self.start_service(name, command, restart == "True")
        elif verb == "stop":
            self.restarted.pop(words[0], None)
            os.kill(self.services.pop(words[0]), signal.SIGTERM)
            Path(UNITS, words[0]).unlink(missing_ok=True)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self.sshd = None if pid == self.sshd else self.sshd
                for name in [name for name, service in self.services.items() if service == pid]:
                    del self.services[name]
                    Path(UNITS, name).unlink(missing_ok=True)
                    if name in self.restarted:
                        self.start_service(name, self.restarted[name], restart=True)

    def _end_processes(self) -> None:
        """Asks all processes to end, and gives them a moment."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(-1, signal.SIGTERM)
            os.kill(-1, signal.SIGCONT)
            until = time.time() + self.spec["grace"]
            while time.time() < until:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.02)

    def _kill(self) -> NoReturn:
        os._exit(1)  # the kernel kills all processes of this namespace

    def _write_host_key(self, keys: dict[str, str]) -> None:
        path = Path("/etc/ssh/ssh_host_ed25519_key")
        if self.spec["wrong_key"] or "ed25519_private" not in keys:
            words = ["/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
            subprocess.run(words, check=True)
        else:
            path.write_text(keys["ed25519_private"])
            path.with_suffix(".pub").write_text(keys["ed25519_public"])
        path.chmod(0o600)

    def _script(self, name: str, text: str) -> list[str]:
        path = Path("/var/lib/cloud/instance/scripts") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o700)
        return [str(path)]

    def _output(self) -> dict[str, Any]:
        log = open("/var/log/cloud-init-output.log", "ab")  # noqa: SIM115
        root = {"HOME": "/root", "USER": "root", "INSTANCE_ID": self.spec["id"]}
        return {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": log,
            "env": os.environ | root,
            "cwd": "/",
        }

    def _spawn(self, command: list[str], log: str) -> int:
        with open(f"/var/log/{log}", "ab") as output, open(os.devnull, "rb") as nothing:
            return subprocess.Popen(
                command,
                stdin=nothing,
                stdout=output,
                stderr=output,
                env=os.environ | {"HOME": "/root"},
                cwd="/",
                start_new_session=True,
            ).pid


def main(path: Path) -> int:
    """Starts the host and waits for its end."""
    spec = json.loads(path.read_text())
    linux.die_with_parent(spec["parent"])
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC)
    child = os.fork()
    if child:
        os.close(0)
        # A power failure: the kernel kills what else is in the namespace.
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        return max(-1, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    linux.die_with_parent(0)  # a parent outside of the namespace has no number in it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = _enter_machine(spec, path.parent)
    init = Init(spec)
    init.start()
    status = init.run()
    if not spec["spot"]:
        _keep(*kept)
    os._exit(status)


def _enter_machine(spec: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Makes the host's file system the root; descriptors of its changes and where to keep them."""
    linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    base = folder / "machine"
    base.mkdir(exist_ok=True)
    linux.mount("machine", str(base), "tmpfs", options="mode=755")
    upper, work, root = base / "upper", base / "work", base / "root"
    root.mkdir()
    work.mkdir()
    shutil.rmtree(upper, ignore_errors=True)
    subprocess.run(["/bin/cp", "-a", str(disk), str(upper)], check=True)
    os.chmod(upper, 0o755)
    linux.mount(
        "machine", str(root), "overlay", options=f"lowerdir=/,upperdir={upper},workdir={work}"
    )
    kept = os.open(upper, os.O_DIRECTORY), os.open(disk, os.O_DIRECTORY)
    _mount_rest(root)
    _make_devices(root / "dev")
    linux.mount("proc", f"{root}/proc", "proc")
    for path in (root / "proc/sys", root / "proc/sysrq-trigger"):
        if path.exists():  # a kernel may have no keys for emergencies
            linux.show(str(path), str(path), read_only=True)
    linux.mount("tmpfs", f"{root}/run", "tmpfs", options="mode=755")
    home = Path("home") / spec["user"]
    for inside, beside in ((home, "home"), (Path("var/log"), "log")):
        (folder / beside).mkdir(exist_ok=True)
        (root / inside).mkdir(parents=True, exist_ok=True)
        linux.mount(str(folder / beside), str(root / inside), flags=linux.MS_BIND)
    shared = root / spec["shared"].lstrip("/")
    shared.mkdir(parents=True, exist_ok=True)
    linux.mount(spec["shared"], str(shared), flags=linux.MS_BIND)
    (root / "run/sshd").mkdir(mode=0o755)
    (root / "run/lock").mkdir(mode=0o755)
    if spec["boot"] == 0:
        _install(spec, root)
    tools = root / TOOLS.lstrip("/")
    (tools / "spec.json").write_text(json.dumps(spec))
    _write_sshd_config(spec, root)
    linux.give_up_machine()
    os.chroot(root)
    os.chdir("/")
    socket.sethostname(spec["hostname"])
    os.environ.clear()
    os.environ.update(spec["environ"] | {"PATH": PATH, "LANG": "C.UTF-8"})
    return kept


def _mount_rest(root: Path) -> None:
    """Shows the other file systems of this machine, none of which can be written to."""
    own = ("/proc", "/sys", "/dev", "/run", str(root.parent))
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in points:
        target = f"{root}{point}"
        if point == "/" or point.startswith(own) or not os.path.exists(target):
            continue
        with contextlib.suppress(OSError):
            linux.show(point, target, read_only=True)


def _make_devices(folder: Path) -> None:
    """A /dev of terminals, memory and what holds no state; none of this machine's other devices."""
    linux.mount("tmpfs", str(folder), "tmpfs", options="mode=755")
    for name in _DEVICES:
        (folder / name).touch()
        linux.show(f"/dev/{name}", str(folder / name))
    for name in ("pts", "shm"):
        (folder / name).mkdir()
    linux.mount("devpts", str(folder / "pts"), "devpts", options="newinstance,ptmxmode=0666")
    linux.mount("tmpfs", str(folder / "shm"), "tmpfs", options="mode=1777")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (folder / name).symlink_to(f"/proc/self/fd/{number}")
    (folder / "fd").symlink_to("/proc/self/fd")
    (folder / "ptmx").symlink_to("pts/ptmx")


def _install(spec: dict[str, Any], root: Path) -> None:
    """The login, its key, and the stand-ins."""
    user, home = spec["user"], root / "home" / spec["user"]
    with open(root / "etc/passwd", "a") as passwd:
        passwd.write(f"{user}:x:0:0:{user}:/home/{user}:/bin/bash\n")
    with open(root / "etc/shadow", "a") as shadow:
        shadow.write(f"{user}:*:19000:0:99999:7:::\n")
    (root / "etc/hostname").write_text(spec["hostname"] + "\n")
    with open(root / "etc/hosts", "a") as hosts:
        hosts.write(f"{spec['addresses'][0]} {spec['hostname']}\n")
    ssh = home / ".ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    (ssh / "authorized_keys").write_text(spec["authorized_key"] + "\n")
    (ssh / "authorized_keys").chmod(0o600)
    home.chmod(0o755)
    for name in ("root/.aws", "root/.ssh"):
        if (root / name).exists():
            shutil.rmtree(root / name, ignore_errors=True)
    for path in (root / "etc/ssh").glob("ssh_host_*"):
        path.unlink()
    for path in (root / "tmp").glob("tmux-*"):
        shutil.rmtree(path, ignore_errors=True)
    tools = root / TOOLS.lstrip("/")
    tools.mkdir(parents=True)
    here = Path(__file__).resolve().parent
    for name in ("stand_ins.py", "inside.py"):
        shutil.copy(here / name, tools / name)
    for name in STAND_INS:
        wrapper = f'#!/bin/sh\nexec {sys.executable} -I -S {TOOLS}/stand_ins.py {name} "$@"\n'
        (tools / name).write_text(wrapper)
        (tools / name).chmod(0o755)
        found = [root / place[1:] / name for place in PATH.split(":") if place.startswith("/usr")]
        for path in found:
            if path.exists() or path.is_symlink():
                path.unlink()
        if name not in _LATER or (spec["gpus"] and spec["driver"]):
            shutil.copy(tools / name, root / "usr/bin" / name)
            if name in ("shutdown", "poweroff", "halt", "reboot"):
                shutil.copy(tools / name, root / "usr/sbin" / name)


def _write_sshd_config(spec: dict[str, Any], root: Path) -> None:
    environ = spec["environ"] | {"PATH": PATH, LOGIN: "1"}
    quoted = " ".join(f'"{name}={value}"' for name, value in environ.items())
    listen = "\n".join(f"ListenAddress {address}:22" for address in spec["addresses"])
    (root / "etc/ssh/sshd_config").write_text(
        f"{listen}\nHostKey /etc/ssh/ssh_host_ed25519_key\nPermitRootLogin prohibit-password\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
        f"AllowUsers {spec['user']}\nPrintMotd no\nMaxStartups 100\nUseDNS no\n"
        f"SetEnv {quoted}\nSubsystem sftp internal-sftp\n"
    )


def _keep(changes: int, disk: int) -> None:
    """Copies the changes out of memory, for the next start of a stopped host."""
    words = ["/bin/cp", "-a", f"/proc/self/fd/{changes}/.", f"/proc/self/fd/{disk}/"]
    subprocess.run(words, pass_fds=(changes, disk), check=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
