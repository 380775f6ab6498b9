"""The selectors of the sparse methods: each works on any range of a layer's KV heads."""

import pytest
import torch
from farspan.engine_ext.config import BlockSparsePrefill, FlexPrefill
from farspan.engine_ext.launch import ON_HOST
from farspan.engine_ext.selection.methods import Chunks, FlexSelector, MaskSelector, Selector, flex_budget
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.block_patterns import mask_rows
from farspan.kernels.flex.spans import SpanRule, make_spans
from farspan.kernels.flex.types import NO_LIMIT, Budget
from farspan.kernels.tiles import BlockLists
from farspan.kernels.tuning import TILE_ROWS_LOST_SHARE

from tests.kernels.helpers import Inputs, make_batch

FLEX = FlexPrefill(gamma=0.8, min_budget=0)
PAPER = FlexPrefill(selection="flexprefill", gamma=0.8, min_budget=0)
MASK = BlockSparsePrefill(pattern="file", mask_file="mask.npy")


def inputs() -> Inputs:
    return make_batch([450, 90], [900, 90], num_heads=8, num_kv_heads=4, sharpness=4.0)


def chunks_of(batch: Inputs, kv_heads: slice, selection: str = "tile_rows") -> Chunks:
    query, tiles = batch.query[:, kv_heads.start * 2 : kv_heads.stop * 2], batch.tiles(128)
    spans = None
    if selection == "tile_rows":
        spans = make_spans(batch.query_start_loc.tolist(), batch.seq_lens.tolist(), tiles, SpanRule(256, 16))
    return Chunks(query, batch.kv.of_heads(kv_heads), batch.paged, tiles, batch.scale, None, spans)


def lists_of(selector: Selector, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks) -> list[list[list[int]]]:
    lists = selector.block_lists(prefill, chunks, ON_HOST)
    heads = zip(lists.block_ids.tolist(), lists.block_counts.tolist(), strict=True)
    return [[ids[:count] for ids, count in zip(*head, strict=True)] for head in heads]


def per_head_rows(num_masks: int) -> BlockLists:
    mask = torch.rand(num_masks, 8, 8) < 0.5
    mask |= torch.eye(8, dtype=torch.bool)
    return mask_rows(mask)


@pytest.mark.parametrize(
    ("make", "prefill"),
    [
        (FlexSelector, FLEX),
        (FlexSelector, FlexPrefill(gamma=0.8, min_budget=0, share_kv_group=True)),
        (FlexSelector, PAPER),
        (FlexSelector, FlexPrefill(selection="flexprefill", gamma=0.8, min_budget=0, share_kv_group=True)),
        (lambda: MaskSelector(per_head_rows(8), num_q_heads=8), MASK),
        (lambda: MaskSelector(per_head_rows(4), num_q_heads=8), MASK),
    ],
    ids=["flex", "flex-shared", "paper", "paper-shared", "mask-per-query-head", "mask-per-kv-head"],
)
def test_a_range_of_heads_gets_its_part_of_the_lists(make, prefill) -> None:
    batch, selector, how = inputs(), make(), getattr(prefill, "selection", "")
    whole = lists_of(selector, prefill, chunks_of(batch, slice(0, 4), how))
    parts = [lists_of(selector, prefill, chunks_of(batch, slice(*each), how)) for each in ((0, 1), (1, 3), (3, 4))]
    assert [head for part in parts for head in part] == whole


def test_one_mask_serves_all_heads() -> None:
    selector = MaskSelector(per_head_rows(1), num_q_heads=8)
    batch = inputs()
    lists = lists_of(selector, MASK, chunks_of(batch, slice(0, 4)))
    assert len(lists) == 1
    assert lists == lists_of(selector, MASK, chunks_of(batch, slice(2, 3)))


def test_the_same_chunks_get_the_same_lists() -> None:
    """One prompt leaves nothing that changes another, with statistics and without."""
    batch, other = inputs(), inputs()
    selector = FlexSelector(SelectionStats(8, torch.device("cpu")))
    chunks = chunks_of(batch, slice(0, 4))
    first = lists_of(selector, FLEX, chunks)
    for _ in range(3):
        lists_of(selector, FLEX, chunks_of(other, slice(0, 4)))
    assert lists_of(selector, FLEX, chunks) == first


def test_statistics_of_passes_over_parts_of_the_heads_add_up() -> None:
    batch = inputs()
    whole, parts = (FlexSelector(SelectionStats(8, torch.device("cpu"))) for _ in range(2))
    lists_of(whole, FLEX, chunks_of(batch, slice(0, 4)))
    for kv_heads in (slice(0, 2), slice(2, 4)):
        lists_of(parts, FLEX, chunks_of(batch, kv_heads))
    assert whole.stats is not None
    assert parts.stats is not None
    for row, expected in zip(parts.stats.rows(), whole.stats.rows(), strict=True):
        # Times are those of the machine.
        times = row.pop("selection_ms"), expected.pop("selection_ms")
        assert min(times) > 0
        assert row == pytest.approx(expected)


def test_budgets_are_counted_in_blocks() -> None:
    paper = FlexPrefill(selection="flexprefill")
    assert flex_budget(paper, 128, 1) == Budget(0.95, 0.1, 8, NO_LIMIT, 1)
    limits = FlexPrefill(selection="flexprefill", min_budget=257, max_budget=500)
    assert flex_budget(limits, 128, 4) == Budget(0.95, 0.1, 3, 3, 4)


def test_tile_rows_have_a_margin() -> None:
    assert flex_budget(FlexPrefill(), 128, 1).gamma == pytest.approx(1 - 0.05 * TILE_ROWS_LOST_SHARE)
    assert flex_budget(FlexPrefill(gamma=1.0), 128, 1).gamma == 1.0
