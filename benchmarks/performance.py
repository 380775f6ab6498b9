"""docs/performance.md and its pictures, from the rows: `python -m benchmarks.performance`; `--write` puts them there.

Each goal is held against the latest run that measured its case; the pictures show one run or, for single calls, the
latest run of each case on the kind of GPU that was measured last.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from farspan.command import run_command
from farspan.scheduler.rates import GPUS

from benchmarks.record import ROOT, Row, read_rows
from benchmarks.svg_plot import Panel, Series, draw
from benchmarks.tables import CHECKPOINTS, SHAPES, TURNS
from tools.regions import Region

PROGRAM = "python -m benchmarks.performance"
GOALS = Region(
    ROOT / "docs" / "performance.md", "<!-- goals: python -m benchmarks.performance -->\n", "<!-- end of goals -->\n"
)
FIGURES = ROOT / "docs" / "figures"
LABELS = {
    "farspan": "farspan",
    "farspan-portable": "farspan, portable",
    "farspan-fp8": "farspan, fp8 KV",
    "fa3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
    "flashinfer": "FlashInfer",
    "triton_attn": "vLLM's Triton",
    "sdpa": "PyTorch SDPA",
}
"""Of the variants that pictures show, in this order."""
Medians = dict[tuple[str, str], float]
"""By variant and metric, of one case in one run."""


@dataclass(frozen=True)
class Goal:
    """A quantity of each case of a benchmark, and its bound."""

    what: str
    benchmark: str
    cases: str
    """Regular expression, from the beginning of the case's name."""
    value: Callable[[str, Medians], float | None]
    """Of a case's name and medians; None where a row is missing."""
    bound: float
    unit: str = ""
    at_least: bool = True
    """False where the bound is the largest value allowed."""
    worst: bool = False
    """Whether only the case that is worst is shown."""

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def of(variant: str, metric: str = "time") -> Callable[[str, Medians], float | None]:
    """The median itself."""
    return lambda case, medians: medians.get((variant, metric))


def ratio(above: str, below: str, metric: str = "time") -> Callable[[str, Medians], float | None]:
    """Of two variants' medians."""

    def value(case: str, medians: Medians) -> float | None:
        parts = medians.get((above, metric)), medians.get((below, metric))
        return None if parts[0] is None or parts[1] is None else parts[0] / parts[1]

    return value


def kept_promise(case: str, medians: Medians) -> float | None:
    """Density, as the case names it, times FlashAttention 3's time over ours."""
    found = ratio("fa3", "farspan")(case, medians)
    return None if found is None else found * density_of(case)


def density_of(case: str) -> float:
    """0.3 of `…-density0.3-shared`."""
    match = re.search(r"-density([\d.]+)", case)
    assert match is not None, case
    return float(match[1])


def kept_promise_of_flex(case: str, medians: Medians) -> float | None:
    """As `kept_promise`, of a call with its selection, by the measured density."""
    density, found = medians.get(("farspan-g0.9", "density")), ratio("fa3", "farspan-g0.9")(case, medians)
    return None if density is None or found is None else found * density


def over_the_faster_dense(case: str, medians: Medians) -> float | None:
    """Flex's time over that of FLASH_ATTN or our dense prefill, whichever takes less."""
    found = [ratio("farspan-g0.95", dense)(case, medians) for dense in ("fa3", "farspan")]
    return max((each for each in found if each is not None), default=None)


def time_in(variant: str, units: float) -> Callable[[str, Medians], float | None]:
    """A median in another unit than ms. units: how many of it are a millisecond."""

    def value(case: str, medians: Medians) -> float | None:
        found = medians.get((variant, "time"))
        return None if found is None else found * units

    return value


def surest_drift(case: str, medians: Medians) -> float | None:
    """Mean drift at gamma 0.95 and two standard errors more, in nats a token."""
    drift, error = medians.get((FLEX, "drift")), medians.get((FLEX, "drift_error"))
    return None if drift is None or error is None else drift + 2 * error


def over_the_oracle(case: str, medians: Medians) -> float | None:
    """Flex's density over the tile oracle's, whose heads keep no more than those of flex."""
    found = medians.get((FLEX, "density")), medians.get(("oracle-g0.95", "density"))
    return None if found[0] is None or found[1] is None else found[0] / found[1]


FLEX = "farspan-g0.95"
WHOLE_8B = "n131072-b1-llama8b-bf16$"
D128, DENSE = "b1-hq32-hkv8-d128-bf16$", "Dense prefill, our kernel: times FlashAttention 3's speed"
ALL = (
    Goal(DENSE, "prefill_dense", rf"n(8192|32768|65536|131072)-{D128}", ratio("fa3", "farspan"), 1.0, "×"),
    Goal(f"{DENSE}, heads of 64", "prefill_dense", r"n\d+-b1-hq32-hkv8-d64-", ratio("fa3", "farspan"), 0.95, "×"),
    Goal(
        "Dense prefill, our portable kernel", "prefill_dense", rf"n(8192|32768|65536|131072)-{D128}",
        of("farspan-portable", "rate"), 500, " TFLOP/s",
    ),
    Goal(
        "Sparse attention without selection: density × FlashAttention 3's time / ours", "prefill_lists",
        r"(n65536|q16384-n131072)-.*-d128-.*density0.3$", kept_promise, 0.85,
    ),
    Goal(
        "The same at a density of 0.1", "prefill_lists", r"(n65536|q16384-n131072)-.*-d128-.*density0.1$",
        kept_promise, 0.70,
    ),
    Goal(
        "Flex γ 0.9 with selection, synthetic heads: density × FlashAttention 3's time / ours", "prefill_flex",
        r"(n65536|n131072|q8192-n131072)-", kept_promise_of_flex, 0.70,
    ),
    Goal(
        "Decode in CUDA graphs", "decode", r"(n131072-b1|n32768-b8|n8192-b32)-", of("farspan", "bandwidth"), 2.8,
        " TB/s",
    ),
    Goal(
        "One request of 8K", "decode", "n8192-b1-", time_in("farspan", 1e3), 18, " µs", at_least=False,
    ),
    Goal(
        "Decode on an fp8 KV cache: times bf16's speed", "decode_fp8", r"n\d+-b\d+-", ratio("farspan", "farspan-fp8"),
        1.7, "×",
    ),
    Goal(
        "Static block-sparse, batch 16, 8 heads of 64, density 0.55 %", "prefill_block_sparse",
        "n65536-b16-hq8-hkv8-d64-fp16$", of("farspan-sparse"), 2.0, " ms", at_least=False,
    ),
    Goal(
        "STRING, one call: time over FlashAttention 3's without a shift", "string_e2e", "prefill-",
        ratio("farspan-string", "fa3"), 1.015, at_least=False,
    ),
    Goal(
        "STRING, whole requests: time over that without a shift", "string_e2e",
        r"total-n(65536|131072)-", ratio("farspan-string-auto", "farspan"), 1.015, at_least=False,
    ),
    Goal(
        "Flex γ 0.95, real checkpoints: share of the heads below γ − 0.01, the worst case", "real", ".*",
        of(FLEX, "below_gamma_0.01"), 0.01, at_least=False, worst=True,
    ),
    Goal("The same below γ − 0.05", "real", ".*", of(FLEX, "below_gamma_0.05"), 0.0, at_least=False, worst=True),
    Goal(
        "The same of heads in each chunk", "real", ".*", of(FLEX, "chunks_below_gamma_0.05"), 0.0, at_least=False,
        worst=True,
    ),
    Goal(
        "The same: drift + 2 standard errors, nats/token, the worst case", "real", ".*", surest_drift, -0.005,
        worst=True,
    ),
    Goal(
        "The same: standard error of the drift, nats/token, the largest", "real", ".*", of(FLEX, "drift_error"), 0.001,
        at_least=False, worst=True,
    ),
    Goal(
        "The same: density over the tile oracle's, the worst case", "real", ".*", over_the_oracle, 1.25,
        at_least=False, worst=True,
    ),
    Goal(
        "Choosing blocks for a chunk: time over FlashAttention 3's on it", "select", r"(n8192|q\d+)-.*-bf16$",
        ratio("farspan", "fa3"), 0.15, at_least=False,
    ),
    Goal(
        "Host, selection and attention of a layer and chunk", "host_side", ".*", of("farspan-flex"), 0.15, " ms",
        at_least=False,
    ),
    Goal(
        "First token, all layers of 8B, γ 0.9", "ttft", WHOLE_8B, time_in("farspan-g0.9", 1e-3), 4.6, " s",
        at_least=False,
    ),
    Goal(
        "The same, the goal for Hopper's kernels", "ttft", WHOLE_8B, time_in("farspan-g0.9", 1e-3), 4.2, " s",
        at_least=False,
    ),
    Goal(
        "First token, dense: time over FLASH_ATTN's, the worst case", "ttft", r"n\d", ratio("farspan", "fa3"), 1.0,
        at_least=False, worst=True,
    ),
    *(
        Goal(
            f"First token, flex γ 0.95{what}: time over the faster dense one's, the worst case", "ttft", cases,
            over_the_faster_dense, 1.02, at_least=False, worst=True,
        )
        for what, cases in (("", SHAPES), (", real checkpoints", CHECKPOINTS), (", short turns", TURNS))
    ),
    Goal(
        "Many requests over HTTP: median over FLASH_ATTN's", "serve", r"(total|ttft|tpot)-\d",
        ratio("farspan", "fa3"), 1.02, at_least=False,
    ),
    Goal(
        "The same of flex γ 0.95: over the faster dense one's, the worst case", "serve", r"(total|ttft|tpot)-\d",
        over_the_faster_dense, 1.02, at_least=False, worst=True,
    ),
)  # fmt: skip


def latest(rows: Sequence[Row], benchmark: str, cases: str = "") -> dict[str, list[Row]]:
    """By case, the rows of the last run that has it, of cases that match; only of GPUs of the kind measured last."""
    rows = [row for row in rows if row.benchmark == benchmark and row.gpu != "cpu" and re.match(cases, row.case)]
    rows = [row for row in rows if row.gpu == rows[-1].gpu]
    last = {row.case: row.run_id for row in rows}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.run_id == last[row.case]:
            found.setdefault(row.case, []).append(row)
    return found


def medians_of(rows: Sequence[Row]) -> Medians:
    return {(row.variant, row.metric): float(row.p50) for row in rows}


def measured(goal: Goal, rows: Sequence[Row]) -> list[tuple[str, float, Row]]:
    """Case, value and a row of its run, of each case that has one; of goals about the worst case, that alone.

    Of the kind of GPU that the benchmark ran on last, so that all lines of a goal are of one.
    """
    found = []
    for case, mine in latest(rows, goal.benchmark, goal.cases).items():
        value = goal.value(case, medians_of(mine))
        if value is not None:
            found.append((case, value, mine[0]))
    if goal.worst and found:
        found = [(min if goal.at_least else max)(found, key=lambda each: each[1])]
    return found


def format_goals(rows: Sequence[Row]) -> str:
    """One line per goal and case; goals without rows last."""
    lines = ["| | case | measured | goal | | GPU, run |", "| --- | --- | ---: | ---: | --- | --- |"]
    missing = []
    for goal in ALL:
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}{goal.unit}"
        what = goal.what
        for case, value, row in measured(goal, rows):
            verdict = "reached" if goal.reached(value) else "**missed**"
            where = f"{gpu_of(row)}, {row.run_id}"
            lines.append(f"| {what} | `{case}` | {value:.3g}{goal.unit} | {bound} | {verdict} | {where} |")
            what = ""
        if what:
            missing.append(f"| {what} | | not measured | {bound} | | |")
    return "\n".join([*lines, *missing]) + "\n"


def gpu_of(row: Row) -> str:
    """`H200`, as in farspan.scheduler.rates."""
    return next((name for name in GPUS if name in row.gpu), row.gpu)


def lines_of(
    cases: dict[str, list[Row]], pattern: str, x_of: Callable[[str, Medians, str], float], metric: str
) -> tuple[Series, ...]:
    """A line for each variant that LABELS has, of the cases that match. x_of: of case, medians and variant."""
    found: dict[str, list[tuple[float, float]]] = {}
    for case, rows in cases.items():
        if not re.match(pattern, case):
            continue
        medians = medians_of(rows)
        for variant in LABELS:
            if (y := medians.get((variant, metric))) is not None:
                found.setdefault(variant, []).append((x_of(case, medians, variant), y))
    return tuple(Series(LABELS[name], tuple(sorted(found[name])), colour_of(name)) for name in LABELS if name in found)


def colour_of(variant: str) -> int:
    return list(LABELS).index(variant)


def length_of(case: str, medians: Medians, variant: str) -> float:
    return float(case[1:].partition("-")[0])


def megabytes_of(case: str, medians: Medians, variant: str) -> float:
    """What a decode call reads: 10**6 bytes."""
    return float(f"{medians[variant, 'bandwidth'] * medians[variant, 'time'] * 1e3:.4g}")


def kilo(length: float) -> str:
    return f"{length / 1024:g}K"


def flat(label: str, series: Sequence[Series], y: float) -> Series:
    """A limit, as wide as the series."""
    xs = [x for each in series for x, _ in each.points]
    return Series(label, ((min(xs), y), (max(xs), y)), dashed=True)


def attention_time(rows: Sequence[Row]) -> str:
    """Time of one call by length, and by density in multiples of FlashAttention 3's."""
    dense, lists = (latest(rows, name) for name in ("prefill_dense", "prefill_lists"))
    gpu = gpu_of(next(iter(dense.values()))[0])
    by_length = Panel(
        f"Dense prefill of a whole prompt ({gpu})", "prompt, tokens", "one call, ms",
        lines_of(dense, rf"n\d+-{D128}", length_of, "time"), kilo,
    )  # fmt: skip
    spots: dict[str, list[tuple[float, float]]] = {"farspan": [], "farspan-portable": []}
    for case, mine in lists.items():
        for variant, places in spots.items():
            if (value := ratio(variant, "fa3")(case, medians_of(mine))) is not None and "-d128-" in case:
                places.append((density_of(case), value))
    marks = tuple(
        Series(LABELS[name], tuple(sorted(places)), colour_of(name), joined=False)
        for name, places in spots.items()
        if places
    )
    densities = sorted({x for series in marks for x, _ in series.points})
    ideal = Series("density", tuple((x, x) for x in densities), dashed=True)
    dense_line = flat("FA3, all keys", marks, 1.0)
    by_density = Panel(
        f"Sparse prefill, 2K to 64K queries on 16K to 128K ({gpu})", "density", "time over FlashAttention 3's",
        (*marks, ideal, dense_line),
    )  # fmt: skip
    return draw([by_length, by_density])


def roofline(rows: Sequence[Row]) -> str:
    """Decode's bytes per second and prefill's operations per second, with what the chip has."""
    panels = []
    for benchmark in ("decode", "decode_fp8"):
        cases = latest(rows, benchmark)
        gpu = gpu_of(next(iter(cases.values()))[0])
        marks = lines_of(cases, ".*", megabytes_of, "bandwidth")
        marks = tuple(replace(each, joined=False) for each in marks)
        limit = flat("memory", marks, GPUS[gpu].hbm_gbs / 1e3)
        title = f"Decode in CUDA graphs ({gpu})"
        panels.append(Panel(title, "keys and values read, MB", "TB/s", (*marks, limit), "{:.0f}".format))
    dense = latest(rows, "prefill_dense")
    gpu = gpu_of(next(iter(dense.values()))[0])
    rates = lines_of(dense, rf"n\d+-{D128}", length_of, "rate")
    limit = flat("tensor cores", rates, GPUS[gpu].peak_tflops)
    panels.append(Panel(f"Dense prefill ({gpu})", "prompt, tokens", "TFLOP/s", (*rates, limit), kilo))
    return draw(panels)


def pictures(rows: Sequence[Row]) -> dict[str, str]:
    """By file name in docs/figures, its text."""
    return {"attention_time.svg": attention_time(rows), "roofline.svg": roofline(rows)}


def write() -> None:
    rows = read_rows()
    GOALS.write(format_goals(rows))
    for name, text in pictures(rows).items():
        (FIGURES / name).write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page's table and the pictures")
    if parser.parse_args().write:
        return run_command(PROGRAM, write)
    return run_command(PROGRAM, lambda: print(format_goals(read_rows())))


if __name__ == "__main__":
    sys.exit(main())
