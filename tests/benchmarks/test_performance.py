"""docs/performance.md: its goals and pictures are those of the rows."""

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from benchmarks.performance import ALL, FIGURES, GOALS, Goal, format_goals, latest, measured, pictures, ratio
from benchmarks.record import Environment, Recorder, Row, read_rows
from benchmarks.svg_plot import Panel, Series, draw
from benchmarks.tables import CHECKPOINTS, SHAPES, TURNS, format_numbers

ENVIRONMENT = Environment("1", "2026-11-28", "c", "NVIDIA H200", "1", "2", "3", "0.32")


def rows_of(*timings: tuple[str, str, str, float]) -> list[Row]:
    """Rows of (run, case, variant, ms)."""
    recorder = Recorder(None, ENVIRONMENT)
    for run_id, case, variant, ms in timings:
        recorder.environment = replace(ENVIRONMENT, run_id=run_id, gpu="cpu" if run_id == "cpu" else "NVIDIA H200")
        recorder.add("serve", case, variant, "time", "ms", [ms])
    return recorder.rows


def test_page_and_pictures_are_those_of_the_rows() -> None:
    rows = read_rows()
    hint = "run: python -m benchmarks.performance --write"
    assert GOALS.is_current(format_goals(rows)), hint
    drawn = pictures(rows)
    assert {name: (FIGURES / name).read_text() for name in drawn} == drawn, hint
    assert sum(map(len, drawn.values())) < 25000


def test_a_goal_is_held_against_the_last_run_of_its_case() -> None:
    rows = rows_of(
        ("1", "total-a", "farspan", 20), ("1", "total-a", "fa3", 10),
        ("2", "total-a", "farspan", 10), ("2", "total-a", "fa3", 10),
        ("3", "total-b", "farspan", 30), ("3", "total-b", "fa3", 10), ("3", "total-c", "fa3", 10),
        ("cpu", "total-d", "farspan", 30), ("cpu", "total-d", "fa3", 10),
    )  # fmt: skip
    goal = Goal("x", "serve", "total-", ratio("farspan", "fa3"), 1.02, at_least=False)
    assert [(case, value) for case, value, _ in measured(goal, rows)] == [("total-a", 1.0), ("total-b", 3.0)]
    assert [goal.reached(value) for _, value, _ in measured(goal, rows)] == [True, False]
    assert [case for case, *_ in measured(replace(goal, worst=True), rows)] == ["total-b"]
    assert latest(rows, "serve", "nowhere") == {}


def test_a_goal_without_rows_says_so() -> None:
    text = format_goals(rows_of(("1", "total-10x100000-x", "fa3", 1.0)))
    assert text.count("not measured") == len(ALL)


def test_first_tokens_of_checkpoints_and_turns_have_goals_and_tables_of_their_own() -> None:
    recorder, places = Recorder(None, ENVIRONMENT), {}
    for case, place in (
        ("n8192-b1-qwen1.5b-bf16", SHAPES),
        ("n131072-b1-llama8b-bf16", SHAPES),
        ("n8192-b1-llama8b-16layers-bf16", SHAPES),
        ("n32704-b1-qwen2.5-coder-1.5b-code-bf16", CHECKPOINTS),
        ("q2048-n6144-b1-qwen2.5-coder-0.5b-prose-bf16", TURNS),
    ):
        places[case] = place
        for variant, ms in (("fa3", 3.0), ("farspan", 2.0), ("farspan-g0.95", 3.0)):
            recorder.add("ttft", case, variant, "time", "ms", [ms])
    for pattern in (SHAPES, CHECKPOINTS, TURNS):
        mine = [case for case, place in places.items() if place == pattern]
        assert [case for case in places if re.match(pattern, case)] == mine
        goal = next(each for each in ALL if each.benchmark == "ttft" and each.cases == pattern)
        found = {case: value for case, value, _ in measured(replace(goal, worst=False), recorder.rows)}
        assert found == dict.fromkeys(mine, 1.5)
    tables = format_numbers(recorder.rows)
    assert all(f"| `{case}` | 2 | 3 | 3 |" in tables for case, place in places.items() if place != SHAPES)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_picture_puts_points_where_they_are(columns: int) -> None:
    """On log axes three points of the same ratio are equally far from each other."""
    panel = Panel("a < b", "x", "y", (Series("s", ((1, 10), (10, 100), (100, 1000))), Series("l", ((1, 9), (9, 9)))))
    root = ElementTree.fromstring(draw([panel] * columns))
    groups = [element for element in root if element.tag.endswith("}g")]
    assert len(groups) == columns
    line = next(element.attrib["d"] for element in groups[0] if element.attrib.get("class") == "l")
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", line)[2:]]
    steps = [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(points)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert min(steps[0]) > 50
