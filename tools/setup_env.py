"""Make the virtual environment that every Makefile target runs in: `python3 tools/setup_env.py .venv`.

Without an NVIDIA GPU: vLLM's CPU build with everything it needs, from requirements/cpu.lock. With one: vLLM's CUDA
build from PyPI. The syntax up to the version check is that of any Python 3, so that an old one can say what is wrong.
"""

import sys

MIN_PYTHON = (3, 11)

if sys.version_info < MIN_PYTHON:
    sys.exit(
        "farspan needs Python {0[0]}.{0[1]} or later; {1} is Python {2}.\n"
        "Name another with: make setup PYTHON=/path/to/python3.11".format(
            MIN_PYTHON, sys.executable, sys.version.split()[0]
        )
    )

import argparse
import platform
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
DEV = ROOT / "requirements" / "dev.in"
CUDA_VLLM = "vllm>=0.32,<0.34"
# The wheels named +cpu are not on PyPI; asked only where pip's own settings do not find them.
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# `venv` installs the setuptools that Python shipped with; vLLM and our own build need this one before anything else.
SETUPTOOLS = "setuptools==78.1.1"


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi` is there and lists a GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU " in listing.stdout


def pip(venv: Path, *arguments: str, check: bool = True) -> bool:
    """Run pip of the environment; returns whether it succeeded, or stops the program if `check`."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments]
    succeeded = subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    if check and not succeeded:
        sys.exit(f"pip failed: {' '.join(command[2:])}")
    return succeeded


def install_cpu(venv: Path) -> None:
    """Install the locked CPU environment, without resolving anything."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        sys.exit(
            f"The CPU set-up is locked for Linux on x86_64; this is {platform.system()} on {platform.machine()}. "
            "Use such a machine, or a Linux machine with an NVIDIA GPU."
        )
    pins = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    print(f"Installing {torch} …", flush=True)
    if not pip(venv, "--no-deps", torch, check=False):
        print(f"pip finds no {torch} in its own settings; asking PyTorch's index …", flush=True)
        pip(venv, "--no-deps", torch, "--index-url", PYTORCH_CPU_INDEX)
    print(
        f"Installing {len(pins)} locked packages (vLLM's CPU build, Ray, development tools); this takes minutes …",
        flush=True,
    )
    pip(venv, "--no-deps", "-r", str(LOCK))


def install_cuda(venv: Path) -> None:
    """Install vLLM's CUDA build and the development tools."""
    print(f"NVIDIA GPU found. Installing {CUDA_VLLM} …", flush=True)
    pip(venv, CUDA_VLLM, "-r", str(DEV))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make farspan's virtual environment.")
    parser.add_argument("venv", type=Path, help="folder of the environment; kept if it exists")
    venv = parser.parse_args().venv.absolute()
    started = time.monotonic()
    if not (venv / "bin" / "python").exists():
        print(f"Making {venv} with Python {platform.python_version()} …", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False).returncode:
            sys.exit("Making the environment failed; on Debian and Ubuntu, install the package python3-venv first.")
    pip(venv, SETUPTOOLS)
    if has_nvidia_gpu():
        install_cuda(venv)
    else:
        install_cpu(venv)
    pip(venv, "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    print(f"The environment is ready in {venv} after {time.monotonic() - started:.0f} s.", flush=True)


if __name__ == "__main__":
    main()
