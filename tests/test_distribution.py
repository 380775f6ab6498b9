"""What is distributed: a source archive that builds, a wheel with what it should hold, and the container's files."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from farspan.vllm_compat.versions import version_refusal

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"integration": "farspan", "kernels": "farspan/kernels", "engine_ext": "farspan/engine_ext"}
ROOMS["scheduler"] = "farspan/scheduler"
DOCKERFILE = ROOT / "examples" / "Dockerfile"
USE = """
import importlib.metadata, sys, farspan, farspan.engine_ext.config, farspan.needle
(entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="farspan")
print(farspan.__file__, entry.value, farspan.needle.model_dir(), farspan.__version__)
print(farspan.parse_config({"preset": "fast"}).prefill.gamma)
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
print(AttentionBackendEnum.CUSTOM.get_class().__module__, sys.modules["farspan.engine_ext.backend"].__file__)
"""


def copied_by_the_container() -> list[str]:
    """Files and folders of the repository from which the container builds the wheel."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return [name for line in lines for name in line.split()]


def build(kind: str, source: Path, out: Path) -> Path:
    """Run the build backend of pyproject.toml, without an environment of its own."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the container copies, and no more."""
    folder = tmp_path_factory.mktemp("source")
    for name in copied_by_the_container():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, which must then be complete."""
    out = tmp_path_factory.mktemp("dist")
    archive = build("sdist", source, out / "sdist")
    with tarfile.open(archive) as files:
        files.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    return build("wheel", unpacked, out / "wheel")


def test_the_wheel_holds_the_rooms_and_no_more(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / room).as_posix()}"
        for room, package in ROOMS.items()
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as files:
        found = {name for name in files.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in files.namelist() if ".dist-info/" in name}
    assert found == expected
    assert "farspan/py.typed" in found
    assert metadata >= {"METADATA", "entry_points.txt", "LICENSE"}


def test_an_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert f"{tmp_path / 'site'}/farspan/__init__.py" in run.stdout
    assert (next((tmp_path / "cache" / "farspan").iterdir()) / "model.safetensors").is_file()
    assert "farspan.plugin:register" in run.stdout
    *_, gamma, backend, file = run.stdout.split()
    assert gamma == "0.9"
    assert backend == "farspan.engine_ext.backend"
    assert file.startswith(str(tmp_path / "site"))


def test_the_container_builds_on_a_version_that_is_served() -> None:
    versions = re.findall(r"^ARG VLLM_VERSION=v(\S+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert len(versions) == 1
    assert version_refusal(versions[0]) is None
    for name in copied_by_the_container():
        assert (ROOT / name).exists()
