"""The diagram of packages in docs/design.md, made from the imports; `python -m tools.import_diagram --write` writes it.

An arrow leads from a package to one that a module of it imports, type checking and imports in functions included.
"""

import argparse
import ast
from collections.abc import Container, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "design.md"
BEGIN = "<!-- diagram: python -m tools.import_diagram -->\n"
END = "<!-- end of diagram -->\n"
ROOMS = {
    "integration": "farspan",
    "scheduler": "farspan.scheduler",
    "engine_ext": "farspan.engine_ext",
    "kernels": "farspan.kernels",
}
"""Folder -> the name that it imports as, from the top floor down."""


def packages() -> dict[str, str]:
    """Import name -> folder of every package of the rooms."""
    found = {}
    for folder, name in ROOMS.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            inner = init.parent.relative_to(ROOT / folder).parts
            found[".".join([name, *inner])] = "/".join([folder, *inner])
    return found


def imported_modules(path: Path, package: str) -> Iterator[str]:
    """Every module, or name in a module, that a file of a package imports, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def innermost(module: str, known: Container[str]) -> str | None:
    """The innermost known package or module that a module, or a name in one, is in; None for those of others."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in known), None)


def arrows() -> list[tuple[str, str]]:
    """(folder, imported folder) of all packages, sorted by the order of `packages`."""
    known = packages()
    found = set()
    for name, folder in known.items():
        for path in (ROOT / folder).glob("*.py"):
            for module in imported_modules(path, name):
                target = innermost(module, known)
                if target is not None and target != name:
                    found.add((folder, known[target]))
    order = list(known.values())
    return sorted(found, key=lambda arrow: (order.index(arrow[0]), order.index(arrow[1])))


def diagram() -> str:
    """The packages and their arrows as a Mermaid block."""
    names = {folder: folder.replace("/", "_") for folder in packages().values()}
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {name}["{folder}"]' for folder, name in names.items()]
    lines += [f"    {names[source]} --> {names[target]}" for source, target in arrows()]
    return "\n".join([*lines, "```"]) + "\n"


def replace_diagram(page: str, block: str) -> str:
    """The page with the text between its two markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{PAGE.name} has lost its markers"
    assert end, f"{PAGE.name} has lost its markers"
    return f"{before}{begin}{block}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.import_diagram", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the diagram into docs/design.md")
    if parser.parse_args().write:
        PAGE.write_text(replace_diagram(PAGE.read_text(), diagram()))
    else:
        print(diagram(), end="")


if __name__ == "__main__":
    main()
