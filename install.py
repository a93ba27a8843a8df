"""Makes a virtual environment with the packages that this machine can use.

    python3 install.py FOLDER            what running takes: requirements.lock
    python3 install.py FOLDER --dev      and what testing takes: requirements-dev.lock
    python3 install.py FOLDER --print    says what it would install, and changes nothing

JAX has a build for CPUs and one for each generation of NVIDIA's drivers; `jax_build` chooses.
Standard library only: it runs before anything is installed.
"""

import argparse
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
LOCK = ["-r", str(ROOT / "requirements.lock")]
DEV = ["-r", str(ROOT / "requirements-dev.lock")]
CUDA12 = ["-r", str(ROOT / "requirements.txt"), "-c", str(ROOT / "requirements.lock")]
CUDA13 = [*LOCK, "jax[cuda13]"]


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: float
    """Compute capability; V100 has 7.0, A100 8.0, H100 9.0."""
    driver: str
    """Version of the driver, as 580.65.06."""


def find_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that nvidia-smi lists; none where it fails or is not there."""
    fields = "compute_cap,driver_version,name"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = re.findall(r"^(\d+\.\d+), (\d+\.[\d.]+), (.+)$", done.stdout, re.MULTILINE)
    return [Gpu(name, float(capability), driver) for capability, driver, name in rows]


def jax_build(gpus: list[Gpu]) -> tuple[str, list[str]]:
    """What to install on a machine with these GPUs: in words, and as pip's arguments.

    The CUDA 13 wheels take a driver from 580 on and compute capability 7.5 or more; the CUDA 12
    wheels a driver from 525 on. So V100 takes CUDA 12 only.
    """
    if not gpus:
        return "nvidia-smi lists no GPU: the CPU build of JAX", LOCK
    driver = int(gpus[0].driver.split(".")[0])
    found = f"{len(gpus)} x {gpus[0].name}, driver {gpus[0].driver}"
    if driver < 525:
        return f"{found}: the CPU build of JAX, as its GPU builds need a driver from 525 on", LOCK
    if driver < 580 or min(gpu.capability for gpu in gpus) < 7.5:
        return f"{found}: JAX for CUDA 12", CUDA12
    return f"{found}: JAX for CUDA 13", CUDA13


def make_venv(folder: Path) -> None:
    """Makes a virtual environment of this Python in `folder`, unless a working one is there."""
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--version"]
    if python.exists() and subprocess.run(pip, capture_output=True).returncode == 0:
        return
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        _fail(f"{folder} exists and is no virtual environment; move it away")
    ensurepip = [sys.executable, "-m", "ensurepip", "--version"]
    if subprocess.run(ensurepip, capture_output=True).returncode != 0:
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        _fail(f"{name} cannot make virtual environments; sudo apt install {name}-venv")
    venv.create(folder, clear=True, symlinks=True, with_pip=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a virtual environment.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dev", action="store_true", help="also what testing takes")
    parser.add_argument("--print", action="store_true", help="say what, and change nothing")
    args = parser.parse_args()
    words, packages = jax_build(find_gpus())
    if args.dev:
        packages = [*packages, *DEV]
    print(words, flush=True)
    if args.print:
        print("pip install", *packages)
        return
    make_venv(args.folder)
    pip = [args.folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    sys.exit(subprocess.run([*pip, "install", *packages]).returncode)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
