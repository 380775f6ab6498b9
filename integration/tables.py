"""CSV files: the one place that writes them, and reads them with a sentence for what is damaged."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from farspan.engine_ext.errors import ConfigError


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table anew. Every row has the keys `columns`, or fewer: missing ones are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a table, with the header if the file is new. Raises ConfigError where it has other columns."""
    if not path.exists():
        write_rows(path, columns, rows)
        return
    check_columns(path, columns)
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise ConfigError unless a table has these columns in this order, and its last line is whole."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no CSV file: it is not text in UTF-8. Move it away.") from error
    if text.partition("\n")[0] != ",".join(columns):
        raise ConfigError(f"{path} does not have the columns {','.join(columns)}. Move it away, or name another file.")
    if not text.endswith("\n"):
        raise ConfigError(f"{path} ends in the middle of a line. Remove that line.")


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a table, in order.

    columns: the columns that it must have; any if None. Raises ConfigError for a file that is not there or no table.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file.")
    if columns is not None:
        check_columns(path, columns)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no CSV file: {error}.") from error
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ConfigError(f"{path}, line {number}, has another number of cells than the header. Remove that line.")
    return rows


class Tables:
    """Tables of one folder that grow row by row; a fresh start replaces what an earlier run left."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder = folder
        self.fresh = fresh
        self.known: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to the table `name`, fractions rounded to five digits."""
        rounded = [{key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        is_first = name not in self.known
        self.known.add(name)
        put = write_rows if self.fresh and is_first else append_rows
        put(self.folder / name, columns, rounded)
