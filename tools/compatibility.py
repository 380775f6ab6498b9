"""The table of docs/compatibility.md, from docs/data/compatibility.toml: `python -m tools.compatibility`; `--write`."""

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.regions import Region

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "data" / "compatibility.toml"
TABLE = Region(
    ROOT / "docs" / "compatibility.md", "<!-- table: python -m tools.compatibility -->\n", "<!-- end of table -->\n"
)
FEATURES = "integration/test_engine_features.py"
WAITING = {("sleep levels 1 and 2", "dense")}
"""Cells that may say why they are untested: their tests exist, for machines with a GPU."""


@dataclass(frozen=True)
class Cell:
    """What is known of one method together with one feature of vLLM."""

    feature: str
    method: str
    options: dict[str, Any]
    """Of farspan, that choose the method."""
    test: str | None = None
    """`path::function` below tests/ that runs the two together, or, with `refused`, that has the sentence raised."""
    case: str | None = None
    """The case of the test that is meant, where it has one for each pair."""
    refused: str | None = None
    """How the sentence begins that refuses the two."""
    engine: dict[str, Any] | None = None
    """Arguments of an engine that is refused so when it is configured."""
    untested: str | None = None
    """Why the cell is neither tested nor refused."""

    def __post_init__(self) -> None:
        """Raises ValueError unless the cell says exactly one thing."""
        name = f"{DATA.name}: {self.feature!r} with {self.method!r}"
        if (self.untested is not None) == (self.test is not None or self.refused is not None):
            raise ValueError(f"{name} must be tested or refused")
        if self.untested is not None and (self.feature, self.method) not in WAITING:
            raise ValueError(f"{name} is untested; allowed: a test of the two, or a sentence that refuses them")
        if self.refused is not None and (self.engine is None) == (self.test is None):
            raise ValueError(f"{name}: who raises the sentence is `engine` or `by`")


def read_cells() -> list[Cell]:
    """All cells, feature by feature. Raises ValueError where one is missing or says too much."""
    data = tomllib.loads(DATA.read_text())
    methods: dict[str, dict[str, Any]] = data.pop("methods")
    cells = []
    for feature, row in data.items():
        if row.keys() - methods.keys() - {"others"} or ("others" not in row and row.keys() != methods.keys()):
            raise ValueError(f"{DATA.name}: {feature!r} has cells for {', '.join(row)}")
        for method, options in methods.items():
            raw = dict(row.get(method, row.get("others")))
            test, case = raw.pop("test", None) or raw.pop("by", None), None
            if test is not None and "::" not in test:
                test, case = f"{FEATURES}::test_features", f"{method}-{test}"
            cells.append(Cell(feature, method, options, test=test, case=case, **raw))
    return cells


def number_of(text: str, texts: list[str]) -> int:
    """The place of a text in a list, from 1; it is added where it is new."""
    if text not in texts:
        texts.append(text)
    return texts.index(text) + 1


def format_cell(cell: Cell, sentences: list[str], reasons: list[str]) -> str:
    """One cell of the table; the texts of refusals and reasons are numbers, and added to their lists."""
    if cell.refused is not None:
        return f"refused (R{number_of(cell.refused, sentences)})"
    if cell.untested is not None:
        return f"not tested (N{number_of(cell.untested, reasons)})"
    assert cell.test is not None
    return f"`{cell.case or cell.test.partition('::')[2].removeprefix('test_')}`"


def format_table() -> str:
    """The table, the sentences of its refusals, and why cells are not tested."""
    sentences: list[str] = []
    reasons: list[str] = []
    cells = read_cells()
    methods = list(dict.fromkeys(cell.method for cell in cells))
    lines = [f"| | {' | '.join(methods)} |", "| --- |" + " --- |" * len(methods)]
    for feature in dict.fromkeys(cell.feature for cell in cells):
        row = [format_cell(cell, sentences, reasons) for cell in cells if cell.feature == feature]
        lines.append(f"| **{feature}** | {' | '.join(row)} |")
    lines += ["", "The sentences of the refusals begin:", ""]
    lines += [f"- R{number}: `{sentence}`" for number, sentence in enumerate(sentences, 1)]
    lines += ["", "Not tested:", ""]
    lines += [f"- N{number}: {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(TABLE.serve("python -m tools.compatibility", format_table))
