"""Who may import whom: kernels nothing of ours, engine_ext kernels, scheduler three modules, integration everything."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tools import structure
from tools.structure import sources

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "kernels": "farspan.kernels",
    "engine_ext": "farspan.engine_ext",
    "scheduler": "farspan.scheduler",
    "integration": "farspan",
}
MAY_IMPORT = {
    "kernels": ("farspan.kernels",),
    "engine_ext": ("farspan.engine_ext", "farspan.kernels"),
    "scheduler": (
        "farspan.scheduler",
        "farspan.engine_ext.config",
        "farspan.engine_ext.plan",
        "farspan.engine_ext.errors",
    ),
    "integration": ("farspan",),
}
THIRD_PARTY = {
    "kernels": {"torch", "triton", "numpy", "safetensors"},
    "scheduler": {"msgspec", "vllm"},
}
# Decoded in processes that have neither a GPU nor a use for torch.
WITHOUT_TORCH = ("engine_ext/config.py", "engine_ext/errors.py", "engine_ext/plan.py", "integration/__init__.py")


def imports_of(path: Path, room: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    return (each.module for each in structure.imports_of(path, room))


def is_within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in allowed)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_it_may(room: str) -> None:
    for path in sources(room):
        for module in imports_of(path, room):
            if is_within(module, ("farspan",)):
                assert is_within(module, MAY_IMPORT[room]), f"{path.relative_to(ROOT)} imports {module}"


def test_no_modules_import_each_other() -> None:
    """No circle of modules, imports for type checking and in functions included."""
    modules = {}
    for room, name in ROOMS.items():
        for path in sources(room):
            parts = [name, *path.relative_to(ROOT / room).with_suffix("").parts]
            modules[".".join(parts).removesuffix(".__init__")] = (path, room)

    def innermost(name: str) -> str | None:
        """The module that an imported name is, or is in; None for those of others."""
        parts = name.split(".")
        return next((n for n in (".".join(parts[:k]) for k in range(len(parts), 0, -1)) if n in modules), None)

    graph = {
        module: {innermost(name) for name in imports_of(path, room)} - {module, None}
        for module, (path, room) in modules.items()
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("room", THIRD_PARTY)
def test_room_needs_no_other_packages(room: str) -> None:
    for path in sources(room):
        for module in imports_of(path, room):
            top = module.partition(".")[0]
            known = top == "farspan" or top in sys.stdlib_module_names or top in THIRD_PARTY[room]
            assert known, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_messages_and_options_need_no_torch(name: str) -> None:
    path = ROOT / name
    room = name.partition("/")[0]
    assert not [module for module in imports_of(path, room) if is_within(module, ("torch", "triton", "vllm"))]


def test_only_the_scheduler_itself_imports_vllm() -> None:
    importers = {
        path.name
        for path in sources("scheduler")
        for module in imports_of(path, "scheduler")
        if is_within(module, ("vllm",))
    }
    assert importers == {"scheduler.py"}


def test_only_vllm_compat_knows_versions() -> None:
    for room in ROOMS:
        for path in sources(room):
            if "vllm_compat" not in path.parts:
                assert "vllm.__version__" not in path.read_text(), path


def test_every_folder_with_code_is_packaged() -> None:
    """A subpackage left out of pyproject.toml works from a checkout and is missing from the wheel."""
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join([ROOMS[room], *init.parent.relative_to(ROOT / room).parts])
        for room in ROOMS
        for init in (ROOT / room).rglob("__init__.py")
    }
    assert listed == found


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_what_the_wheel_leaves_out(room: str) -> None:
    for path in sources(room):
        for module in imports_of(path, room):
            assert not is_within(module, ("benchmarks", "tools", "tests", "examples")), f"{path} imports {module}"


def test_only_one_module_writes_csv() -> None:
    """Readers and writers of tables share their refusals: `farspan.tables`."""
    folders = [*ROOMS, "benchmarks", "tools", "examples"]
    importers = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) and any(alias.name == "csv" for alias in node.names)
    }
    assert importers == {"integration/tables.py"}
