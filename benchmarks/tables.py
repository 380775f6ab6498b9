"""The tables of docs/numbers.md and the one of the README, from the rows: `python -m benchmarks.tables --write`.

One table per benchmark, of its latest run, or of each case's latest run on one kind of GPU: one line per case, one
column per variant, and for each of our variants its speed in multiples of the baseline's. A peer that this run of a
case left out is shown from the last run that has it, in brackets, with its speed in multiples of the baseline's in that
run. Stages of a call are only in the CSV, since peers are compared with whole calls.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.real_table import format_real
from benchmarks.record import ROOT, Row, environments_of, read_rows
from tools.regions import Region

README = ROOT / "README.md"
NUMBERS = Region(
    ROOT / "docs" / "numbers.md", "<!-- numbers: python -m benchmarks.tables -->\n", "<!-- end of numbers -->\n"
)
REAL = Region(README, "<!-- real checkpoints: python -m benchmarks.tables -->\n", "<!-- end of real checkpoints -->\n")
README_RULE = "farspan-g0.95"
"""The rule of flex with default options, in the README's table of real checkpoints."""
STAGES = ("-select", "-attention")
# First tokens: shapes with synthetic heads, trained checkpoints on texts, and turns of either.
SHAPES = r"n\d+-b1-(llama8b(-16layers)?|qwen[\d.]+b)-bf16$"
CHECKPOINTS = r"n\d+-b1-.*-(code|prose)-bf16$"
TURNS = r"q\d+-n\d+-b1-.*-bf16$"


@dataclass(frozen=True)
class Table:
    """One table of docs/numbers.md."""

    benchmark: str
    metric: str
    title: str
    baseline: str = "fa3"
    cases: str = ""
    """Regular expression of the cases shown; all when empty."""
    variants: str = ""
    """Regular expression of the variants shown; all when empty."""
    quality: tuple[str, ...] = ()
    """Metrics of our variants to show with the time: the column p50 of their rows."""
    case_by_case: bool = False
    """Whether each case has its own latest run, on the kind of GPU that the last run of all was on."""


TABLES = (
    Table(
        "ttft",
        "time",
        "Time to the first token in vLLM, half of the layers of an 8B shape with synthetic heads",
        cases=r"n(8192|16384|32768|65536|131072)-b1-llama8b-16layers-",
        case_by_case=True,
    ),
    Table(
        "ttft",
        "time",
        "Time to the first token in vLLM, shapes of small models with synthetic heads",
        cases=r"n(8192|16384|32768|65536|131072)-b1-qwen[\d.]+b-",
        case_by_case=True,
    ),
    Table(
        "ttft",
        "time",
        "Time to the first token in vLLM, all layers of an 8B shape with synthetic heads",
        cases=r"n131072-b1-llama8b-bf16$",
    ),
    Table(
        "ttft",
        "time",
        "Time to the first token in vLLM, real checkpoints that read whole prompts of text",
        cases=CHECKPOINTS,
        case_by_case=True,
    ),
    Table(
        "ttft",
        "time",
        "Time to the first token in vLLM, short turns (q tokens) behind a cached prefix",
        cases=TURNS,
        case_by_case=True,
    ),
    Table(
        "stages",
        "time",
        "What the host takes for a step of a short prompt, all layers of a 0.5B shape, where flex is dense",
        cases=r"n\d+-b1-qwen0\.5b-bf16-",
        case_by_case=True,
    ),
    Table("tpot", "time", "Time between tokens in vLLM", cases=r".*-llama8b-bf16"),
    Table("tpot", "time", "Time between tokens in vLLM", cases=r".*-llama8b-l32-bf16", variants=r"(?!farspan-star)"),
    Table(
        "serve",
        "time",
        "Many requests at once over HTTP, sent by vllm bench serve: until the last is done, and per request",
        case_by_case=True,
    ),
    Table("prefill_dense", "time", "Dense prefill on paged KV, one attention call", case_by_case=True),
    Table(
        "prefill_lists",
        "time",
        "Sparse prefill over random block lists of a density, one attention call without selection",
        case_by_case=True,
    ),
    Table("decode", "time", "Decode on paged KV, one attention call in CUDA graphs", case_by_case=True),
    Table(
        "prefill_block_sparse",
        "time",
        "Static block-sparse attention, both directions, one call",
        cases=r"n(1024|8192|32768|65536)-.*-d64-fp16$",
        quality=("density",),
    ),
    Table(
        "string_e2e",
        "time",
        "Shifted positions (STRING) on and off, both in our portable kernel: prompt and 16 tokens in vLLM",
        baseline="farspan-triton",
        cases="total-",
        variants=r"farspan-(triton|string)$",
    ),
    Table(
        "string_e2e",
        "time",
        "Shifted positions (STRING) on in our kernel, off in FlashAttention 3: prompt and 16 tokens in vLLM",
        baseline="farspan",
        cases="total-",
        variants=r"farspan(-string-auto)?$",
    ),
    Table(
        "offload_fits",
        "time",
        "Offload on and off where requests fit: first token, time between tokens, an 8B shape",
        baseline="farspan",
        cases=r"(ttft|tpot)-n(1024|102400|131072)-b1-llama8b-bf16",
    ),
    Table(
        "offload_prefill",
        "time",
        "First token with nearly all pages in host memory, a quarter of the layers of 8B",
        baseline="farspan",
        cases=r"ttft-n(32768|131072|262144)-b1-llama8b-8layers-",
    ),
    Table(
        "offload_decode",
        "time",
        "Decode of one layer with all pages in host memory, in CUDA graphs, beside one large copy of them",
        baseline="copy",
        cases=r"n\d+-b\d-hq32-hkv8-d128-bf16$",
        variants=r"(farspan-offload-cold|copy)$",
    ),
)


def matching_rows(rows: Sequence[Row], table: Table) -> list[Row]:
    """Rows of the table's cases, variants and metrics, of all runs."""
    return [
        row
        for row in rows
        if row.benchmark == table.benchmark
        and row.metric in (table.metric, *table.quality)
        and re.match(table.cases, row.case)
        and re.match(table.variants, row.variant)
        and not row.variant.endswith(STAGES)
    ]


def latest_run(rows: Sequence[Row], table: Table) -> list[Row]:
    """Rows that the table shows: of the run that was appended last, or for each case of the last that has it."""
    matching = matching_rows(rows, table)
    if not matching:
        return []
    if not table.case_by_case:
        return [row for row in matching if row.run_id == matching[-1].run_id]
    matching = [row for row in matching if row.gpu == matching[-1].gpu]
    latest = {row.case: row.run_id for row in matching}
    return [row for row in matching if row.run_id == latest[row.case]]


def peers_before(rows: Sequence[Row], table: Table) -> list[Row]:
    """Of cases that have their own latest run: rows of peers that it left out, and of the baseline in their last run.

    A ratio is of two rows of one run, so that a peer whose last run has no baseline is left out.
    """
    latest = latest_run(rows, table)
    shown = {(row.case, row.variant) for row in latest}
    of_run: dict[tuple[str, str], dict[str, Row]] = {}
    for row in matching_rows(rows, table):
        if table.case_by_case and row.metric == table.metric and row.gpu == latest[-1].gpu:
            of_run.setdefault((row.case, row.run_id), {})[row.variant] = row
    found: dict[tuple[str, str], list[Row]] = {}
    for (case, _), variants in of_run.items():
        for name, row in variants.items():
            is_missing = (case, name) not in shown and any(each.case == case for each in latest)
            if is_missing and not name.startswith("farspan") and table.baseline in variants:
                found[case, name] = [row, variants[table.baseline]]
    return [row for pair in found.values() for row in pair]


def format_table(rows: Sequence[Row], table: Table, before: Sequence[Row] = ()) -> str:
    """Format one run as Markdown; rows are not empty. before: what `peers_before` gives."""
    medians = {(row.case, row.variant, row.metric): float(row.p50) for row in rows}
    timed = [row for row in rows if row.metric == table.metric]
    cases = list(dict.fromkeys(row.case for row in timed))
    earlier = {}
    for row, baseline_row in zip(before[::2], before[1::2], strict=True):
        speed = float(baseline_row.p50) / float(row.p50)
        earlier[row.case, row.variant] = f"[{as_cell(float(row.p50))}, {speed:.2f}×]"
    names = {row.variant for row in timed} | {name for _, name in earlier}
    variants = sorted(names, key=lambda name: (not name.startswith("farspan"), name))
    ours = [name for name in variants if name.startswith("farspan") and name != table.baseline]
    header = [*variants, *(f"{name}, times {table.baseline}'s speed" for name in ours)]
    header += [f"{name}, {metric}" for name in ours for metric in table.quality if has_metric(rows, name, metric)]
    lines = [
        f"**{table.title}**, {timed[0].unit} ({where_and_when([*rows, *before])})",
        "",
        *(
            [f"In brackets: of an earlier run, and its speed in multiples of {table.baseline}'s in that run.", ""]
            * bool(before)
        ),
        f"| case | {' | '.join(header)} |",
        f"| --- |{' ---: |' * len(header)}",
    ]
    for case in cases:

        def median(name: str, metric: str, case: str = case) -> float | None:
            return medians.get((case, name, metric))

        cells = [as_cell(median(name, table.metric)) or earlier.get((case, name), "") for name in variants]
        baseline = median(table.baseline, table.metric)
        for name in ours:
            time = median(name, table.metric)
            cells.append(f"{baseline / time:.2f}×" if baseline and time else "")
        for name in ours:
            cells += [
                as_cell(median(name, metric)) for metric in table.quality if has_metric(rows, name, metric)
            ]  # fmt: skip
        lines.append(f"| `{case}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def where_and_when(rows: Sequence[Row]) -> str:
    """`NVIDIA H200, vLLM 0.32.0, torch 2.11, Triton 3.6; run 20261128-6ea0dc`, once for each GPU and versions.

    Of several runs, each case's is in the CSV.
    """
    return "; ".join(
        f"{environment}; run{'s' * (len(runs) > 1)} {', '.join(runs)}"
        for environment, runs in environments_of(rows).items()
    )


def has_metric(rows: Sequence[Row], variant: str, metric: str) -> bool:
    return any((row.variant, row.metric) == (variant, metric) for row in rows)


def as_cell(number: float | None) -> str:
    """Four digits and no exponent; empty for None."""
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def format_numbers(rows: Sequence[Row]) -> str:
    """Format what docs/numbers.md has between its markers."""
    shown = [(table, latest_run(rows, table)) for table in TABLES]
    tables = [format_table(latest, table, peers_before(rows, table)) for table, latest in shown if latest]
    return "\n".join([*filter(None, [format_real(rows)]), *tables])


def format_readme(rows: Sequence[Row]) -> str:
    """Format what the README has between its markers."""
    return format_real(rows, README_RULE)


if __name__ == "__main__":
    rows = read_rows()
    status = NUMBERS.serve("python -m benchmarks.tables", lambda: format_numbers(rows))
    sys.exit(status or REAL.serve("python -m benchmarks.tables", lambda: format_readme(rows)))
