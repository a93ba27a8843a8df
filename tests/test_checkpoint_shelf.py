import subprocess
import sys
from pathlib import Path

from txl_jax.checkpoint_files import Saved
from txl_jax.checkpoint_shelf import FolderShelf

ROOT = Path(__file__).resolve().parent.parent

# What another process of the machine does: its units of a step come and go, and the step with them.
ANOTHER = """
import os, shutil, sys
from pathlib import Path

folder = Path(sys.argv[1])
print(flush=True)
for step in range(3000):
    unit = folder / f"{step % 3}.0" / "part-1"
    unit.mkdir(parents=True)
    (unit / "manifest.json").touch()
    shutil.rmtree(unit)
    unit.parent.rmdir()
"""


def test_steps_that_another_process_removes_meanwhile(tmp_path):
    shelf = FolderShelf(tmp_path)
    (tmp_path / "9.0" / "whole").mkdir(parents=True)
    (tmp_path / "9.0" / "whole" / "manifest.json").touch()
    (tmp_path / "9.0" / "commit.json").touch()
    words = [sys.executable, "-c", ANOTHER, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as another:
        assert another.stdout and another.stdout.readline()
        while another.poll() is None:
            found = shelf.found("")
            assert found[Saved("", 9, 0)] == {"whole/manifest.json", "commit.json"}
    assert another.returncode == 0
