"""Sums over chunks: density, pattern and coverage per head."""

import pytest
import torch
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.flex.types import FlexSelection
from farspan.kernels.tiles import BlockLists, make_prefill_tiles

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


def test_repaired_heads_read_their_lists_and_all_blocks() -> None:
    stats = SelectionStats(2, torch.device("cpu"))
    # Two prompts, of 2 and 3 blocks; the second head is repaired only in the second prompt.
    tiles = make_prefill_tiles([0, 256, 640], [256, 384], 128, torch.device("cpu"))
    stats.add_selection(selection([[1, 1, 1, 1, 1], [1, 2, 1, 1, 2]], [[False, False]] * 2), tiles, HEADS)
    stats.add_repair(torch.tensor([[False, False], [False, True]]), tiles, HEADS)
    rows = stats.rows()
    assert [row["density"] for row in rows] == pytest.approx([5 / 9, (7 + 6) / 9])
    assert [row["repaired"] for row in rows] == [0.0, 0.5]
    stats.reset()
    stats.add_selection(selection([[1, 1, 1, 1, 1], [1, 2, 1, 1, 2]], [[False, False]] * 2), tiles, HEADS)
    assert [row["repaired"] for row in stats.rows()] == [0.0, 0.0]


def test_a_shared_list_counts_for_every_head_of_its_group() -> None:
    stats = SelectionStats(4, torch.device("cpu"))
    aware = [[False]] * 4
    tiles = make_prefill_tiles([0, 256], [256], 128, torch.device("cpu"))
    stats.add_selection(selection([[1, 1], [1, 2]], aware), tiles, slice(0, 4))
    assert [row["density"] for row in stats.rows()] == pytest.approx([2 / 3, 2 / 3, 1.0, 1.0])
