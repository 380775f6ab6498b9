"""The results of `farspan eval`: rows of `eval.csv`, and the table that a person reads."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from farspan.engine_ext.errors import ConfigError
from farspan.tables import append_rows, read_rows

CSV_NAME = "eval.csv"
CSV_COLUMNS = ("method", "task", "length", "depth", "seed", "count", "accuracy")


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

    @property
    def question(self) -> "Cell":
        """The cell without its answer: what a resumed run compares."""
        return replace(self, accuracy=None)


def read_csv(path: Path) -> list[Cell]:
    """The rows of a table; none if there is no file. Raises ConfigError where it is no table of `farspan eval`."""
    if not path.exists():
        return []
    cells = []
    for number, row in enumerate(read_rows(path, CSV_COLUMNS), start=2):
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
    )


def append_csv(path: Path, cell: Cell) -> None:
    """Add one row to the table, with the header if the file is new. Raises ConfigError where it is another table."""
    append_rows(path, CSV_COLUMNS, [asdict(cell)])


def format_table(cells: Iterable[Cell]) -> str:
    """A text table: one line per method and task, one column per length, accuracy in percent, mean over depths."""
    by_row: dict[tuple[str, str], dict[int, list[float]]] = {}
    for cell in cells:
        assert cell.accuracy is not None
        by_row.setdefault((cell.method, cell.task), {}).setdefault(cell.length, []).append(cell.accuracy)
    lengths = sorted({length for row in by_row.values() for length in row})
    width = max([len(name) for row in by_row for name in row] + [6])
    lines = [f"{'method':<{width}}  {'task':<{width}}" + "".join(f"{length:>9}" for length in lengths)]
    for (method, task), row in by_row.items():
        figures = [f"{100 * sum(row[n]) / len(row[n]):>9.1f}" if n in row else f"{'-':>9}" for n in lengths]
        lines.append(f"{method:<{width}}  {task:<{width}}" + "".join(figures))
    return "\n".join(lines)
