"""The two-minute notice that EC2 gives before it takes a spot instance back."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from botocore.exceptions import HTTPClientError
from botocore.utils import METADATA_BASE_URL, IMDSFetcher

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
POLL_SECONDS = 5.0
TRY_SECONDS = 60.0
"""For which a service that does not answer at the start is asked again."""


class Notices(IMDSFetcher):
    """Reads the instance metadata service, version 2.

    AWS_EC2_METADATA_SERVICE_ENDPOINT and AWS_EC2_METADATA_DISABLED are respected.
    """

    def __init__(self) -> None:
        super().__init__(timeout=2, base_url=os.environ.get(ENDPOINT) or METADATA_BASE_URL)

    def absent(self) -> bool:
        """Whether there certainly is no such service: it is not wanted, or nothing listens."""
        address = urlsplit(self.get_base_url())
        try:
            socket.create_connection((address.hostname, address.port or 80), timeout=2).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return self._disabled

    def token(self) -> str | None:
        """What requests have to show; None: no answer, or another one."""
        try:
            return self._fetch_metadata_token()
        except (HTTPClientError, self._RETRIES_EXCEEDED_ERROR_CLS):
            return None

    def notice(self) -> str | None:
        """`terminate at 2026-01-02T03:04:05Z`; None: no notice, or no answer this time."""
        if not (token := self.token()):
            return None
        try:
            path = "latest/meta-data/spot/instance-action"
            found = json.loads(self._get_request(path, None, token).text)
            return f"{found['action']} at {found['time']}"
        except (HTTPClientError, self._RETRIES_EXCEEDED_ERROR_CLS, ValueError):
            return None


def start_watching(act: Callable[[], None]) -> threading.Thread:
    """Calls `act` from another thread, once, when this machine is going to be taken back.

    The thread ends at once on a machine that certainly is not on EC2, and after a minute where it
    was told nothing.
    """

    def watch() -> None:
        notices = Notices()
        if notices.absent():
            return
        deadline = time.monotonic() + TRY_SECONDS
        while notices.token() is None:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)
        while not (notice := notices.notice()):
            time.sleep(POLL_SECONDS)
        print(f"spot notice: {notice}", file=sys.stderr, flush=True)
        act()

    thread = threading.Thread(target=watch, name="spot", daemon=True)
    thread.start()
    return thread
