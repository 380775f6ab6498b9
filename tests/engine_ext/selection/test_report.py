"""Numbers of flex on their way to the host: each is told once, whoever resets the statistics meanwhile."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext.selection.report import SelectionReporter
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.tiles import BlockLists, make_prefill_tiles

CPU = torch.device("cpu")


def add_chunk(stats: SelectionStats, num_blocks: int) -> None:
    """One chunk of two tiles, three causal blocks, of which each of two heads reads so many in each tile."""
    tiles = make_prefill_tiles([0, 256], torch.tensor([256], dtype=torch.int32), 128, CPU)
    counts = torch.full((2, 2), num_blocks, dtype=torch.int32)
    stats.add_lists(BlockLists(torch.zeros(2, 2, 2, dtype=torch.int32), counts), tiles, slice(0, 2), 1)
    stats.add_coverage(torch.full((2, 1, 4), 0.75), slice(0, 2))
    stats.time.finished_ms += 3.0


@pytest.fixture
def layers() -> list[SelectionStats]:
    return [SelectionStats(2, CPU) for _ in range(3)]


def test_each_number_is_told_once(layers: list[SelectionStats]) -> None:
    reporter = SelectionReporter(layers)
    assert reporter.report() is None
    for each in layers:
        add_chunk(each, 1)
    assert reporter.report() is None  # on its way
    first = reporter.report()
    assert first is not None
    expected = {"blocks": 12, "causal_blocks": 18, "kept": 18, "kept_of": 24, "chunks": 1, "least_kept": 0.75}
    assert {name: first[name] for name in expected} == expected
    assert first["seconds"] == pytest.approx(9e-3)
    assert reporter.report() is None
    for each in layers:
        add_chunk(each, 2)
    reporter.report()
    second = reporter.report()
    assert second is not None
    assert (second["blocks"], second["causal_blocks"], second["chunks"]) == (24, 18, 1)


def test_a_copy_under_way_is_not_waited_for(layers: list[SelectionStats]) -> None:
    reporter = SelectionReporter(layers)
    add_chunk(layers[0], 1)
    reporter.report()
    assert reporter.copy is not None
    # An event that nobody may wait for.
    arrived: Any = SimpleNamespace(query=lambda: False)
    reporter.copy.arrived = arrived
    assert reporter.report() is None
    assert reporter.copy.arrived is arrived
    arrived.query = lambda: True
    assert reporter.report() is not None


def test_a_reset_takes_nothing_back(layers: list[SelectionStats]) -> None:
    reporter = SelectionReporter(layers)
    for blocks in (2, 1):
        for each in layers:
            each.reset()
            add_chunk(each, blocks)
        reporter.report()
        told = reporter.report()
        assert told is not None
        assert (told["blocks"], told["chunks"]) == (12 * blocks, 1)
    for each in layers:
        each.reset()
    reporter.report()
    told = reporter.report()
    assert told is not None
    assert not any(told.values())
    assert "least_kept" not in told
