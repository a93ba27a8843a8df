"""The source as it goes to the hosts: one archive of what git lists, named by its content."""

import fnmatch
import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from launcher.names import printable
from txl_jax.errors import UserError

LARGEST_BYTES = 100 << 20
"""Of all files together. What is larger is no source, and somebody forgot to ignore it."""
_SECRETS = (
    *(".env", ".env.*", ".envrc", ".netrc", ".pgpass", ".pypirc", "credentials", "id_dsa*"),
    *("id_ecdsa*", "id_ed25519*", "id_rsa*", "*.key", "*.p12", "*.pem", "*.pfx"),
)
"""Names of files with keys or passwords, which somebody forgot to ignore."""


@dataclass(frozen=True)
class Source:
    """An archive of the source, ready to be sent."""

    path: Path
    """tar.gz; the same files give the same bytes."""
    sha256: str
    """Of the archive, in hexadecimal digits."""
    names: frozenset[str]
    """POSIX paths of the files in it."""
    left_out: tuple[str, ...]
    """Of files that git would track, and that stay here as their names are those of secrets."""
    dirty: bool
    """Whether the files are others than those of `revision`."""
    revision: str
    """The commit; empty: none yet."""

    @property
    def warning(self) -> str:
        """A line on what was left out; empty: nothing."""
        names = ", ".join(map(printable, self.left_out))
        return f"not sent, as their names are those of secrets: {names}" if names else ""


def archive(root: Path, folder: Path, committed: bool = False) -> Source:
    """Packs the files below `root` that git tracks, or would, into an archive in `folder`.

    What .gitignore names stays here, and so do links that lead out of `root` and untracked files
    whose names are those of secrets.

    `committed`: only if the files are as they are committed.

    Raises:
      UserError: no git checkout, no file in it, `committed` and files were changed, or more than
        LARGEST_BYTES.
    """
    revision = _git(root, "rev-parse", "--verify", "--quiet", "HEAD", may_fail=True).strip()
    changed = [
        entry[3:]
        for entry in _entries(_git(root, "status", "--porcelain", "--no-renames", "-z", "."))
    ]
    if committed and (changed or not revision):
        shown = ", ".join(map(printable, changed[:3])) + ", …" * (len(changed) > 3)
        raise UserError(
            f"--committed, and {root} has changes that are not ({shown or 'no commit'}): commit "
            "them, or leave --committed out to send the files as they are"
        )
    tracked = _entries(_git(root, "ls-files", "-z", "--cached", "."))
    untracked = _entries(_git(root, "ls-files", "-z", "--others", "--exclude-standard", "."))
    left_out = sorted(filter(_is_secret, untracked))
    # A file may be listed twice during a merge, and one that was deleted is listed still.
    listed = {*tracked, *untracked}.difference(left_out)
    paths = [root / name for name in sorted(listed)]
    paths = [path for path in paths if _is_source(root, path)]
    if not paths:
        raise UserError(f"{root} has no source files to send")
    _check_size(root, paths)
    content = _pack(root, paths)
    sha256 = hashlib.sha256(content).hexdigest()
    packed = folder / f"{sha256}.tar.gz"
    packed.write_bytes(content)
    names = frozenset(path.relative_to(root).as_posix() for path in paths)
    return Source(packed, sha256, names, tuple(left_out), bool(changed), revision)


def _is_secret(name: str) -> bool:
    last = name.rpartition("/")[2].lower()
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in _SECRETS)


def _is_source(root: Path, path: Path) -> bool:
    if path.is_symlink():
        leads_to = Path(os.path.normpath(path.parent / path.readlink()))
        return not path.readlink().is_absolute() and leads_to.is_relative_to(root)
    return path.is_file()


def _pack(root: Path, paths: list[Path]) -> bytes:
    """tar.gz without what differs between machines: times, owners, all modes but one bit."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0, filename="") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in paths:
            entry = tarfile.TarInfo(path.relative_to(root).as_posix())
            if path.is_symlink():
                entry.type, entry.linkname = tarfile.SYMTYPE, str(path.readlink())
                tar.addfile(entry)
                continue
            content = path.read_bytes()
            entry.size = len(content)
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _check_size(root: Path, paths: list[Path]) -> None:
    sizes = {path.relative_to(root).as_posix(): path.lstat().st_size for path in paths}
    if (total := sum(sizes.values())) > LARGEST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        shown = ", ".join(f"{printable(name)} {sizes[name] / 1e6:.0f} MB" for name in largest)
        raise UserError(
            f"the source below {root} is {total / 1e6:.0f} MB ({shown}): name in .gitignore what "
            f"the hosts do not need, to stay below {LARGEST_BYTES / 1e6:.0f} MB"
        )


def _entries(listing: str) -> list[str]:
    return [entry for entry in listing.split("\0") if entry]


def _git(root: Path, *words: str, may_fail: bool = False) -> str:
    """What git prints. With `may_fail` nothing where it fails."""
    command = ["git", "-C", str(root), "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, capture_output=True, check=not may_fail)
    except OSError as error:
        raise UserError(f"git cannot be run ({error.strerror}): install it") from error
    except subprocess.CalledProcessError as error:
        said = printable(error.stderr.decode(errors="replace").strip().split("\n")[-1])
        raise UserError(
            f"{root} is no git checkout ({said}), and git says which files are source: clone the "
            "repository, or git init there"
        ) from error
    return done.stdout.decode(errors="surrogateescape")
