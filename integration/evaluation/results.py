"""The results of `farspan eval`: rows of `eval.csv`, and the table that a person reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from farspan.engine_ext.errors import ConfigError
from farspan.tables import append_rows, check_columns, read_rows

CSV_NAME = "eval.csv"
ACCURACY_COLUMNS = ("method", "task", "length", "depth", "seed", "count", "accuracy")
CSV_COLUMNS = (*ACCURACY_COLUMNS, "density", "coverage", "coverage_worst", "note")
RAN_DENSELY = "ran densely"
"""The note of a cell of a sparse method whose chunks were all below the crossover."""
STOCK_FAILS_BELOW = 0.5
"""With fewer of its own answers right, a model says nothing about methods."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: `count` questions of one kind, and the fraction answered."""

    method: str
    task: str
    length: int
    depth: float | None
    """Place of the needle in the prompt, in [0, 1]; None where each question draws its own."""
    seed: int
    count: int
    accuracy: float | None = None
    """Mean score in [0, 1]; None before the cell is evaluated."""
    density: float | None = None
    """Share of the causal blocks that a sparse method read, mean over layers and heads; None where nobody knows."""
    coverage: float | None = None
    """Share of the attention mass that it kept, mean over layers and heads; None where that was not measured."""
    coverage_worst: float | None = None
    """That of the head that kept least."""
    note: str = ""

    @property
    def question(self) -> "Cell":
        """The cell without its answer: what a resumed run compares."""
        return Cell(self.method, self.task, self.length, self.depth, self.seed, self.count)


def read_csv(path: Path) -> list[Cell]:
    """The rows of a table; none if there is no file. Raises ConfigError where it is no table of `farspan eval`.

    Tables of accuracies alone are read too.
    """
    if not path.exists():
        return []
    cells = []
    rows = read_rows(path)
    only_accuracy = bool(rows) and tuple(rows[0]) == ACCURACY_COLUMNS
    check_columns(path, ACCURACY_COLUMNS if only_accuracy else CSV_COLUMNS)
    for number, row in enumerate(rows, start=2):
        try:
            cells.append(parse_cell(row))
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}, cannot be read ({error}). Remove that line.") from error
    return cells


def parse_cell(row: Mapping[str, str]) -> Cell:
    """A row of the file. Raises ValueError."""
    return Cell(
        method=row["method"],
        task=row["task"],
        length=int(row["length"]),
        depth=float(row["depth"]) if row["depth"] else None,
        seed=int(row["seed"]),
        count=int(row["count"]),
        accuracy=float(row["accuracy"]),
        density=optional(row, "density"),
        coverage=optional(row, "coverage"),
        coverage_worst=optional(row, "coverage_worst"),
        note=row.get("note", ""),
    )


def optional(row: Mapping[str, str], column: str) -> float | None:
    """A number that may be left out. Raises ValueError for anything else."""
    return float(row[column]) if row.get(column) else None


def append_csv(path: Path, cell: Cell) -> None:
    """Add one row to the table, with the header if the file is new. Raises ConfigError where it is another table."""
    append_rows(path, CSV_COLUMNS, [asdict(cell)])


def format_table(cells: Sequence[Cell]) -> str:
    """A text table: one line per method and task, one column per length, accuracy in percent, mean over depths.

    Where sparse methods were measured, a second one follows with density and coverage.
    """
    lines = grid(cells, "", lambda cell: cell.accuracy, lambda found: f"{100 * mean(found):.1f}")
    for title, value, show in (
        ("density", lambda cell: cell.density, lambda found: f"{mean(found):.3f}"),
        ("coverage", lambda cell: cell.coverage, lambda found: f"{mean(found):.3f}"),
        ("worst head", lambda cell: cell.coverage_worst, lambda found: f"{min(found):.3f}"),
    ):
        measured = [cell for cell in cells if value(cell) is not None]
        if measured:
            lines += ["", *grid(measured, title, value, show)]
    return "\n".join(lines)


def grid(
    cells: Sequence[Cell], title: str, value: Callable[[Cell], float | None], show: Callable[[list[float]], str]
) -> list[str]:
    """The lines of a table of one quantity."""
    by_row: dict[tuple[str, str], dict[int, list[float]]] = {}
    for cell in cells:
        figure = value(cell)
        assert figure is not None
        by_row.setdefault((cell.method, cell.task), {}).setdefault(cell.length, []).append(figure)
    lengths = sorted({length for row in by_row.values() for length in row})
    width = max([len(name) for row in by_row for name in row] + [6])
    lines = [f"{'method':<{width}}  {'task':<{width}}" + "".join(f"{length:>9}" for length in lengths) + f"  {title}"]
    for (method, task), row in by_row.items():
        figures = [f"{show(row[n]) if n in row else '-':>9}" for n in lengths]
        lines.append(f"{method:<{width}}  {task:<{width}}" + "".join(figures))
    return [line.rstrip() for line in lines]


def mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


def remarks(cells: Sequence[Cell]) -> list[str]:
    """What somebody must know who reads the table, one sentence each."""
    found = []
    for method, task, length in dict.fromkeys((cell.method, cell.task, cell.length) for cell in cells):
        mine = [cell for cell in cells if (cell.method, cell.task, cell.length) == (method, task, length)]
        if any(cell.note == RAN_DENSELY for cell in mine):
            found.append(
                f"{method} ran densely on {task} at {length} tokens, as a server with these options would: accuracy "
                "there is dense attention's. For sparse answers set prefill.min_seq_len and prefill.min_chunk_len to 0."
            )
        accuracy = mean([cell.accuracy or 0.0 for cell in mine])
        if method == "stock" and accuracy < STOCK_FAILS_BELOW:
            found.append(
                f"warning: stock answers {100 * accuracy:.0f} % of {task} at {length} tokens. The model itself fails, "
                "so nothing follows for other methods there; ask for shorter prompts or an easier task."
            )
    return found
