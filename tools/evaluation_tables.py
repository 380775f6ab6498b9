"""The tables of docs/evaluation/needle.md, from the CSV files beside it: `python -m tools.evaluation_tables`.

`--write` puts them there.

Every folder of docs/evaluation with a sweep.csv (of `python -m benchmarks.needle_training.sweep`) gives one block of
tables.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from farspan.tables import read_rows

from tools.regions import Region

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLES = Region(
    DOCS / "evaluation" / "needle.md",
    "<!-- tables: python -m tools.evaluation_tables -->\n",
    "<!-- end of tables -->\n",
)

Row = dict[str, str]


def read_sweep(path: Path) -> list[Row]:
    """The rows of a sweep.csv, shortest prompt first."""
    return sorted(read_rows(path), key=lambda row: int(row["length"]))


def tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def chunk_name(row: Row) -> str:
    return tokens(int(row["chunk"])) if row["chunk"] != "0" else "whole"


def grid(rows: Sequence[Row], first: Sequence[str], name: Callable[[Row], Sequence[str]], column: str) -> str:
    """One Markdown table of a column: a line a name, a column a length."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    lines = [
        f"| {' | '.join([*first, *(tokens(int(n)) for n in lengths)])} |",
        f"|{' --- |' * len(first)}{' ---: |' * len(lengths)}",
    ]
    cells = {(*name(row), row["length"]): format_cell(row, column) for row in rows}
    for head in dict.fromkeys(tuple(name(row)) for row in rows):
        lines.append(f"| {' | '.join([*head, *(cells.get((*head, n), '') for n in lengths)])} |")
    return "\n".join(lines) + "\n"


def format_cell(row: Row, column: str) -> str:
    """A number as the tables show it; `coverage` with the worst head behind it."""
    if row[column] == "":
        return ""
    value = float(row[column])
    if column == "accuracy":
        return f"{100 * value:.1f} ({float(row['density']):.3f})"
    if column == "coverage":
        return f"{value:.3f} ({float(row['coverage_worst_head']):.3f})"
    return f"{value:.2g}" if column == "logprob_change" else f"{value:.3f}"


def format_tables(title: str, rows: Sequence[Row]) -> str:
    """All tables of one sweep."""
    # Tables of earlier versions have runs with repair too.
    open_loop = [row for row in rows if row.get("loop", "0") == "0"]
    plain = [row for row in open_loop if (row["min_budget"], float(row["tau"])) == ("1024", 0.1)]
    budgets = [row for row in open_loop if row["chunk"] == "0" and float(row["tau"]) == 0.1]
    budgets = [row for row in budgets if row["gamma"] in ("0.95", "0.9")]
    taus = [row for row in open_loop if (row["chunk"], row["min_budget"], row["gamma"]) == ("0", "1024", "0.95")]
    loops = [row for row in rows if row.get("loop") == "1"]
    chunked = [row for row in plain if row["chunk"] != "0"]

    def by_gamma(row: Row) -> tuple[str, str]:
        return row["gamma"], chunk_name(row)

    def by_budget(row: Row) -> tuple[str, str]:
        return row["gamma"], row["min_budget"]

    def by_tau(row: Row) -> tuple[str]:
        return (row["tau"],)

    counts = sorted({int(row["count"]) for row in rows})
    dense = min(float(row["dense_accuracy"]) for row in rows)
    parts = [
        f"### {title}\n\n{' or '.join(map(str, counts))} questions a cell, seeds from {rows[0]['seed']}; dense: "
        f"{'at least ' if dense < 1 else ''}{100 * dense:.1f} % at every length.\n",
        "γ and chunk, min budget 1024: accuracy in % (density).\n",
        grid(plain, ("γ", "chunk"), by_gamma, "accuracy"),
        "Coverage, mean over heads (worst head).\n",
        grid(plain, ("γ", "chunk"), by_gamma, "coverage"),
    ]
    if chunked:
        parts += [
            "Drift between chunk sizes: share of the blocks that the whole prompt in one chunk reads too "
            "(both over either).\n",
            grid(chunked, ("γ", "chunk"), by_gamma, "overlap"),
        ]
    if len({by_budget(row) for row in budgets}) > 2:
        budgets = sorted(budgets, key=lambda row: (int(row["length"]), -float(row["gamma"]), int(row["min_budget"])))
        parts += [
            "Min budget (as the paper's table 10), whole prompt: accuracy in % (density); coverage (worst head).\n",
            grid(budgets, ("γ", "min budget"), by_budget, "accuracy"),
            grid(budgets, ("γ", "min budget"), by_budget, "coverage"),
        ]
    if len({by_tau(row) for row in taus}) > 1:
        taus = sorted(taus, key=lambda row: (int(row["length"]), float(row["tau"])))
        parts += [
            "τ (as the paper's table 6), γ 0.95, whole prompt: accuracy in % (density), then the share of query-aware "
            "heads.\n",
            grid(taus, ("τ",), by_tau, "accuracy"),
            grid(taus, ("τ",), by_tau, "query_aware"),
        ]
    if loops:
        parts += [
            "With repair and raised budgets (`coverage_rows` 8), γ 0.95, chunks of 2K: coverage (worst head).\n",
            grid(loops, ("γ", "min budget"), by_budget, "coverage"),
        ]
    return "\n".join(parts)


def all_tables() -> str:
    """What stands between the page's markers; a folder is titled by the first line of its README.md."""
    folders = sorted(path.parent for path in (DOCS / "evaluation").glob("*/sweep.csv"))
    titles = [(folder / "README.md").read_text().splitlines()[0].removeprefix("# ") for folder in folders]
    return "\n".join(
        format_tables(title, read_sweep(folder / "sweep.csv")) for title, folder in zip(titles, folders, strict=True)
    )


if __name__ == "__main__":
    sys.exit(TABLES.serve("python -m tools.evaluation_tables", all_tables))
