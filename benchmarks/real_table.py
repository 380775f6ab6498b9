"""The table of real checkpoints, from the rows of benchmark `real`."""

from collections.abc import Sequence

from benchmarks.record import Row, environments_of

TITLE = "**Sparse prefill of real checkpoints and texts** (benchmark `real`), beside dense prefill of the same prompts"
COLUMNS = ("density", "coverage", "worst head", "heads < γ−.01", "heads < γ−.05", "drift ± s.e., nats/token", "changed")

QUESTIONS = ("niah_single", "niah_multikey_1", "niah_multivalue")
"""Tasks that are asked: one needle, one of several keys, four of one key."""
ORDER = ("farspan-g", "farspan-flexprefill-g", "sink-local", "oracle-g")
"""Of the rules in a case's lines, by the beginnings of their names."""
NEEDLES = "needles: one / of several / four, %"


def format_real(rows: Sequence[Row], rule: str = "") -> str:
    """One table: for each case a line a rule, of its latest run. Nothing where there are no rows.

    What a rule changes is held against dense prefill in its own run. Rows of a CPU, of few and short pieces, are left
    out where there are others. rule: the only one shown, without answers; all if empty.
    """
    mine = [row for row in rows if row.benchmark == "real" and rule in ("", row.variant)]
    mine = [row for row in mine if row.gpu != "cpu"] or mine
    cases = sorted({row.case for row in mine if row.metric == "drift"}, key=by_label_and_length)
    if not cases:
        return ""
    has_answers = not rule and any(row.metric == "accuracy" for row in mine)
    header = ["case", "rule", *COLUMNS, *([NEEDLES] if has_answers else []), "run"]
    shown = [row for case in cases for row in latest_of_case(mine, case)]
    environments = environments_of(shown, versions=("vllm",))
    where = (
        [next(iter(environments))]
        if len(environments) == 1
        else [f"{environment} ({', '.join(runs)})" for environment, runs in environments.items()]
    )
    lines = [
        f"{TITLE}; {'; '.join(where)}",
        "",
        f"| {' | '.join(header)} |",
        f"| --- | --- |{' ---: |' * (len(header) - 3)} --- |",
        *(line for case in cases for line in lines_of_case(mine, case, has_answers)),
    ]
    return "\n".join(lines) + "\n"


def by_label_and_length(case: str) -> tuple[str, int]:
    length, _, label = case.removeprefix("n").partition("-")
    return label, int(length)


def by_rule(variant: str) -> tuple[int, str]:
    return next((place for place, name in enumerate(ORDER) if variant.startswith(name)), len(ORDER)), variant


def latest_of_case(rows: Sequence[Row], case: str) -> list[Row]:
    """Of each variant, the rows of its latest run."""
    latest = {row.variant: row.run_id for row in rows if row.case == case}
    return [row for row in rows if row.case == case and row.run_id == latest[row.variant]]


def lines_of_case(rows: Sequence[Row], case: str, has_answers: bool) -> list[str]:
    of_case = latest_of_case(rows, case)
    latest = {row.variant: row.run_id for row in of_case}
    answers = answers_of(rows, case) if has_answers else {}
    found = {(row.variant, row.metric): float(row.p50) for row in of_case}
    lines = []
    if dense := answers.get("farspan"):
        lines.append(["dense", "1", "1", "1", "0.0 %", "0.0 %", "0", "0.00 %", *dense])
    variants = {row.variant for row in of_case if row.metric == "drift"}
    for variant in sorted(variants, key=by_rule):

        def of(metric: str, variant: str = variant) -> float:
            return found[variant, metric]

        cells = [
            variant,
            f"{of('density'):.3f}",
            f"{of('coverage'):.3f}",
            f"{of('coverage_min'):.3f}",
            f"{of('below_gamma_0.01'):.1%}".replace("%", " %"),
            f"{of('below_gamma_0.05'):.1%}".replace("%", " %"),
            f"{of('drift'):+.4f} ± {of('drift_error'):.4f}".replace("-", "−"),
            f"{of('changed'):.2%}".replace("%", " %"),
        ]
        run = latest[variant]
        if has_answers:
            found_needles, asked = answers.get(variant, ("", run))
            cells.append(found_needles)
            run += f"; needles {asked}" * (asked != run)
        lines.append([*cells, run])
    return [f"| `{case}` | {' | '.join(cells)} |" for cells in lines]


def answers_of(rows: Sequence[Row], case: str) -> dict[str, tuple[str, str]]:
    """By variant, the share of the needles found in each of QUESTIONS, in percent, and the run, its latest."""
    tasks = [f"{case}-{task}" for task in QUESTIONS]
    asked = [row for row in rows if row.case in tasks]
    latest = {row.variant: row.run_id for row in asked}
    found = {
        (row.variant, row.case): f"{100 * float(row.p50):.0f}" for row in asked if row.run_id == latest[row.variant]
    }
    return {name: (" / ".join(found.get((name, task), "–") for task in tasks), run) for name, run in latest.items()}
