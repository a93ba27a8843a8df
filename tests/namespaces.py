"""Hosts that are network namespaces of this machine, each with two interfaces.

`private` is in a network of all hosts, `public` in another one. The names of the hosts are known
as their public addresses, as they often are. A pytest plugin: test modules say
`pytest_plugins = ["tests.namespaces"]`.
"""

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NUMBER = 3
_WITHIN = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


class Hosts:
    """NUMBER hosts and the switches between them; `with` removes them."""

    def __init__(self, folder: Path):
        self._prefix, self._folder = f"txl-{secrets.token_hex(4)}", folder
        self.names = [f"host-{i}" for i in range(NUMBER)]
        self.private = [f"10.91.0.{4 + i}" for i in range(NUMBER)]
        self.private6 = [f"fd91::{4 + i}" for i in range(NUMBER)]
        self.public = [f"192.0.2.{4 + i}" for i in range(NUMBER)]
        self._opened = contextlib.ExitStack()
        try:
            self._build()
        except BaseException:
            self._opened.close()
            raise

    def _build(self) -> None:
        switch = self._namespace("switch")
        for network in ("private", "public"):
            _ip("-n", switch, "link", "add", "name", network, "type", "bridge")
            _ip("-n", switch, "link", "set", network, "up")
        for i, name in enumerate(self.names):
            host = self._namespace(name)
            _ip("-n", host, "link", "set", "lo", "up")
            for network, addresses in (("private", self.private), ("public", self.public)):
                ends = ("name", f"{network}{i}", "type", "veth", "peer", "name", network)
                _ip("-n", switch, "link", "add", *ends, "netns", host)
                _ip("-n", switch, "link", "set", f"{network}{i}", "master", network, "up")
                _ip("-n", host, "address", "add", f"{addresses[i]}/24", "dev", network)
                _ip("-n", host, "link", "set", network, "up")
            six = (f"{self.private6[i]}/64", "dev", "private", "nodad")
            _ip("-n", host, "address", "add", *six)
        known = zip(self.public, self.names, strict=True)
        lines = ["127.0.0.1 localhost", *map(" ".join, known)]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")

    def _namespace(self, name: str) -> str:
        name = f"{self._prefix}-{name}"
        _ip("netns", "add", name)
        self._opened.callback(_ip, "netns", "delete", name)
        return name

    def within(self, host: int) -> list[str]:
        """Words before a command that let it run on a host."""
        surroundings = ["unshare", "--mount", "--uts", "sh", "-c", _WITHIN]
        words = [*surroundings, str(self._folder / "hosts"), self.names[host]]
        return ["ip", "netns", "exec", f"{self._prefix}-{self.names[host]}", *words]

    @contextlib.contextmanager
    def cut_off(self, host: int, here: bool = False) -> Iterator[None]:
        """A host is not in the private network; with `here` its own interface is down."""
        namespace, name = ("switch", f"private{host}")
        if here:
            namespace, name = (self.names[host], "private")
        link = ("-n", f"{self._prefix}-{namespace}", "link", "set", name)
        _ip(*link, "down")
        try:
            yield
        finally:
            _ip(*link, "up")

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if not shutil.which("ip"):
        pytest.skip("there is no `ip` (iproute2) to make network namespaces with")
    try:
        made = Hosts(tmp_path_factory.mktemp("hosts"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
    with made:
        yield made
