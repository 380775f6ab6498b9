"""The README's table of real checkpoints, from the rows of benchmark `real`."""

from collections.abc import Sequence

from benchmarks.record import Row

TITLE = "**Sparse prefill of real checkpoints and texts** (benchmark `real`; beside dense prefill of the same prompts)"
COLUMNS = ("density", "coverage", "worst head", "heads < γ−.01", "heads < γ−.05", "drift ± s.e., nats/token", "changed")


def format_real(rows: Sequence[Row]) -> str:
    """One table a case: a line a rule, of its latest run. Nothing where there are no rows.

    What a rule changes is held against dense prefill in its own run. Rows of a CPU, of few and short pieces, are left
    out where there are others.
    """
    mine = [row for row in rows if row.benchmark == "real"]
    mine = [row for row in mine if row.gpu != "cpu"] or mine
    cases = list(dict.fromkeys(row.case for row in mine if row.metric == "drift"))
    return "\n".join([TITLE, "", *(format_case(mine, case) for case in cases)]) if cases else ""


def format_case(rows: Sequence[Row], case: str) -> str:
    latest = {row.variant: row.run_id for row in rows if row.case == case}
    of_case = [row for row in rows if row.case == case and row.run_id == latest[row.variant]]
    answers = {row.variant: row.p50 for row in rows if row.case == f"{case}-niah_single"}
    found = {(row.variant, row.metric): float(row.p50) for row in of_case}
    first, runs = of_case[0], ", ".join(dict.fromkeys(row.run_id for row in of_case))
    header = [*COLUMNS, *(["needles"] if answers else [])]
    lines = [
        f"`{case}` ({first.gpu}, vLLM {first.vllm}; run {runs})",
        "",
        f"| rule | {' | '.join(header)} |",
        f"| --- |{' ---: |' * len(header)}",
    ]
    if dense := answers.get("farspan"):
        lines.append(f"| dense | 1 | 1 | 1 | 0.0 % | 0.0 % | 0 | 0.00 % | {100 * float(dense):.0f} % |")
    for variant in dict.fromkeys(row.variant for row in of_case if row.metric == "drift"):

        def of(metric: str, variant: str = variant) -> float:
            return found[variant, metric]

        cells = [
            f"{of('density'):.3f}",
            f"{of('coverage'):.3f}",
            f"{of('coverage_min'):.3f}",
            f"{of('below_gamma_0.01'):.1%}".replace("%", " %"),
            f"{of('below_gamma_0.05'):.1%}".replace("%", " %"),
            f"{of('drift'):+.4f} ± {of('drift_error'):.4f}".replace("-", "−"),
            f"{of('changed'):.2%}".replace("%", " %"),
        ]
        if answers:
            cells.append(f"{100 * float(answers[variant]):.0f} %" if variant in answers else "")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
