"""The structure page is that of the source."""

from pathlib import Path

import pytest

from tools.structure import ROOT, STRUCTURE, edges, headline, imports_of, package_of, structure


def test_the_page_is_that_of_the_source() -> None:
    assert STRUCTURE.is_current(structure()), "run: python -m tools.structure --write"


def test_every_module_has_its_line() -> None:
    text = structure()
    for folder in ("kernels", "engine_ext", "scheduler", "integration", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                assert f"- `{path.stem}`: {headline(path)}" in text, path


def test_imports_are_resolved_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import structure as module

    monkeypatch.setattr(module, "ROOT", tmp_path)
    path = tmp_path / "kernels" / "flex" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom . import select\nfrom ..tiles import Tiles\n"
        "if TYPE_CHECKING:\n    import a\ndef f():\n    import b.c\nclass D:\n    import e\n"
    )
    found = {each.module: each.is_deferred for each in imports_of(path, "kernels")}
    assert found == {
        "typing.TYPE_CHECKING": False,
        "farspan.kernels.flex.select": False,
        "farspan.kernels.tiles.Tiles": False,
        "a": True,
        "b.c": True,
        "e": False,
    }


def test_arrows_are_between_the_packages_that_hold_the_modules() -> None:
    assert package_of("farspan.kernels.flex.select.flex_block_lists") == "farspan.kernels.flex"
    assert package_of("farspan.cli") == "farspan"
    assert package_of("torch.nn") is None
    found = edges()
    assert found["farspan.engine_ext", "farspan.kernels"] is False
    assert found["farspan", "farspan.evaluation"] is True
    assert not [pair for pair in found if pair[0].startswith("farspan.kernels") and pair[1] == "farspan.engine_ext"]


def test_a_module_without_a_docstring_is_named(tmp_path: Path) -> None:
    path = tmp_path / "silent.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"silent\.py has no docstring"):
        headline(path)
