"""Programs that would change this machine: stand-ins that refuse, to come first in PATH."""

from pathlib import Path

PROGRAMS = (
    *("apt", "apt-get", "apt-mark", "dpkg", "halt", "init", "kexec", "modprobe", "poweroff"),
    *("reboot", "rmmod", "service", "shutdown", "snap", "sudo", "systemctl", "systemd-run"),
    "telinit",
)


def refuse(tools: Path) -> None:
    """Puts them into a folder, where a test may replace those that it knows."""
    for name in PROGRAMS:
        path = tools / name
        path.write_text(f'#!/bin/sh\necho "{name}: refused on this machine" >&2\nexit 1\n')
        path.chmod(0o755)
