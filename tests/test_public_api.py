"""What docs/api.md promises is what the packages export."""

import re
import subprocess
import sys
from pathlib import Path

import farspan
import farspan.kernels
import farspan.star
import pytest

API = Path(__file__).resolve().parent.parent / "docs" / "api.md"


def documented(section: str) -> list[str]:
    """The names in the first column of a section's table."""
    text = API.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


@pytest.mark.parametrize("module", [farspan, farspan.kernels, farspan.star], ids=lambda module: module.__name__)
def test_exports_are_the_documented_names(module) -> None:
    assert sorted(module.__all__) == sorted(documented(f"`{module.__name__}`"))
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert getattr(module, name).__doc__, name


def test_front_door_needs_no_torch() -> None:
    code = "import sys, farspan; print('torch' in sys.modules, 'vllm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_commands_are_the_documented_ones() -> None:
    from farspan.cli import make_parser

    (subcommands,) = (action for action in make_parser()._actions if action.dest == "command")
    assert subcommands.choices is not None
    assert [f"farspan {name}" for name in subcommands.choices] == documented("Command line")


def test_request_options_are_the_documented_ones() -> None:
    from farspan.engine_ext.requests import OVERRIDES

    (row,) = (line for line in API.read_text().splitlines() if line.startswith("| options of one request"))
    assert [name for name in re.findall(r"`([^`]+)`", row) if name.startswith("farspan.")] == list(OVERRIDES)
