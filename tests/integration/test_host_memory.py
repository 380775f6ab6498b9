"""Free host memory within the limits of control groups, of both versions, wherever a limit stands."""

from pathlib import Path

import pytest
from farspan.host_memory import available_bytes

GIB = 1 << 30
FREE = 500 * GIB


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc" / "meminfo", f"MemTotal:  600000000 kB\nMemAvailable: {FREE // 1024} kB")
    return tmp_path / "proc"


def group(folder: Path, limit: int | str, used: int, cached: int, *, version: int) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    write(folder / names[0], limit)
    write(folder / names[1], used)
    stat = f"{names[2]}inactive_file {cached // 2}\n{names[2]}active_file {cached - cached // 2}\nshmem 7"
    write(folder / "memory.stat", stat)


def test_no_limit(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "cgroup") == FREE
    write(proc / "self" / "cgroup", "0::/a")
    group(tmp_path / "cgroup" / "a", "max", 3 * GIB, GIB, version=2)
    assert available_bytes(proc, tmp_path / "cgroup") == FREE


@pytest.mark.parametrize("place", ["", "slurm", "slurm/job_7", "slurm/job_7/step_0"], ids=["root", "all", "job", "own"])
def test_a_limit_around_the_process(proc: Path, tmp_path: Path, place: str) -> None:
    """As Slurm sets it for a job: some groups have no memory files of their own."""
    write(proc / "self" / "cgroup", "0::/slurm/job_7/step_0")
    group(tmp_path / "cgroup" / place, 100 * GIB, 30 * GIB, 0, version=2)
    assert available_bytes(proc, tmp_path / "cgroup") == 70 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_pages_of_files_are_free(proc: Path, tmp_path: Path, version: int) -> None:
    """Weights that were just read fill a container's limit, and make room for what a process allocates."""
    root = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    write(proc / "self" / "cgroup", "4:cpu,memory:/box\n9:pids:/box" if version == 1 else "0::/box")
    group(root / "box", 64 * GIB, 60 * GIB, 50 * GIB, version=version)
    assert available_bytes(proc, tmp_path / "cgroup") == 54 * GIB


def test_a_container_sees_its_group_as_the_root(proc: Path, tmp_path: Path) -> None:
    write(proc / "self" / "cgroup", "0::/../../docker/123")
    group(tmp_path / "cgroup", 64 * GIB, 70 * GIB, 0, version=2)
    assert available_bytes(proc, tmp_path / "cgroup") == 0


def test_this_machine() -> None:
    assert 0 < available_bytes() < 1 << 50
