"""Run mypy over the rooms, the benchmarks and the tools: `python tools/typecheck.py`."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.link_tree import ROOT, make_link_tree


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    site = make_link_tree(ROOT / "build" / "types")
    command = [sys.executable, "-m", "mypy", "-p", "farspan", "-p", "benchmarks", "-p", "tools", "-p", "examples"]
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(site)}, check=False).returncode)


if __name__ == "__main__":
    main()
