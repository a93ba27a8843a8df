"""Freed memory that stays: seen in a process of its own, as it cannot be undone."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

PAGES = """
import resource, sys
from txl_jax import host_memory, sharding

if sys.argv[1] == "keep":
    host_memory.keep_freed(sharding.make_mesh())
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 100_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_not_asked_for_again():
    def pages(how: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", PAGES, how]))

    assert pages("give back") > 10 * pages("keep") + 10
