"""The instance metadata service, version 2, for every host of the local cloud.

A host finds its own below /hosts/ID, as AWS_EC2_METADATA_SERVICE_ENDPOINT tells it.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_NOT_FOUND = ("404 Not Found", "")


@dataclass
class Metadata:
    """What the hosts can read."""

    values: Callable[[str], dict[str, str] | None]
    """For a host's id: what lies below latest/meta-data/; None if there is no such host."""
    credentials: Callable[[str], tuple[str, dict[str, str]] | None]
    """For a host's id: the name of its role and what it is allowed to sign with."""
    notices: dict[str, str] = field(default_factory=dict)
    """For a spot host's id: when it is going to be taken back, as 2026-01-02T03:04:05Z."""
    delay: float = 0.0
    """Seconds that an answer takes."""
    _tokens: dict[str, set[str]] = field(default_factory=dict)

    def answer(self, environ: dict[str, Any]) -> tuple[str, str]:
        """Status and text."""
        time.sleep(self.delay)
        _, _, host, *rest = environ["PATH_INFO"].split("/")
        path = "/".join(rest).rstrip("/")
        tokens = self._tokens.setdefault(host, set())
        if path == "latest/api/token" and environ["REQUEST_METHOD"] == "PUT":
            token = secrets.token_urlsafe()
            tokens.add(token)
            return "200 OK", token
        if environ.get("HTTP_X_AWS_EC2_METADATA_TOKEN") not in tokens:
            return "401 Unauthorized", ""
        values = self.values(host)
        if values is None or not path.startswith("latest/meta-data"):
            return _NOT_FOUND
        return self._find(host, path.removeprefix("latest/meta-data").strip("/"), values)

    def _find(self, host: str, path: str, values: dict[str, str]) -> tuple[str, str]:
        roles = "iam/security-credentials"
        if path == "spot/instance-action" and host in self.notices:
            return "200 OK", json.dumps({"action": "terminate", "time": self.notices[host]})
        if path.startswith(roles) and (found := self.credentials(host)):
            role, keys = found
            if path == roles:
                return "200 OK", role
            if path == f"{roles}/{role}":
                return "200 OK", json.dumps(keys)
        return ("200 OK", values[path]) if path in values else _NOT_FOUND
