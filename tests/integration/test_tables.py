"""CSV files: what is written is read again, and what is damaged is named with its line."""

from pathlib import Path

import pytest
from farspan.engine_ext.errors import ConfigError
from farspan.tables import Tables, append_rows, read_rows, write_rows

COLUMNS = ("name", "value")


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    rows = [{"name": "a, b", "value": 1}, {"name": 'say "c"\nand d', "value": ""}]
    (tmp_path / "new").mkdir()
    for row in rows:
        append_rows(path, COLUMNS, [row])
    assert read_rows(path, COLUMNS) == [{"name": "a, b", "value": "1"}, {"name": 'say "c"\nand d', "value": ""}]
    assert path.read_bytes().startswith(b"name,value\n")
    write_rows(path, COLUMNS, [])
    assert read_rows(path, COLUMNS) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "does not have the columns name,value"),
        (b"", "does not have the columns name,value"),
        (b"\xb4\xff\n", "is not text in UTF-8"),
        (b"name,value\na,1\nb\n", "line 3, has another number of cells"),
        (b"name,value\na,1,2\n", "line 2, has another number of cells"),
        (b"name,value\na,1\nb,", "ends in the middle of a line"),
        (b'name,value\n"a,1\n', "is no CSV file"),
    ],
    ids=["columns", "empty", "binary", "short", "long", "cut", "quote"],
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refusal:
        read_rows(path, COLUMNS)
    assert str(path) in str(refusal.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"a,b\n", b"name,value\na,1"], ids=["columns", "cut"])
def test_a_damaged_table_does_not_grow(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        append_rows(path, COLUMNS, [{"name": "a", "value": 1}])
    assert path.read_bytes() == content


def test_a_fresh_start_replaces_what_was_there(tmp_path: Path) -> None:
    for fresh, expected in ((False, 1), (False, 2), (True, 1)):
        tables = Tables(tmp_path, fresh=fresh)
        tables.add("a.csv", COLUMNS, [{"name": "x", "value": 1 / 3}])
        rows = read_rows(tmp_path / "a.csv", COLUMNS)
        assert [row["value"] for row in rows] == ["0.33333"] * expected
