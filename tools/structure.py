"""The generated part of docs/structure.md: `python -m tools.structure`, `--write` puts it there.

The diagram is made from the imports in the source, the lines of packages and modules are the first lines of their
docstrings. A test compares both with the page.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.link_tree import ROOT
from tools.regions import Region

STRUCTURE = Region(
    ROOT / "docs" / "structure.md", "<!-- structure: python -m tools.structure -->\n", "<!-- end of structure -->\n"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS: dict[str, str] = {folder: name for name, folder in PROJECT["package-dir"].items()}
"""Folder -> the name that it imports as."""
OUTSIDE = ("benchmarks", "benchmarks/needle_training", "tools")
"""Folders of packages that are not in the wheel."""


@dataclass(frozen=True)
class Import:
    """One import statement's module, by its full name."""

    module: str
    is_deferred: bool
    """Inside a function or for type checkers only: it runs later, or never."""


def sources(room: str) -> list[Path]:
    """The Python files of a folder of the repository."""
    return sorted((ROOT / room).rglob("*.py"))


def imports_of(path: Path, room: str) -> Iterator[Import]:
    """Every module that a file imports, anywhere in it; relative ones resolved.

    `from a import b` counts as `a.b`, since b may be a module.
    """
    package = [ROOMS.get(room, room), *path.relative_to(ROOT / room).parent.parts]

    def visit(node: ast.AST, is_deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, is_deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", is_deferred) for alias in node.names)
        is_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_deferred or is_later)

    yield from visit(ast.parse(path.read_text()), False)


def folder_of(package: str) -> str:
    """Where a package's files are, relative to the repository."""
    room = max((name for name in ROOMS.values() if f"{package}.".startswith(f"{name}.")), key=len)
    (folder,) = (folder for folder, name in ROOMS.items() if name == room)
    return "/".join([folder, *package.removeprefix(room).strip(".").split(".")]).rstrip("/")


def package_of(module: str) -> str | None:
    """The listed package that a module belongs to, or None if it is none of ours."""
    inside = [name for name in PROJECT["packages"] if f"{module}.".startswith(f"{name}.")]
    return max(inside, key=len) if inside else None


def edges() -> dict[tuple[str, str], bool]:
    """(importing package, imported package) -> whether no import between them runs when the importer is loaded."""
    found: dict[tuple[str, str], bool] = {}
    for room in ROOMS:
        for path in sources(room):
            parts = [ROOMS[room], *path.relative_to(ROOT / room).with_suffix("").parts]
            importer = package_of(".".join(parts).removesuffix(".__init__"))
            assert importer is not None, f"{path} is in no package of pyproject.toml"
            for each in imports_of(path, room):
                imported = package_of(each.module)
                if imported is not None and imported != importer:
                    pair = importer, imported
                    found[pair] = found.get(pair, True) and each.is_deferred
    return found


def diagram() -> str:
    """Packages by room, and who imports whom: a solid arrow when the importer is loaded, a dotted one later."""
    lines = ["```mermaid", "flowchart TD"]
    nodes = {name: name.replace(".", "_") for name in PROJECT["packages"]}
    for folder, room in ROOMS.items():
        mine = [name for name in nodes if folder_of(name).split("/")[0] == folder]
        lines.append(f'  subgraph {folder}["{folder}/"]')
        lines += [f'    {nodes[name]}["{short_name(name, room)}"]' for name in mine]
        lines.append("  end")
    for (importer, imported), is_deferred in sorted(edges().items()):
        lines.append(f"  {nodes[importer]} {'-.->' if is_deferred else '-->'} {nodes[imported]}")
    return "\n".join([*lines, "```", ""])


def short_name(package: str, room: str) -> str:
    return package if package == room else package.removeprefix(f"{room}.")


def headline(path: Path) -> str:
    """The first line of a module's docstring, which says what the module is for."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    line = text.partition("\n")[0]
    if not line:
        raise ValueError(f"{path} has no docstring; its first line belongs on the structure page")
    return line


def describe(folder: str) -> str:
    """A package and its modules, one line each."""
    modules = [path for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py"]
    lines = [f"**`{folder}/`** — {headline(ROOT / folder / '__init__.py')}", ""]
    lines += [f"- `{path.stem}`: {headline(path)}" for path in modules]
    return "\n".join([*lines, ""])


def structure() -> str:
    """What is between the page's markers."""
    folders = [folder_of(name) for name in PROJECT["packages"]]
    order = sorted(folders, key=lambda folder: (list(ROOMS).index(folder.split("/")[0]), folder))
    return "\n".join([diagram(), *map(describe, [*order, *OUTSIDE])])


if __name__ == "__main__":
    sys.exit(STRUCTURE.serve("python -m tools.structure", structure))
