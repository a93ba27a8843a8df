"""Fixture: a local cloud.

A pytest plugin: test modules say `pytest_plugins = ["tests.cloud.fixtures"]`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud.cloud import LocalCloud, missing


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[LocalCloud]:
    """A cloud of its own for one test."""
    if reason := missing():
        pytest.skip(reason)
    with LocalCloud(tmp_path / "cloud") as opened:
        yield opened
