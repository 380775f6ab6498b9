"""Pictures of `farspan eval`: accuracy against length, and the needle heatmap of depth and length."""

from collections.abc import Sequence
from pathlib import Path

from farspan.evaluation.results import Cell


def draw_plots(cells: Sequence[Cell], out: Path) -> list[Path]:
    """Draw what the cells allow into `out` as PNG, and return the files.

    `accuracy.png` has one panel per task and one line per method (mean over depths). `heatmap-METHOD-TASK.png` is drawn
    where a method and task have cells of at least two depths.
    """
    import matplotlib

    matplotlib.use("Agg")
    files = [_draw_accuracy(cells, out / "accuracy.png")]
    for method, task in dict.fromkeys((cell.method, cell.task) for cell in cells if cell.depth is not None):
        mine = [cell for cell in cells if (cell.method, cell.task) == (method, task) and cell.depth is not None]
        if len({cell.depth for cell in mine}) > 1:
            files.append(_draw_heatmap(mine, out / f"heatmap-{method}-{task}.png"))
    return files


def _draw_accuracy(cells: Sequence[Cell], path: Path) -> Path:
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1 + 3.2 * columns, 0.6 + 2.7 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for method in methods:
            by_length: dict[int, list[float]] = {}
            for cell in cells:
                if (cell.method, cell.task) == (method, task):
                    by_length.setdefault(cell.length, []).append(_percent(cell))
            lengths = sorted(by_length)
            means = [sum(by_length[length]) / len(by_length[length]) for length in lengths]
            axis.plot(lengths, means, marker="o", markersize=4, label=method)
        ticks = sorted({cell.length for cell in cells})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [_tokens(length) for length in ticks], minor=False)
        axis.set(title=task, xlabel="prompt (tokens)", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("accuracy (%)")
    axes.flat[0].legend()
    return _save(figure, path)


def _draw_heatmap(cells: Sequence[Cell], path: Path) -> Path:
    from matplotlib import pyplot as plt

    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        assert cell.depth is not None
        grid[depths.index(cell.depth)][lengths.index(cell.length)] = _percent(cell)
    figure, axis = plt.subplots(figsize=(2.5 + 0.6 * len(lengths), 1.5 + 0.4 * len(depths)), layout="constrained")
    image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    axis.set(title=f"{cells[0].task}, {cells[0].method}", xlabel="prompt (tokens)", ylabel="needle depth (%)")
    for y, row in enumerate(grid):
        for x, accuracy in enumerate(row):
            if accuracy == accuracy:  # not NaN
                axis.text(x, y, f"{accuracy:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="accuracy (%)")
    return _save(figure, path)


def _percent(cell: Cell) -> float:
    assert cell.accuracy is not None
    return 100 * cell.accuracy


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    # Without the date the same cells give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path
