"""Pictures of `farspan report`: density, pattern and coverage per layer and head, masks, accuracy against density."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

READ, UNREAD = "#1f4e79", "#e3e7ec"
PANEL = 3.4
"""Inches of one panel's side."""


@dataclass(frozen=True)
class HeadMask:
    """The blocks that one head reads over a whole prompt."""

    title: str
    blocks: torch.Tensor
    """[query blocks, KV blocks] bool."""
    block_tokens: int


def draw_heads(panels: dict[str, list[dict[str, Any]]], column: str, label: str, cmap: str, path: Path) -> Path:
    """One heatmap of `column` per panel (title -> rows with layer, head and the column), on one colour scale.

    The number stands in each cell where there is room.
    """
    from matplotlib import pyplot as plt

    grids = {title: _grid(rows, column) for title, rows in panels.items()}
    lowest = min(value for grid in grids.values() for row in grid for value in row)
    highest = max(value for grid in grids.values() for row in grid for value in row)
    layers, heads = len(next(iter(grids.values()))), len(next(iter(grids.values()))[0])
    size = (1.6 + len(grids) * max(PANEL, 0.42 * heads + 0.6), max(2.4, 0.32 * layers + 1.2))
    figure, axes = plt.subplots(1, len(grids), figsize=size, squeeze=False, layout="constrained", sharey=True)
    image = None
    for axis, (title, grid) in zip(axes.flat, grids.items(), strict=True):
        image = axis.imshow(grid, cmap=cmap, vmin=lowest, vmax=max(highest, lowest + 1e-3), aspect="auto")
        axis.set(title=title, xlabel="query head")
        axis.set_xticks(_ticks(heads), [str(i) for i in _ticks(heads)])
        axis.set_yticks(_ticks(layers), [str(i) for i in _ticks(layers)])
        if layers * heads <= 128:
            _write_cells(axis, grid, image)
    axes.flat[0].set_ylabel("layer")
    assert image is not None
    figure.colorbar(image, ax=list(axes.flat), label=label)
    return save(figure, path)


def draw_patterns(panels: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Per panel a stacked bar a layer: heads that select query by query, and by columns and diagonals (figure 8).

    A head that changed between chunks counts for the share of its chunks.
    """
    from matplotlib import pyplot as plt

    size = (1.0 + 3.8 * len(panels), 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        grid = _grid(rows, "query_aware")
        aware = [sum(row) for row in grid]
        rest = [len(row) - sum(row) for row in grid]
        layers = range(len(grid))
        axis.bar(layers, rest, color=READ, label="vertical-slash")
        axis.bar(layers, aware, bottom=rest, color="#e08a1e", label="query-aware")
        axis.set(title=title, xlabel="layer")
        axis.set_xticks(_ticks(len(grid)), [str(i) for i in _ticks(len(grid))])
    axes.flat[0].set_ylabel("heads")
    # Beside the bars: they fill the panels.
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return save(figure, path)


def draw_masks(masks: Sequence[HeadMask], path: Path) -> Path:
    """The masks of single heads (figure 9), axes in thousands of tokens."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    columns = min(len(masks), 3)
    rows = -(-len(masks) // columns)
    size = (0.6 + PANEL * columns, 0.7 + (PANEL + 0.4) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(masks) :]:
        axis.set_visible(False)
    for axis, mask in zip(axes.flat, masks, strict=False):
        num_blocks = mask.blocks.shape[0]
        causal = torch.ones_like(mask.blocks).tril()
        end = num_blocks * mask.block_tokens / 1024
        axis.imshow(
            (causal.int() + mask.blocks.int()).numpy(),
            cmap=ListedColormap(["white", UNREAD, READ]),
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=(0, end, end, 0),
        )
        axis.set_title(mask.title, fontsize=9)
        axis.set_xlabel("key position (K tokens)")
        axis.set_ylabel("query position (K tokens)")
    figure.legend(
        handles=[Patch(color=READ, label="read"), Patch(color=UNREAD, label="skipped")],
        loc="outside upper right",
        ncols=2,
        frameon=False,
    )
    return save(figure, path)


def draw_accuracy_density(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Accuracy against density: a marker a row of the sweep table, a colour a min budget, a shape a length."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, axis = plt.subplots(figsize=(8.2, 4.2), layout="constrained")
    budgets = sorted({int(row["min_budget"]) for row in rows})
    lengths = sorted({int(row["length"]) for row in rows})
    colours = plt.get_cmap("viridis")
    markers = "osD^vP*X"
    for row in rows:
        place = budgets.index(int(row["min_budget"])) / max(len(budgets) - 1, 1)
        axis.scatter(
            float(row["density"]),
            100 * float(row["accuracy"]),
            color=colours(0.9 * place),
            marker=markers[lengths.index(int(row["length"])) % len(markers)],
            s=42,
            alpha=0.75,
        )
    dense = {float(row["dense_accuracy"]) for row in rows}
    axis.axhline(100 * sum(dense) / len(dense), color="#888888", linewidth=1, linestyle="--")
    axis.set(xlabel="density (blocks read / causal blocks)", ylabel="exact match (%)", xscale="log", ylim=(-4, 105))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.grid(alpha=0.3, which="both")
    handles = [
        Line2D([], [], linestyle="", marker="s", color=colours(0.9 * i / max(len(budgets) - 1, 1)), label=f"{b} tokens")
        for i, b in enumerate(budgets)
    ]
    first = figure.legend(handles=handles, title="min budget", loc="outside right upper", frameon=False)
    figure.add_artist(first)
    shapes = [
        Line2D([], [], linestyle="", marker=markers[i % len(markers)], color="#555555", label=tokens(n))
        for i, n in enumerate(lengths)
    ]
    shapes.append(Line2D([], [], color="#888888", linewidth=1, linestyle="--", label="dense"))
    figure.legend(handles=shapes, title="prompt", loc="outside right lower", frameon=False)
    return save(figure, path)


def tokens(length: int) -> str:
    """A number of tokens as a person writes it: 8K, 131000."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def save(figure: Any, path: Path) -> Path:
    """Write a PNG that depends on nothing but the picture, and forget the figure."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


def _grid(rows: Sequence[dict[str, Any]], column: str) -> list[list[float]]:
    """[layers][heads] of one column."""
    layers = sorted({int(row["layer"]) for row in rows})
    by_layer = {
        layer: sorted((int(r["head"]), float(r[column])) for r in rows if int(r["layer"]) == layer) for layer in layers
    }
    return [[value for _, value in by_layer[layer]] for layer in layers]


def _ticks(count: int) -> list[int]:
    """At most about 16 of `range(count)`."""
    return list(range(0, count, -(-count // 16)))


def _write_cells(axis: Any, grid: list[list[float]], image: Any) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:.3f}".removeprefix("0")
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if is_dark else "black")
