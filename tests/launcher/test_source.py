"""The archive of the source: what is in it, that it is always the same, and when there is none."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from launcher import source
from launcher.source import Source, archive
from txl_jax.errors import UserError


def git(root: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one commit and an ignored folder."""
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    (root / "package" / "a.py").write_text("a = 1\n")
    (root / "run.sh").write_text("true\n")
    (root / "run.sh").chmod(0o755)
    (root / ".gitignore").write_text("/data/\n*.secret\n")
    (root / "data").mkdir()
    (root / "data" / "large.npy").write_text("large")
    (root / "my.secret").write_text("secret")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def packed(root: Path, folder: Path, committed: bool = False) -> Source:
    folder.mkdir(exist_ok=True)
    return archive(root, folder, committed)


def members(found: Source) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(found.path) as tar:
        return {entry.name: entry for entry in tar}


COMMITTED = {".gitignore", "package/a.py", "run.sh"}


def test_what_git_tracks_or_would_is_in_it(root, tmp_path):
    found = packed(root, tmp_path / "out", committed=True)
    assert set(members(found)) == COMMITTED == found.names
    assert (found.dirty, len(found.revision)) == (False, 40)
    assert found.path.name == f"{found.sha256}.tar.gz"
    (root / "package" / "new $(touch x)\n'.py").write_text("b = 2\n")
    (root / "run.sh").unlink()
    found = packed(root, tmp_path / "out")
    names = COMMITTED - {"run.sh"} | {"package/new $(touch x)\n'.py"}
    assert set(members(found)) == names == found.names
    assert found.dirty


def test_it_unpacks_to_the_same_files(root, tmp_path):
    found = packed(root, tmp_path / "out")
    subprocess.run(["tar", "-xzf", str(found.path), "-C", str(tmp_path / "out")], check=True)
    assert (tmp_path / "out" / "package" / "a.py").read_text() == "a = 1\n"
    assert os.access(tmp_path / "out" / "run.sh", os.X_OK)
    assert not os.access(tmp_path / "out" / "package" / "a.py", os.X_OK)


def test_the_same_files_give_the_same_bytes(root, tmp_path):
    first = packed(root, tmp_path / "out")
    for path in root.rglob("*"):
        os.utime(path, (1, 1))
    (root / "package" / "a.py").chmod(0o600)
    assert packed(root, tmp_path / "other").path.read_bytes() == first.path.read_bytes()
    (root / "package" / "a.py").write_text("a = 2\n")
    assert packed(root, tmp_path / "out").sha256 != first.sha256


def test_links_that_lead_out_stay_here(root, tmp_path):
    (root / "within").symlink_to("package/a.py")
    (root / "package" / "up").symlink_to("../run.sh")
    (root / "out").symlink_to("../elsewhere")
    (root / "absolute").symlink_to("/etc/passwd")
    entries = members(packed(root, tmp_path / "out"))
    assert set(entries) == COMMITTED | {"within", "package/up"}
    assert entries["within"].linkname == "package/a.py"


def test_secrets_that_nobody_tracks_stay_here(root, tmp_path):
    secrets = [".env", "package/.env.local", "package/Key.PEM", "id_rsa", "id_ed25519.old"]
    for name in [*secrets, "environment.py", "package/key.py"]:
        (root / name).write_text("x")
    found = packed(root, tmp_path / "out")
    assert set(members(found)) == COMMITTED | {"environment.py", "package/key.py"} == found.names
    assert found.left_out == tuple(sorted(secrets))
    assert found.warning.startswith("not sent, as their names are those of secrets: .env, id_")
    git(root, "add", "--force", "package/Key.PEM")
    found = packed(root, tmp_path / "out")
    assert "package/Key.PEM" in found.names and "package/Key.PEM" not in found.left_out


def test_a_checkout_within_another_folder_of_git(root, tmp_path):
    found = packed(root / "package", tmp_path / "out")
    assert found.names == {"a.py"}


def refusal(root: Path, folder: Path, committed: bool = False) -> str:
    with pytest.raises(UserError) as raised:
        packed(root, folder, committed)
    assert "\n" not in str(raised.value)
    assert list(folder.iterdir()) == []
    return str(raised.value)


@pytest.mark.parametrize("change", ["changed", "new", "deleted", "staged"])
def test_committed_refuses_what_is_not(root, tmp_path, change):
    path = root / ("package/a.py" if change != "new" else "new\n.py")
    path.unlink(missing_ok=change != "deleted")
    if change != "deleted":
        path.write_text("a = 3\n")
    if change == "staged":
        git(root, "add", ".")
    name = "new\\n.py" if change == "new" else "package/a.py"
    message = refusal(root, tmp_path / "out", committed=True)
    assert f"has changes that are not ({name})" in message


def test_bad_folders_are_one_line(root, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    message = refusal(tmp_path / "plain", tmp_path / "out")
    assert "is no git checkout (fatal: not a git repository" in message
    git(tmp_path / "plain", "init", "--quiet")
    assert "has no source files" in refusal(tmp_path / "plain", tmp_path / "out")
    assert "no commit" in refusal(tmp_path / "plain", tmp_path / "out", committed=True)
    monkeypatch.setattr(source, "LARGEST_BYTES", 10)
    message = refusal(root, tmp_path / "out")
    assert "package/a.py" in message and ".gitignore" in message
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git cannot be run" in refusal(root, tmp_path / "out")
