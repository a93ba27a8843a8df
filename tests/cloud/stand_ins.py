"""Programs of a host that would change a machine or reach the network: they only write down.

    stand_ins.py NAME WORDS…

Each call is a line of JSON in /var/log/stand-ins.jsonl. Runs inside a host (host.py).
"""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from inside import CONTROL, LOGIN, POWERED_OFF, REBOOT, RECORD, STARTED, TOOLS, UNITS

DRIVER = "580.95.05"
EFA_INSTALLER = "https://efa-installer.amazonaws.com/aws-efa-installer-1.47.0.tar.gz"
_FOR_ROOT = [
    *("apt", "apt-get", "apt-mark", "halt", "modprobe", "poweroff", "reboot", "service"),
    *("shutdown", "snap", "update-initramfs"),
]


def main(name: str, words: list[str]) -> int:
    spec = json.loads(Path(TOOLS, "spec.json").read_text())
    call = {"time": time.time(), "name": name, "words": words, "login": LOGIN in os.environ}
    with open(RECORD, "a") as record:
        record.write(json.dumps(call) + "\n")
    if name in spec["broken"]:
        return _fail(spec["broken"][name])
    if name in _FOR_ROOT and LOGIN in os.environ:
        return _fail(f"{name}: Permission denied, are you root?", 100)
    act = globals().get(f"_{name.replace('-', '_')}")
    return act(spec, words) or 0 if act else 0


def _tell(*words: object) -> None:
    """Hands a command to process 1."""
    with open(CONTROL, "w") as control:
        control.write(json.dumps([str(word) for word in words]) + "\n")


def _shutdown(_spec: dict[str, Any], words: list[str]) -> None:
    """`shutdown [-hPrc] [+MINUTES|now] [MESSAGE]`."""
    options = {word for word in words if word.startswith("-")}
    if "-c" in options:
        return _tell("stay")
    when = next((word for word in words if not word.startswith("-")), "+1")
    minutes = 0.0 if when == "now" else float(when.lstrip("+"))
    _tell("off", 60 * minutes, REBOOT if "-r" in options else POWERED_OFF)


def _poweroff(_spec: dict[str, Any], _words: list[str]) -> None:
    _tell("off", 0, POWERED_OFF)


_halt = _poweroff


def _reboot(_spec: dict[str, Any], _words: list[str]) -> None:
    _tell("off", 0, REBOOT)


def _systemctl(spec: dict[str, Any], words: list[str]) -> int | None:
    verb, *units = [word for word in words if not word.startswith("-")] or [""]
    if verb in ("poweroff", "reboot", "halt"):
        return (_reboot if verb == "reboot" else _poweroff)(spec, units)
    if verb == "is-active":
        return 0 if all(Path(UNITS, unit).exists() for unit in units) else 3
    if LOGIN in os.environ:
        return _fail("Interactive authentication required.")
    if verb in ("stop", "restart"):
        for unit in units:
            _tell("restart-ssh" if unit in ("ssh", "sshd") else "stop", unit)
    return 0


def _systemd_run(_spec: dict[str, Any], words: list[str]) -> int:
    """`systemd-run [OPTIONS] --unit=NAME [-p SETTING]… COMMAND WORDS…`"""
    if LOGIN in os.environ:
        return _fail("Interactive authentication required.")
    name, restart = "unnamed", False
    while words[0].startswith("-"):
        word = words.pop(0)
        setting = words.pop(0) if word == "-p" else word
        if setting.startswith("--unit="):
            name = setting.removeprefix("--unit=")
        restart = restart or setting == "Restart=always"
    _tell("service", name, restart, *words)
    while not Path(UNITS, name).exists():
        time.sleep(0.01)
    return 0


def _cloud_init(_spec: dict[str, Any], words: list[str]) -> int:
    """`cloud-init status --wait`"""
    while "--wait" in words and not Path(STARTED).exists():
        time.sleep(0.05)
    print("status: done" if Path(STARTED).exists() else "status: running")
    return 0


def _sudo(spec: dict[str, Any], words: list[str]) -> NoReturn:
    user, keep = "root", False
    environ = dict(os.environ)
    while words and (words[0].startswith("-") or re.match(r"\w+=", words[0])):
        word = words.pop(0)
        if word == "--":
            break
        if word == "-u":
            user = words.pop(0)
        elif not word.startswith("-"):
            name, _, value = word.partition("=")
            environ[name] = value
        keep = keep or word == "-E"
    environ["USER"] = environ["LOGNAME"] = user
    if user == "root":
        environ.pop(LOGIN, None)
        if not keep:
            environ["HOME"] = "/root"
    else:
        environ |= {LOGIN: "1", "HOME": f"/home/{spec['user']}"}
    os.execvpe(words[0], words, environ)


def _apt_get(spec: dict[str, Any], words: list[str]) -> int:
    driver = any(re.match(r"nvidia-(driver|headless|utils|open)", word) for word in words)
    if "install" in words and driver and spec["gpus"]:
        shutil.copy(f"{TOOLS}/nvidia-smi", "/usr/bin/nvidia-smi")
    return 0


_apt = _apt_get


def _nvidia_smi(spec: dict[str, Any], words: list[str]) -> int:
    memory = {"V100": (32768, 7.0), "A100": (40960, 8.0), "H100": (81559, 9.0)}
    mebibytes, capability = memory.get(spec["gpu"], (24576, 8.6))
    query = next((word for word in words if word.startswith("--query-gpu=")), "")
    for index in range(spec["gpus"]):
        values = {
            "index": str(index),
            "name": f"NVIDIA {spec['gpu']}",
            "uuid": f"GPU-{index:08d}",
            "driver_version": DRIVER,
            "compute_cap": str(capability),
            "memory.total": f"{mebibytes} MiB",
        }
        if query:
            print(", ".join(values[field] for field in query.partition("=")[2].split(",")))
        else:
            print(f"GPU {index}: {values['name']} (UUID: {values['uuid']})")
    return 0


def _curl(_spec: dict[str, Any], words: list[str]) -> int:
    """Fetches from the local cloud only; of other places, knows the installer of EFA."""
    urls = [word for word in words if "://" in word]
    if "-" in words:
        urls += re.findall(r'^url = "(.*)"$', sys.stdin.read(), re.MULTILINE)
    if urls == [EFA_INSTALLER]:
        content = _efa_installer()
    elif urls and urlsplit(urls[0]).hostname == "127.0.0.1":
        with urllib.request.urlopen(urls[0]) as answer:
            content = answer.read()
    else:
        return _fail("curl: (6) Could not resolve host", 6)
    if "-o" in words:
        Path(words[words.index("-o") + 1]).write_bytes(content)
    else:
        sys.stdout.buffer.write(content)
    return 0


def _efa_installer() -> bytes:
    """What it leaves is what others look for."""
    plugin, program = "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu", "/opt/amazon/efa/bin"
    lines = ["#!/bin/sh", f"mkdir -p {program} {plugin}", f"touch {plugin}/libnccl-net.so"]
    lines.append(f"cp /bin/true {program}/fi_info")
    script = "\n".join([*lines, ""]).encode()
    entry = tarfile.TarInfo("aws-efa-installer/efa_installer.sh")
    entry.mode, entry.size = 0o755, len(script)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(entry, io.BytesIO(script))
    return gzip.compress(packed.getvalue(), mtime=0)


def _sha256sum(_spec: dict[str, Any], words: list[str]) -> int:
    """As the real one, but takes the installer of EFA that is here for AWS' own."""
    if "--check" in words:
        for line in sys.stdin.read().splitlines():
            expected, name = line.split("  ", 1)
            content = Path(name).read_bytes()
            if hashlib.sha256(content).hexdigest() != expected and content != _efa_installer():
                return 1
        return 0
    for name in [word for word in words if not word.startswith("-")] or ["-"]:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        print(f"{hashlib.sha256(content).hexdigest()}  {name}")
    return 0


def _wget(_spec: dict[str, Any], _words: list[str]) -> int:
    return _fail("wget: unable to resolve host address", 4)


def _id(_spec: dict[str, Any], words: list[str]) -> int:
    """Who logged in is not root, though the files are root's."""
    name, number = ("ubuntu", 1000) if LOGIN in os.environ else ("root", 0)
    print({"-u": str(number), "-un": name}.get("".join(words), f"uid={number}({name})"))
    return 0


def _python3(spec: dict[str, Any], words: list[str]) -> int:
    """The Python of the tests; instead of installing anything, it makes that environment seen."""
    if words[:2] == ["-m", "ensurepip"]:
        return 0
    if words and words[0].endswith("/install.py"):
        return _make_environment(spec, Path(words[1]))
    python = os.path.realpath(sys.executable)
    os.execv(python, [python, *words])


def _make_environment(spec: dict[str, Any], folder: Path) -> int:
    """A virtual environment that shows the packages of the tests' own.

    Where JAX is to use GPUs it gets as many devices of the CPU.
    """
    python = Path(os.path.realpath(sys.executable))
    own = Path(sys.executable).parent.parent
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("python", "python3"):
        (folder / "bin" / name).unlink(missing_ok=True)
        (folder / "bin" / name).symlink_to(python)
    (folder / "pyvenv.cfg").write_text(f"home = {python.parent}\n")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True, exist_ok=True)
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(spec["gpus"])}
    seen = "'cuda' in os.environ.get('JAX_PLATFORMS', '')"
    (packages / "local_cloud.pth").write_text(
        f"{own}/lib/{version}/site-packages\nimport os; {seen} and os.environ.update({devices})\n"
    )
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
