"""Host memory that a process can still take, within the limits of the control groups that it is in."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Controller:
    """What one version of Linux's control groups calls its files."""

    limit: str
    usage: str
    caches: tuple[str, ...]
    """In memory.stat: pages of files, such as weights that were read, which the system drops when memory is wanted."""


V2 = Controller("memory.max", "memory.current", ("inactive_file", "active_file"))
V1 = Controller("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def boot_id(proc: Path = PROC) -> str:
    """A name of the running machine that no other has; containers share it with the machine that runs them."""
    return (proc / "sys/kernel/random/boot_id").read_text().strip()


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Of the machine, or of the group of processes that may take least."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, controller in own_groups(proc, cgroups):
        try:
            limit = (folder / controller.limit).read_text().strip()
            used = int((folder / controller.usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            # Groups without a limit of their own have no such files.
            continue
        if limit != "max":
            cached = sum(int(stat.get(name, 0)) for name in controller.caches)
            available = min(available, max(int(limit) - used + min(cached, used), 0))
    return available


def own_groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, Controller]]:
    """The groups that this process is in, and those around them: a job's limit may stand in any."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, names, path = line.split(":", 2)
        if number == "0" and not names:
            root, controller = cgroups, V2
        elif "memory" in names.split(","):
            root, controller = cgroups / "memory", V1
        else:
            continue
        # In a container the path may be one outside of it; the container's own group is the root then.
        folder = root.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        while folder != root:
            yield folder, controller
            folder = folder.parent
        yield root, controller
