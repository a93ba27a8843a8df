"""The user data of a host: what cloud-init does at its start, before anybody can log in.

Two parts in MIME. Cloud-config gives sshd its key, so that the first connection is verified
already. A script, at every start of the host, schedules a shutdown before anything else, starts the
keeper, which postpones it while there is progress (`on_host/keeper.py`), and switches off upgrades
that nobody asked for: they take the driver from a trainer, and the lock of apt-get from its set-up.

Whoever can run a program on the host can read its user data: the host's own key is the only secret
in it.
"""

import base64
import dataclasses
import hashlib
import hmac
import json
import math
import shlex
import struct
import textwrap
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from launcher.on_host import keeper
from launcher.on_host.keeper import StopRules

_KEEPER_ENDS = "end of the keeper"
_BOUNDARY = "part of the user data"
_UPGRADES = "apt-daily.timer apt-daily-upgrade.timer unattended-upgrades.service"
_KEY_TYPE = b"ssh-ed25519"


@dataclass(frozen=True)
class HostKey:
    """The key pair by which the hosts of a launch are known, in OpenSSH's formats."""

    private: str = dataclasses.field(repr=False)
    public: str
    """As in a known_hosts file, without the host: `ssh-ed25519 AAAA…`."""

    @staticmethod
    def of(secret: bytes, launch: str) -> "HostKey":
        """The key pair of a launch, always the same one.

        EC2 takes a repeated request for the same hosts only if the user data is the same too, and
        nothing secret is written down that could be read again. So the key comes from the launch id
        and a secret that the launcher has anyway: the private half of the caller's key pair.
        """
        seed = hmac.digest(secret, b"txl host key " + launch.encode(), hashlib.sha256)
        key = Ed25519PrivateKey.from_private_bytes(seed)
        raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        public = _string(_KEY_TYPE) + _string(raw)
        public_text = f"{_KEY_TYPE.decode()} {base64.b64encode(public).decode()}"
        return HostKey(_private_key_file(seed, raw), public_text)


def user_data(host_key: HostKey, user: str, stop: StopRules | None) -> str:
    """The user data of hosts that stop by the rules; None: they do not stop by themselves.

    `user`: login name, in whose home the keeper finds what it goes by.
    """
    config = {
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": host_key.private, "ed25519_public": host_key.public},
    }
    # JSON is YAML.
    parts = [_part("cloud-config", "keys.yaml", "#cloud-config\n" + json.dumps(config))]
    if stop:
        parts.append(_part("x-shellscript-per-boot", "txl-keeper.sh", _script(user, stop)))
    head = f'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="{_BOUNDARY}"\n\n'
    return head + "".join(parts) + f"--{_BOUNDARY}--\n"


def _part(kind: str, name: str, content: str) -> str:
    return (
        f"--{_BOUNDARY}\n"
        f'Content-Type: text/{kind}; charset="utf-8"\n'
        f'Content-Disposition: attachment; filename="{name}"\n\n'
        f"{content}\n"
    )


def _script(user: str, stop: StopRules) -> str:
    first = math.ceil(min(stop.setup_minutes, 60 * stop.max_hours))
    rules = shlex.quote(json.dumps(dataclasses.asdict(stop)))
    return textwrap.dedent(f"""\
        #!/bin/sh
        shutdown --no-wall -h +{first}
        set -e
        home=$(getent passwd {shlex.quote(user)} | cut -d : -f 6)
        [ -d "$home" ]
        owner=$(stat -c %u:%g "$home")
        umask 077
        mkdir -p "$home/txl"
        chown "$owner" "$home/txl"
        touch "$home/txl/{keeper.BOOTED}"
        cat >"$home/txl/keeper.py" <<'{_KEEPER_ENDS}'
        {{keeper}}
        {_KEEPER_ENDS}
        systemd-run --quiet --collect --unit={keeper.UNIT} -p Restart=always -p RestartSec=10 \\
            "$(command -v python3)" "$home/txl/keeper.py" {rules} "$home/txl" /run
        for unit in {_UPGRADES}; do
            systemctl disable --now "$unit" || true
        done
        """).replace("{keeper}\n", Path(keeper.__file__).read_text())


def _private_key_file(seed: bytes, raw: bytes) -> str:
    """A private key as ssh-keygen writes it without a passphrase, the same bytes every time.

    The format is OpenSSH's PROTOCOL.key. The number that is there twice, to tell a wrong passphrase
    from a right one, is random elsewhere.
    """
    check = hashlib.sha256(raw).digest()[:4]
    secret = check + check + _string(_KEY_TYPE) + _string(raw) + _string(seed + raw) + _string(b"")
    secret += bytes(range(1, 1 + -len(secret) % 8))
    content = b"openssh-key-v1\0" + 2 * _string(b"none") + _string(b"") + struct.pack(">I", 1)
    content += _string(_string(_KEY_TYPE) + _string(raw)) + _string(secret)
    lines = textwrap.wrap(base64.b64encode(content).decode(), 70)
    begin, end = (f"-----{word} OPENSSH PRIVATE KEY-----\n" for word in ("BEGIN", "END"))
    return begin + "".join(line + "\n" for line in lines) + end


def _string(content: bytes) -> bytes:
    """A string as SSH sends it."""
    return struct.pack(">I", len(content)) + content
