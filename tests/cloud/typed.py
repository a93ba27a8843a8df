"""The launcher as somebody types it: a process of its own, whose output is read as it comes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = [
    *("--n-layer=1", "--d-model=16", "--d-head=8", "--n-head=1", "--d-inner=16", "--tgt-len=8"),
    *("--mem-len=8", "--batch=8", "--eval-batch=8", "--log-every=10", "--eval-every=1000"),
    *("--eval-max-tokens=1000", "--sample-tokens=0", "--warmup-tokens=100"),
]
"""Overrides for quickstart: a model that is compiled fast."""
OPEN = "--ssh-cidr=127.0.0.0/8"
"""Where SSH comes from in the local cloud, which no server out there could tell."""


class Typed:
    """`python -m launcher WORDS`, under way."""

    def __init__(self, environ: dict[str, str], *words: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *words],
            cwd=ROOT,
            env=environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return "\n".join(self.lines)

    def wait_for(self, beginning: str) -> None:
        """Until it prints a line that begins so; fails if it ends before."""
        with self._changed:
            while not any(line.startswith(beginning) for line in self.lines):
                assert not self._over, self.text
                self._changed.wait()

    def wait_for_part(self, words: str) -> None:
        """Until it prints a line with these words; fails if it ends before."""
        with self._changed:
            while not any(words in line for line in self.lines):
                assert not self._over, self.text
                self._changed.wait()

    def send(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Its exit status, when it has ended."""
        status = self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()
        return status
