"""Two revisions are timed in turns, each with its own `farspan`, and their results are compared."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.compare_revisions import AFTER, BEFORE, Comparison, difference, environment_of, take_turns
from benchmarks.record import ROOT, BenchmarkError, Environment, Recorder, read_rows

ENVIRONMENT = Environment("20261122-abc", "2026-11-22", "0123", "some GPU", "1.2", "2.11", "3.6", "0.32")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.compare_revisions", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_both_sides_take_each_turn_in_no_fixed_order() -> None:
    calls: list[tuple[str, int]] = []

    def measure(side: str, repeat: int) -> int:
        calls.append((side, repeat))
        return repeat

    samples = take_turns(20, measure, seed=1)
    assert samples == {BEFORE: list(range(20)), AFTER: list(range(20))}
    assert [repeat for _, repeat in calls] == [repeat for repeat in range(20) for _ in range(2)]
    assert len({side for side, _ in calls[::2]}) == 2


def test_a_ratio_is_of_one_turn_and_both_sides_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(Recorder(tmp_path, ENVIRONMENT), Recorder(tmp_path, ENVIRONMENT))
    # The machine becomes twice as slow half-way: ratios of the medians would be 1.0, 2.0 or 4.0.
    comparison.add("decode-n1", {BEFORE: [1.0, 2.0, 2.0, 4.0], AFTER: [1.1, 2.2, 2.2, 4.4]})
    assert "after / before 1.100 [1.100, 1.100]" in capsys.readouterr().out
    assert [(row.benchmark, row.case, row.variant) for row in read_rows(tmp_path)] == [
        ("no_harm", "decode-n1", BEFORE),
        ("no_harm", "decode-n1", AFTER),
    ]


@pytest.mark.parametrize(
    ("after", "expected"),
    [([[3.0, 4.0]], 0.0), ([[3.0, 4.5]], 0.1), ([[3.0, float("nan")]], float("inf"))],
    ids=["same", "off", "nan"],
)
def test_results_differ_relative_to_a_row(after: Any, expected: float) -> None:
    assert difference(np.array([[3.0, 4.0]], dtype=np.float32), np.array(after, dtype=np.float32)) == pytest.approx(
        expected
    )


def test_another_farspan_than_the_checkouts_is_not_measured(tmp_path: Path) -> None:
    """A checkout whose link tree leads elsewhere."""
    tools = tmp_path / "checkout" / "tools"
    tools.mkdir(parents=True)
    (tools / "__init__.py").touch()
    (tools / "link_tree.py").write_text("def make_link_tree(site):\n    site.mkdir()\n")
    with pytest.raises(BenchmarkError, match="its farspan would be imported from"):
        environment_of(tmp_path / "checkout", tmp_path / "site")


def test_it_names_what_is_missing(tmp_path: Path) -> None:
    assert "is no checkout" in run_cli("--base", str(tmp_path), "--dry-run").stderr
    assert "--out DIR" in run_cli("--base", str(ROOT)).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_this_revision_gives_its_own_results() -> None:
    run = run_cli("--base", str(ROOT), "--dry-run", "--kernels")
    assert run.returncode == 0, run.stderr
    for kernel in ("decode", "prefill", "prefill_flex-g0.9", "write_kv"):
        assert f"{kernel}-" in run.stdout
    assert run.stdout.count("results differ by 0.0e+00") == 4


def test_a_base_with_other_results_is_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.py"
    adapter.write_text("def decode(batch):\n    return lambda: batch.query * 2\n")
    run = run_cli("--base", str(ROOT), "--base-adapter", str(adapter), "--dry-run", "--kernels")
    assert run.returncode == 1
    assert "results differ by" in run.stderr


@pytest.mark.parametrize("module", ["benchmarks.compare_worker", "benchmarks.engine_worker"])
def test_what_runs_under_both_revisions_imports_neither(module: str) -> None:
    """The `farspan` of a worker is that of the revision which it times, chosen by its PYTHONPATH."""
    code = f"import sys, importlib; importlib.import_module({module!r}); print('farspan' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
