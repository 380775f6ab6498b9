"""The package `farspan` as a plain folder of links to the rooms, for programs that cannot use the editable install.

mypy does not follow an editable install's import hook, and a benchmark machine may have nothing but this repository.
"""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_link_tree(site: Path) -> Path:
    """Make or renew `site/farspan` and its metadata (vLLM finds the plugin by its entry point).

    site: a folder of ours alone; what the repository no longer has is removed from `site/farspan`.
    Returns `site`, to be put on PYTHONPATH or MYPYPATH.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = project["tool"]["setuptools"]["package-dir"]
    package = site / "farspan"
    package.mkdir(parents=True, exist_ok=True)
    links = {path.name: path for path in (ROOT / rooms["farspan"]).iterdir() if path.name != "__pycache__"}
    links |= {name.partition(".")[2]: ROOT / folder for name, folder in rooms.items() if "." in name}
    for stale in package.iterdir():
        if stale.is_symlink() and stale.name not in links:
            stale.unlink()
    for name, target in links.items():
        link = package / name
        if not link.is_symlink() or Path(os.readlink(link)) != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    metadata = site / f"farspan-{project['project']['version']}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: farspan\nVersion: {project['project']['version']}\n"
    )
    groups = {"console_scripts": project["project"]["scripts"], **project["project"]["entry-points"]}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return site
