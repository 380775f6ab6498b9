"""The README's numbers, from the rows: `python -m benchmarks.readme_table`, `--write` puts them into README.md.

For each benchmark, the latest run: one line a case, one column a variant, and how many times the named baseline's
speed ours is.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.record import ROOT, Row, read_rows

README = ROOT / "README.md"
BEGIN = "<!-- numbers: python -m benchmarks.readme_table -->\n"
END = "<!-- end of numbers -->\n"


@dataclass(frozen=True)
class Table:
    """What the README shows of a benchmark."""

    benchmark: str
    metric: str
    title: str
    baseline: str = "fa3"


TABLES = (
    Table("ttft", "time", "Time to the first token in vLLM"),
    Table("tpot", "time", "Time between tokens in vLLM"),
    Table("prefill_flex", "time", "Dynamic sparse prefill, one attention call, selection included"),
    Table("prefill_dense", "time", "Dense prefill on paged KV, one attention call"),
    Table("decode", "time", "Decode on paged KV, one attention call in CUDA graphs"),
    Table("prefill_block_sparse", "time", "Static block-sparse attention, one call"),
    Table("string_e2e", "time", "Shifted positions (STRING) in vLLM"),
)


def latest_run(rows: Sequence[Row], table: Table) -> list[Row]:
    """Rows of the table's metric from the run that was appended last."""
    matching = [row for row in rows if (row.benchmark, row.metric) == (table.benchmark, table.metric)]
    return [row for row in matching if row.run_id == matching[-1].run_id]


def format_table(rows: Sequence[Row], table: Table) -> str:
    """Format one run as Markdown; rows are not empty."""
    cases = list(dict.fromkeys(row.case for row in rows))
    variants = sorted({row.variant for row in rows}, key=lambda name: (not name.startswith("farspan"), name))
    medians = {(row.case, row.variant): float(row.p50) for row in rows}
    first = rows[0]
    lines = [
        f"**{table.title}**, {first.unit} ({first.gpu}, vLLM {first.vllm or 'none'}, torch {first.torch}, "
        f"Triton {first.triton}; run {first.run_id})",
        "",
        f"| case | {' | '.join(variants)} | faster than {table.baseline} |",
        f"| --- |{' ---: |' * (len(variants) + 1)}",
    ]
    for case in cases:
        times = [f"{medians[case, name]:.4g}" if (case, name) in medians else "" for name in variants]
        ours = [medians[case, name] for name in variants if name.startswith("farspan") and (case, name) in medians]
        baseline = medians.get((case, table.baseline))
        ratio = f"{baseline / min(ours):.2f}×" if baseline and ours else ""
        lines.append(f"| `{case}` | {' | '.join(times)} | {ratio} |")
    return "\n".join(lines) + "\n"


def format_numbers(rows: Sequence[Row]) -> str:
    """Format what stands between the README's two markers."""
    benchmarks = {row.benchmark for row in rows}
    return "\n".join(format_table(latest_run(rows, t), t) for t in TABLES if t.benchmark in benchmarks)


def replace_numbers(readme: str, numbers: str) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "the README has lost its markers"
    assert end, "the README has lost its markers"
    return f"{before}{begin}{numbers}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    numbers = format_numbers(read_rows())
    if parser.parse_args().write:
        README.write_text(replace_numbers(README.read_text(), numbers))
    else:
        print(numbers)


if __name__ == "__main__":
    main()
