"""--help and a word that is wrong are answered before anything slow is imported."""

import subprocess
import sys

import pytest

from tests.tiny import ROOT

PROGRAM = """
import sys
from importlib import import_module
try:
    import_module("txl_jax.{command}").main({words})
except (SystemExit, Exception) as end:
    print(type(end).__name__)
print("slow:", *sorted({{"jax", "flax", "orbax", "tensorboardX"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "lr_finder", "scaling"])
@pytest.mark.parametrize("word, end", [("--help", "SystemExit"), ("--hlep", "UserError")])
def test_help_needs_no_jax(command, word, end):
    program = PROGRAM.format(command=command, words=[word])
    output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert output.splitlines()[-2:] == [end, "slow:"]
