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

    def __post_init__(self) -> None:
        """Raises ValueError unless the cell says exactly one thing."""
        name = f"{DATA.name}: {self.feature!r} with {self.method!r}"
        if self.test is None and self.refused is None:
            raise ValueError(f"{name} must be tested, or refused")
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
            if raw.keys() - {"refused", "engine"}:
                raise ValueError(
                    f"{DATA.name}: {feature!r} with {method!r} must be tested or refused, not {', '.join(raw)}"
                )
            cells.append(Cell(feature, method, options, test=test, case=case, **raw))
    return cells


def number_of(text: str, texts: list[str]) -> int:
    """The place of a text in a list, from 1; it is added where it is new."""
    if text not in texts:
        texts.append(text)
    return texts.index(text) + 1


def format_cell(cell: Cell, sentences: list[str]) -> str:
    """One cell of the table; the text of a refusal is a number, and added to the list."""
    if cell.refused is not None:
        return f"refused (R{number_of(cell.refused, sentences)})"
    assert cell.test is not None
    return f"`{cell.case or cell.test.partition('::')[2].removeprefix('test_')}`"


def format_table() -> str:
    """The table, and the sentences of its refusals."""
    sentences: list[str] = []
    cells = read_cells()
    methods = list(dict.fromkeys(cell.method for cell in cells))
    lines = [f"| | {' | '.join(methods)} |", "| --- |" + " --- |" * len(methods)]
    for feature in dict.fromkeys(cell.feature for cell in cells):
        row = [format_cell(cell, sentences) for cell in cells if cell.feature == feature]
        lines.append(f"| **{feature}** | {' | '.join(row)} |")
    lines += ["", "The sentences of the refusals begin:", ""]
    lines += [f"- R{number}: `{sentence}`" for number, sentence in enumerate(sentences, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(TABLE.serve("python -m tools.compatibility", format_table))
