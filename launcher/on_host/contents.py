"""One hash of what a folder's files are called and hold, by which a host knows what it was sent.

    python -m launcher.on_host.contents FOLDER HASH

Exit status 1 if the files in FOLDER have another hash.
"""

import hashlib
import sys
from pathlib import Path


def hash_of(files: dict[str, Path]) -> str:
    """SHA-256 of names and contents, in hexadecimal digits. Raises OSError: one cannot be read."""
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{content} {len(name)} {name}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def main(words: list[str]) -> int:
    folder, expected = Path(words[0]), words[1]
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if not all(path.is_file() and not path.is_symlink() for path in found):
        return 1
    files = {path.relative_to(folder).as_posix(): path for path in found}
    return 0 if hash_of(files) == expected else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
