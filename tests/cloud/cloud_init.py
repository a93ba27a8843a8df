"""What cloud-init makes of user data, as far as the local cloud's hosts do it."""

import base64
import email
import gzip
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass
class UserData:
    """The parts of user data, in the order in which cloud-init uses them."""

    every_boot_early: list[str] = field(default_factory=list)
    """Scripts that run at every start of the host, before sshd."""
    files: list[dict[str, str]] = field(default_factory=list)
    """path, content, permissions; written at the first start."""
    ssh_keys: dict[str, str] = field(default_factory=dict)
    """ed25519_private, ed25519_public."""
    every_boot: list[str] = field(default_factory=list)
    """Scripts that run at every start, after sshd."""
    first_boot: list[str] = field(default_factory=list)
    """Scripts that run at the first start only, after sshd."""


def parse(data: bytes) -> UserData:
    """Raises ValueError for anything that the hosts here would not do."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    parsed = UserData()
    if not data:
        return parsed
    if data.startswith(b"#"):
        _part(parsed, _kind(data.decode()), data.decode())
        return parsed
    for part in email.message_from_bytes(data).walk():
        if not part.is_multipart():
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            _part(parsed, part.get_content_type(), content.decode())
    return parsed


def _kind(text: str) -> str:
    begins = {
        "#cloud-config": "text/cloud-config",
        "#cloud-boothook": "text/cloud-boothook",
        "#!": "text/x-shellscript",
    }
    return next((kind for begin, kind in begins.items() if text.startswith(begin)), text[:20])


def _part(parsed: UserData, kind: str, text: str) -> None:
    if kind == "text/cloud-config":
        _config(parsed, yaml.safe_load(text) or {})
    elif kind == "text/cloud-boothook":
        parsed.every_boot_early.append(text.removeprefix("#cloud-boothook\n"))
    elif kind == "text/x-shellscript":
        parsed.first_boot.append(text)
    elif kind == "text/x-shellscript-per-boot":
        parsed.every_boot.append(text)
    else:
        raise ValueError(f"user data of kind {kind}")


def _config(parsed: UserData, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key == "ssh_keys":
            parsed.ssh_keys = value
        elif key == "write_files":
            parsed.files += map(_file, value)
        elif key == "bootcmd":
            parsed.every_boot_early.append(_commands(value))
        elif key == "runcmd":
            parsed.first_boot.append(_commands(value))
        elif key not in ("ssh_deletekeys", "ssh_genkeytypes", "output", "package_update"):
            raise ValueError(f"cloud-config with {key}")


def _file(entry: dict[str, Any]) -> dict[str, str]:
    content, encoding = entry.get("content", ""), entry.get("encoding", "")
    if encoding in ("b64", "base64"):
        content = base64.b64decode(content).decode()
    elif encoding in ("gz+b64", "gzip+base64"):
        content = gzip.decompress(base64.b64decode(content)).decode()
    elif encoding:
        raise ValueError(f"write_files with encoding {encoding}")
    return {
        "path": entry["path"],
        "content": content,
        "permissions": str(entry.get("permissions", "0644")),
    }


def _commands(commands: list[str | list[str]]) -> str:
    """A script of commands; a list is one command's words, quoted as cloud-init does."""
    lines = [
        line if isinstance(line, str) else " ".join(_quoted(word) for word in line)
        for line in commands
    ]
    return "\n".join(["#!/bin/sh", *lines, ""])


def _quoted(word: str) -> str:
    return "'" + str(word).replace("'", "'\\''") + "'"
