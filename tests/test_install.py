import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
H100 = "9.0, 580.159.04, NVIDIA H100 80GB HBM3\n"
A100 = "8.0, 570.211.01, NVIDIA A100-SXM4-40GB\n"
V100 = "7.0, 580.65.06, Tesla V100-SXM2-32GB\n" * 8
T4 = "7.5, 580.65.06, Tesla T4\n"
MIXED = "9.0, 580.65.06, NVIDIA H100 PCIe\n7.0, 580.65.06, Tesla V100-PCIE-16GB\n"
OLD = "7.0, 470.82.01, Tesla V100-SXM2-16GB\n"
NO_FIELD = 'Field "compute_cap" is not a valid field to query.\n'
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
    "the latest NVIDIA driver is installed and running.\n"
)

NVIDIA_SMI = """#!/bin/sh
test "$*" = "--query-gpu=compute_cap,driver_version,name --format=csv,noheader" || exit 99
cat '{listing}'
exit {status}
"""


def chosen(tmp_path: Path, listing: str | None, status: int = 0) -> tuple[str, str]:
    """install.py's words and packages where nvidia-smi prints `listing`; None: there is none."""
    tools = tmp_path / "bin"
    tools.mkdir()
    if listing is not None:
        (tmp_path / "listing").write_text(listing)
        script = NVIDIA_SMI.format(listing=tmp_path / "listing", status=status)
        (tools / "nvidia-smi").write_text(script)
        (tools / "nvidia-smi").chmod(0o755)
    (tools / "cat").symlink_to(str(shutil.which("cat")))
    command = [sys.executable, str(ROOT / "install.py"), str(tmp_path / "venv"), "--print"]
    environment = os.environ | {"PATH": str(tools)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not (tmp_path / "venv").exists()
    words, packages = done.stdout.splitlines()
    return words, packages.replace(f"{ROOT}/", "")


CPU = "pip install -r requirements.lock"
CUDA12 = "pip install -r requirements.txt -c requirements.lock"
CUDA13 = "pip install -r requirements.lock jax[cuda13]"


@pytest.mark.parametrize(
    ("listing", "status", "packages", "words"),
    [
        (None, 0, CPU, "nvidia-smi lists no GPU: the CPU build of JAX"),
        ("No devices were found\n", 6, CPU, "nvidia-smi lists no GPU: the CPU build of JAX"),
        ("No devices were found\n", 0, CPU, "nvidia-smi lists no GPU: the CPU build of JAX"),
        (NO_DRIVER, 9, CPU, "nvidia-smi lists no GPU: the CPU build of JAX"),
        (NO_FIELD, 2, CPU, "nvidia-smi lists no GPU: the CPU build of JAX"),
        (H100, 0, CUDA13, "1 x NVIDIA H100 80GB HBM3, driver 580.159.04: JAX for CUDA 13"),
        (T4, 0, CUDA13, "1 x Tesla T4, driver 580.65.06: JAX for CUDA 13"),
        (A100, 0, CUDA12, "1 x NVIDIA A100-SXM4-40GB, driver 570.211.01: JAX for CUDA 12"),
        (V100, 0, CUDA12, "8 x Tesla V100-SXM2-32GB, driver 580.65.06: JAX for CUDA 12"),
        (MIXED, 0, CUDA12, "2 x NVIDIA H100 PCIe, driver 580.65.06: JAX for CUDA 12"),
        (
            *(OLD, 0, CPU),
            "1 x Tesla V100-SXM2-16GB, driver 470.82.01: the CPU build of JAX, as its GPU builds "
            "need a driver from 525 on",
        ),
    ],
)
def test_the_build_of_jax_fits_the_machine(tmp_path, listing, status, packages, words):
    assert chosen(tmp_path, listing, status) == (words, packages)


def requirements(name: str, python: str = "3.11") -> dict[str, Requirement]:
    """The lines of a requirements file that hold for this version of Python, by package."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    return {
        line.name.lower().replace("_", "-"): line
        for line in found
        if line.marker is None or line.marker.evaluate(here)
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_the_locked_versions_are_within_the_bounds(name, python):
    wanted = requirements(f"{name}.txt", python)
    locked = requirements(f"{name}.lock", python)
    assert not [package for package in locked if package.startswith("nvidia")]
    for package, requirement in wanted.items():
        if package.startswith("nvidia"):
            continue
        (pin,) = locked[package].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), (requirement, pin)


def test_every_requirement_is_bounded():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for package, requirement in requirements(name).items():
            operators = {part.operator for part in requirement.specifier}
            assert operators in ({">=", "<"}, {"=="}), package


MAKE = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "PYTHON", "VENV"}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # When the tests run under make, its own variables must not reach the make that they start.
    inherited = {name: os.environ[name] for name in os.environ.keys() - MAKE}
    environment = inherited | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_without_ensurepip_one_line_says_what_to_install(tmp_path):
    """As on Debian, where python3 comes without python3-venv."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None\n")
    done = run(sys.executable, "install.py", tmp_path / "venv", PYTHONPATH=str(tmp_path))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    message = f"error: {name} cannot make virtual environments; sudo apt install {name}-venv\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_is_no_virtual_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    done = run(sys.executable, "install.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} exists and is no virtual environment; move it away\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("python", ["", "/nowhere/python3", "false"])
def test_without_a_recent_python_make_says_so_in_one_line(tmp_path, python):
    done = run("make", "--silent", "install", f"VENV={tmp_path}/venv", f"PYTHON={python}")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: no Python 3.11 or later found; ")
    assert all(line.startswith("make: ***") for line in rest)
    assert done.returncode == 2
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_takes_the_first_python_that_starts(tmp_path):
    """A name on PATH may belong to an old Python, or to a pyenv version that is not chosen."""
    for name, line in {
        "python3": "exit 1",
        "python3.13": "echo 'pyenv: python3.13: command not found' >&2; exit 127",
        "python3.12": f'exec {sys.executable} "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = run("make", "--dry-run", "install", f"VENV={tmp_path}/venv", PATH=path)
    assert f'"python3.12" install.py {tmp_path}/venv' in done.stdout
