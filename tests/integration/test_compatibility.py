"""docs/compatibility.md says what is so: its tests exist, its refusals are raised."""

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from farspan.engine_ext.errors import FarspanError

from tests.integration.test_engine_features import FEATURES, METHODS
from tests.integration.test_engine_refusals import configure
from tools import compatibility
from tools.compatibility import ROOT, TABLE, Cell, format_table, read_cells

CELLS = read_cells()


def cell_id(cell: Cell) -> str:
    return f"{cell.feature}-{cell.method}"


def test_the_table_is_current() -> None:
    assert TABLE.is_current(format_table()), "run: python -m tools.compatibility --write"


def test_a_cell_is_tested_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "compatibility.toml"
    monkeypatch.setattr(compatibility, "DATA", data)
    for cell, sentence in (
        ('untested = "as flex"', "must be tested or refused, not untested"),
        ("", "must be tested, or refused"),
        ('refused = "no"', "who raises the sentence is `engine` or `by`"),
    ):
        data.write_text(f"[methods]\nflex = {{}}\n[LoRA]\nflex = {{ {cell} }}\n")
        with pytest.raises(ValueError, match=sentence):
            read_cells()


@cache
def functions_of(path: Path) -> dict[str, str]:
    """The source of each test function of a file, its decorators included."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            parts = [*node.decorator_list, node]
            found[node.name] = "\n".join(str(ast.get_source_segment(source, part)) for part in parts)
    return found


def test_named_tests_exist() -> None:
    for cell in CELLS:
        if cell.test is None:
            continue
        path, _, function = cell.test.partition("::")
        functions = functions_of(ROOT / "tests" / path)
        assert function in functions, cell
        if cell.refused is not None:
            assert cell.refused in functions[function], cell
        if cell.case is not None:
            assert cell.case in {f"{method}-{name}" for name in FEATURES for method in METHODS}, cell


@pytest.mark.e2e
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.engine is not None], ids=cell_id)
def test_refusals_are_raised(model_dirs: Callable[[str], Path], cell: Cell) -> None:
    assert cell.engine is not None
    assert cell.refused is not None
    with pytest.raises((ValueError, FarspanError)) as caught:
        configure(model_dirs("llama"), additional_config={"farspan": cell.options}, **cell.engine)
    assert cell.refused in str(caught.value)
