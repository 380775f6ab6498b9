"""The documentation names what exists: paths and modules."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "integration": "farspan",
    "scheduler": "farspan.scheduler",
    "engine_ext": "farspan.engine_ext",
    "kernels": "farspan.kernels",
}
"""Folder -> the name that it imports as."""
PACKAGES = {
    ".".join([name, *init.parent.relative_to(ROOT / room).parts]): init.parent.relative_to(ROOT).as_posix()
    for room, name in ROOMS.items()
    for init in (ROOT / room).rglob("__init__.py")
}
"""Import name -> folder."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = [".ci", "benchmarks", "docs", "examples", "requirements", "tests", "tools", *ROOMS]
# A path below one of the folders (`*` stands for any name), or to a Python file or page below any folder.
BELOW = rf"(?:{'|'.join(map(re.escape, FOLDERS))})/(?:[\w.*-]+/?)*"
SOURCE = r"[\w-]+/(?:[\w.*-]+/)*[\w.*-]+\.(?:py|md)\b"
PATH = re.compile(rf"(?<![\w./-])(?:{BELOW}|{SOURCE})")
MODULE = re.compile(r"python -m ((?:farspan|benchmarks|tools)(?:\.\w+)*)")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_of(page: Path) -> Iterator[str]:
    """What a page has in backticks and code blocks."""
    text = page.read_text()
    yield from re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`[^`\n]+`", text)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_paths_exist(page: Path) -> None:
    for code in code_of(page):
        for name in PATH.findall(code):
            assert list(ROOT.glob(name.rstrip("./"))), f"{page_id(page)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_modules_exist(page: Path) -> None:
    folders = PACKAGES | {"benchmarks": "benchmarks", "tools": "tools"}
    for module in MODULE.findall(page.read_text()):
        package = next(name for name in sorted(folders, key=len, reverse=True) if f"{module}.".startswith(f"{name}."))
        rest = module[len(package) + 1 :].replace(".", "/")
        place = ROOT / folders[package] / (rest or "__main__")
        assert place.with_suffix(".py").exists(), f"{page_id(page)} runs {module}"


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        repeats = next(number for number in range(99) if (f"{name}-{number}" if number else name) not in found)
        found.add(f"{name}-{repeats}" if repeats else name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page_id(page)} links to {target}"
        if anchor:
            assert anchor in anchors_of(found), f"{page_id(page)} links to {target}"


def test_every_page_is_found_from_the_first_one() -> None:
    """From docs/README.md, over other pages."""
    reached, waiting = set[Path](), [ROOT / "docs" / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#:\s]+)", page.read_text())]
    assert [page_id(page) for page in PAGES if page not in reached] == []
