import signal

import pytest

from txl_jax import home as home_module
from txl_jax.errors import UserError
from txl_jax.home import Home

pytest_plugins = ["tests.buckets"]

pytestmark = pytest.mark.processes


@pytest.fixture
def home(s3, tmp_path, monkeypatch) -> Home:
    monkeypatch.chdir(tmp_path)
    home = Home(s3.url)
    home.bring()
    home.folder.mkdir(parents=True)
    return home


def test_the_files_of_a_run_are_in_s3_at_its_end(s3, home, capsys):
    with home.mirrored(True, [signal.SIGTERM]):
        (home.folder / "metrics.jsonl").write_bytes(b"1\n")
        (home.folder / "other").write_bytes(b"not the run's")
    assert s3.contents() == {"metrics.jsonl": b"1\n"}
    assert capsys.readouterr().err == ""
    with home.mirrored(False):
        (home.folder / "metrics.jsonl").write_bytes(b"2\n")
    assert s3.contents() == {"metrics.jsonl": b"1\n"}


def test_a_run_that_ends_with_files_in_the_folder_only_says_so(s3, home, monkeypatch):
    monkeypatch.setattr(home_module, "_PATIENCE", 0.2)
    with pytest.raises(UserError) as caught, home.mirrored(True):
        s3.proxy.mode = "refuse"
        (home.folder / "metrics.jsonl").write_bytes(b"1\n")
    assert str(caught.value) == (
        f"S3 has not got everything; only in {home.folder}: metrics.jsonl; give the same command "
        "again when S3 takes files"
    )


def test_a_run_that_is_stopped_says_so_and_does_not_fail(s3, home, capsys):
    with home.mirrored(True, [signal.SIGTERM]):
        s3.proxy.mode = "denied"
        (home.folder / "metrics.jsonl").write_bytes(b"1\n")
    *_, last = capsys.readouterr().err.splitlines()
    assert last == (
        f"S3 has not got everything; only in {home.folder}: metrics.jsonl; the same command goes "
        "on from what S3 has"
    )
