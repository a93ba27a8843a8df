"""The fixture of what several files of tests need: a laptop before the local cloud."""

import pytest

from tests.cloud.cloud import LocalCloud
from tests.launcher.desk import Desk, as_user


@pytest.fixture
def desk(
    cloud: LocalCloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Desk:
    """For modules with the fixtures of tests.cloud.fixtures."""
    as_user(cloud.environ, monkeypatch)
    return Desk(cloud, capsys)
