"""Where a run's files are kept for good: a folder that all processes see, or a bucket."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """Files by name, as `checkpoints/120/0/manifest.json`; each appears whole or not at all.

    Every method raises FileNotFoundError for a name that is absent, and another OSError, whose
    text is one line, if the store cannot be reached or refuses; then the caller may try again.
    """

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files whose name begins with `prefix`, sorted."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a file."""
        ...

    def upload(self, name: str, path: Path) -> None:
        """Makes or replaces a file with the content of a local one."""
        ...

    def download(self, name: str, path: Path) -> None:
        """Copies a file to a local path, whose folder is made if need be; whole or not at all."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Removes files; those that are absent already are none to it."""
        ...
