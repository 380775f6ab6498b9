"""Pictures of `farspan audit`: what answers lose against what is read, and the coverage of every head."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farspan.evaluation.audit_results import DRIFT_LIMIT, AuditRow
from farspan.evaluation.report_plots import draw_heads, save, tokens


def draw_audit(rows: Sequence[AuditRow], heads: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Draw `audit.png` and, for each length, `coverage-LENGTH.png`; returns the files. heads: rows of HEAD_COLUMNS."""
    import matplotlib

    matplotlib.use("Agg")
    files = [draw_drift(rows, out / "audit.png")]
    for length in dict.fromkeys(row.length for row in rows):
        panels: dict[str, list[dict[str, Any]]] = {}
        for head in heads:
            if head["length"] == length:
                panels.setdefault(f"gamma {head['gamma']:g}, {tokens(length)}", []).append(dict(head))
        path = out / f"coverage-{length}.png"
        files.append(draw_heads(panels, "coverage", "share of the attention mass kept", "viridis", path))
    return files


def draw_drift(rows: Sequence[AuditRow], path: Path) -> Path:
    """Drift with two standard errors, and the worst head, against density; a line a length, a marker a gamma."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.6), layout="constrained")
    for length in dict.fromkeys(row.length for row in rows):
        mine = sorted((row for row in rows if row.length == length), key=lambda row: row.density)
        density = [row.density for row in mine]
        errors = [2 * row.drift_error for row in mine]
        left.errorbar(density, [row.drift for row in mine], errors, marker="o", capsize=3, label=tokens(length))
        right.plot(density, [row.worst_head - row.gamma for row in mine], marker="o", label=tokens(length))
        for row in mine:
            left.annotate(f"{row.gamma:g}", (row.density, row.drift), (4, 5), textcoords="offset points", fontsize=7)
    left.axhline(DRIFT_LIMIT, color="#888888", linewidth=1, linestyle="--")
    right.axhline(0, color="#888888", linewidth=1, linestyle="--")
    left.set(xlabel="density (blocks read / causal blocks)", ylabel="drift (nats/token), 2 standard errors")
    right.set(xlabel="density (blocks read / causal blocks)", ylabel="worst head's coverage - gamma")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(title="prompt", fontsize=8)
    return save(figure, path)
