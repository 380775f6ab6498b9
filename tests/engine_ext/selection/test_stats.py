"""Sums over chunks: density, pattern and coverage per head."""

import pytest
import torch
from farspan.engine_ext.selection.stats import DeviceTime, SelectionStats
from farspan.kernels.flex.spans import SpanRule, make_spans
from farspan.kernels.flex.types import FlexSelection, TileSelection
from farspan.kernels.tiles import BlockLists, make_prefill_tiles

CPU = torch.device("cpu")
HEADS = slice(0, 2)


def selection(counts: list[list[int]], aware: list[list[bool]]) -> FlexSelection:
    block_counts = torch.tensor(counts, dtype=torch.int32)
    block_ids = torch.zeros(*block_counts.shape, 4, dtype=torch.int32)
    is_query_aware = torch.tensor(aware)
    return FlexSelection(BlockLists(block_ids, block_counts), is_query_aware, torch.where(is_query_aware, 0.05, 0.3))


def test_nothing_selected_gives_no_rows() -> None:
    assert SelectionStats(2, torch.device("cpu")).rows() == []


def test_chunks_add_up_per_head() -> None:
    stats = SelectionStats(2, torch.device("cpu"))
    # A prompt of 3 blocks, then its next block and a prompt of 1 block in the same step.
    stats.add_selection(
        selection([[1, 2, 2], [1, 2, 3]], [[False], [True]]),
        make_prefill_tiles([0, 384], [384], 128, torch.device("cpu")),
        HEADS,
    )
    stats.add_selection(
        selection([[2, 1], [4, 1]], [[True, False], [True, True]]),
        make_prefill_tiles([0, 100, 150], [484, 50], 128, torch.device("cpu")),
        HEADS,
    )
    rows = stats.rows()
    assert [row["head"] for row in rows] == [0, 1]
    assert [row["density"] for row in rows] == pytest.approx([8 / 11, 1.0])
    assert [row["query_aware"] for row in rows] == pytest.approx([1 / 3, 1.0])
    assert [row["divergence"] for row in rows] == pytest.approx([(0.3 + 0.05 + 0.3) / 3, 0.05])
    assert [(row["coverage"], row["chunks"], row["measured_rows"]) for row in rows] == [(None, 3, 0)] * 2
    stats.add_coverage(torch.tensor([[[1.0, 0.5]], [[0.75, 0.75]]]), HEADS)
    stats.add_coverage(torch.tensor([[[0.0]], [[0.9]]]), HEADS)
    assert [row["coverage"] for row in stats.rows()] == pytest.approx([0.5, 0.8])
    stats.reset()
    assert stats.rows() == []


def test_spans_of_tiles_tell_mean_and_least() -> None:
    stats = SelectionStats(2, CPU)
    tiles = make_prefill_tiles([0, 1536], [1536], 128, CPU)
    spans = make_spans([0, 1536], [1536], tiles, SpanRule(512, 32))
    counts = (tiles.tile_block + 1).expand(2, -1)
    lists = BlockLists(torch.zeros(2, 12, 12, dtype=torch.int32), counts)
    # The fourth span and those after it are padding, whose values mean nothing.
    kept = torch.full((2, spans.num_spans), float("nan"))
    kept[:, :3] = torch.tensor([[1.0, 0.75, 0.5], [1.0, 1.0, 1.0]])
    stats.add_tile_selection(TileSelection(lists, kept), tiles, spans, HEADS, 1)
    half = BlockLists(lists.block_ids, counts.div(2, rounding_mode="floor"))
    stats.add_tile_selection(TileSelection(half, torch.ones(2, spans.num_spans)), tiles, spans, HEADS, 1)
    rows = stats.rows()
    assert [row["coverage"] for row in rows] == pytest.approx([5.25 / 6, 1.0])
    assert [row["coverage_min"] for row in rows] == [0.5, 1.0]
    assert [row["density"] for row in rows] == pytest.approx([(78 + 36) / 156] * 2)
    assert [row["density_min"] for row in rows] == pytest.approx([36 / 78] * 2)
    assert [(row["chunks"], row["measured_rows"]) for row in rows] == [(2, 0)] * 2
    # What other rows kept goes before what the choosing ones did.
    stats.add_coverage(torch.tensor([[[0.9, 0.3]], [[0.8, 0.8]]]), HEADS)
    assert [row["coverage"] for row in stats.rows()] == pytest.approx([0.6, 0.8])
    assert [row["coverage_min"] for row in stats.rows()] == pytest.approx([0.3, 0.8])


def test_chunks_without_a_whole_span_say_nothing_of_coverage() -> None:
    stats = SelectionStats(1, CPU)
    tiles = make_prefill_tiles([0, 100], [300], 128, CPU)
    spans = make_spans([0, 100], [300], tiles, SpanRule(512, 32))
    lists = BlockLists(torch.zeros(1, 2, 3, dtype=torch.int32), torch.tensor([[2, 3]], dtype=torch.int32))
    stats.add_tile_selection(TileSelection(lists, torch.ones(1, 0)), tiles, spans, slice(0, 1), 1)
    (row,) = stats.rows()
    assert (row["density"], row["coverage"], row["coverage_min"]) == (1.0, None, None)


def test_a_shared_list_counts_for_every_head_of_its_group() -> None:
    stats = SelectionStats(4, torch.device("cpu"))
    aware = [[False]] * 4
    tiles = make_prefill_tiles([0, 256], [256], 128, torch.device("cpu"))
    stats.add_selection(selection([[1, 1], [1, 2]], aware), tiles, slice(0, 4))
    assert [row["density"] for row in stats.rows()] == pytest.approx([2 / 3, 2 / 3, 1.0, 1.0])


class Event:
    """A stand-in for CUDA's, which the test lets pass."""

    passed = 0
    """Events recorded so far that the device has reached."""
    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.number = Event.recorded

    def query(self) -> bool:
        return self.number <= Event.passed

    def synchronize(self) -> None:
        Event.passed = max(Event.passed, self.number)

    def elapsed_time(self, end: "Event") -> float:
        assert end.query()
        return 2.5 * (end.number - self.number)


def test_the_time_of_the_device_is_read_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    spent = DeviceTime(torch.device("cuda"))
    for passed in (0, 2, 2):
        Event.passed = passed
        with spent.measure():
            pass
    # The device has reached the first pair alone: the others are left for later.
    assert (spent.finished_ms, len(spent.pending), Event.passed) == (2.5, 2, 2)
    assert spent.total_ms() == 7.5
    assert Event.passed == Event.recorded == 6
    spent.reset()
    assert spent.total_ms() == 0
