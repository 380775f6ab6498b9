"""The parts of a report's page that all models have."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """A heading, what to see, and pictures."""

    title: str
    text: str
    pictures: tuple[Path, ...]


def head_sections(panels: dict[str, list[dict[str, Any]]], out: Path) -> list[Section]:
    """Density, pattern and coverage per layer and head."""
    from farspan.evaluation.report_plots import draw_heads, draw_patterns

    sections = [
        Section(
            "Density per layer and head",
            "Share of the causal blocks that each query head read; dense attention reads all of them (1). Rows "
            "where all heads agree sit at the min budget.",
            (draw_heads(panels, "density", "density (fraction)", "viridis", out / "density.png"),),
        )
    ]
    # The selection by tile rows has no patterns.
    if any(float(row["divergence"] or 0) > 0 for rows in panels.values() for row in rows):
        text = (
            "Query-aware heads select blocks for each block of queries; vertical-slash heads extend the columns and "
            "diagonals of the last queries. The square root of the Jensen-Shannon divergence between the true and "
            "the pooled block distribution decides: below τ a head is query-aware."
        )
        pictures = (
            draw_patterns(panels, out / "patterns.png"),
            draw_heads(panels, "divergence", "sqrt(JSD), natural log", "magma_r", out / "divergence.png"),
        )
        sections.append(Section("Pattern per layer and head", text, pictures))
    measured = {title: rows for title, rows in panels.items() if rows[0]["coverage"] not in (None, "")}
    if measured:
        text = "Attention mass that the read blocks hold, mean over rows spread evenly over the prompt."
        picture = draw_heads(measured, "coverage", "coverage (fraction)", "cividis", out / "coverage.png")
        sections.append(Section("Coverage per layer and head", text, (picture,)))
    return sections


def accuracy_density_section(rows: list[dict[str, Any]], out: Path) -> Section:
    """The picture of sweep rows."""
    from farspan.evaluation.report_plots import draw_accuracy_density

    return Section(
        "Accuracy against density",
        "Each marker is one set of options on one prompt length; density is the mean over layers and heads.",
        (draw_accuracy_density(rows, out / "accuracy_density.png"),),
    )
