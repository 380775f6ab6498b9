"""The rules of benchmark `rules`: the built one is written twice, and each part of a rule does what it says."""

from dataclasses import replace

import pytest
import torch
from farspan.engine_ext.config import FlexPrefill
from farspan.engine_ext.selection.methods import TILE_ROWS_RULE, flex_budget
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.spans import make_spans
from farspan.kernels.flex.tile_rows_reference import tile_row_lists
from farspan.kernels.tiles import make_prefill_tiles
from farspan.kernels.tuning import TILE_ROWS_LOST_SHARE

from benchmarks.rules import Rule, coverage_of, kept_blocks, lists_of, row_masses

CPU = torch.device("cpu")
NUM_TOKENS, BLOCK, SCALE = 1800, 128, 0.25
BUILT = Rule("", 128, min_blocks=3, lost=TILE_ROWS_LOST_SHARE, halves=True)


def peaked_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Query [4, NUM_TOKENS, 16] and key [2, NUM_TOKENS, 16] of heads that read a few blocks each."""
    generator = torch.Generator().manual_seed(0)
    return 5 * torch.randn(4, NUM_TOKENS, 16, generator=generator), torch.randn(2, NUM_TOKENS, 16, generator=generator)


def test_the_default_is_the_engines_rule() -> None:
    query, key = peaked_inputs()
    pages = torch.nn.functional.pad(torch.cat([key, key], -1), (0, 0, 0, -NUM_TOKENS % BLOCK))
    kv = KVView(pages.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous())
    starts, lens = torch.tensor([0, NUM_TOKENS], dtype=torch.int32), torch.tensor([NUM_TOKENS], dtype=torch.int32)
    table = torch.arange(len(kv.pages), dtype=torch.int32)[None]
    batch = PagedBatch(starts, lens, table, NUM_TOKENS, NUM_TOKENS)
    tiles = make_prefill_tiles([0, NUM_TOKENS], [NUM_TOKENS], BLOCK, CPU)
    spans = make_spans([0, NUM_TOKENS], [NUM_TOKENS], tiles, TILE_ROWS_RULE)
    budget = flex_budget(FlexPrefill(gamma=BUILT.gamma, min_budget=BUILT.min_blocks * BLOCK), BLOCK, 1)
    expected = tile_row_lists(query.transpose(0, 1), kv, batch, tiles, spans, SCALE, budget).block_lists
    found = lists_of(kept_blocks(query, key, SCALE, BUILT))
    assert torch.equal(found.block_counts, expected.block_counts)
    listed = torch.arange(found.block_ids.shape[2]) < found.block_counts[..., None]
    assert torch.equal(found.block_ids[listed], expected.block_ids[listed])
    assert found.block_counts.sum() < 4 * (tiles.tile_block + 1).sum()


def test_all_rows_keep_what_is_asked() -> None:
    query, key = peaked_inputs()
    rule = replace(BUILT, rows=0, span_len=BLOCK, lost=1.0, gamma=0.9)
    coverage = coverage_of(query, key, SCALE, kept_blocks(query, key, SCALE, rule))
    assert (coverage >= 0.9).all()
    assert (coverage < 0.97).all()


@pytest.mark.parametrize("floor", [0.9, 0.99])
def test_each_sampled_row_keeps_its_floor(floor: float) -> None:
    query, key = peaked_inputs()
    rule = replace(BUILT, rows=0, gamma=0.5, row_floor=floor)
    places = torch.arange(NUM_TOKENS)
    kept = (row_masses(query, key, places, SCALE) * kept_blocks(query, key, SCALE, rule)[:, places // BLOCK]).sum(-1)
    assert kept.min() >= floor - 1e-5


def test_a_larger_minimum_and_the_block_before_add_blocks() -> None:
    query, key = peaked_inputs()
    least = kept_blocks(query, key, SCALE, replace(BUILT, gamma=0.1, lost=1.0))
    assert least[:, 12].sum(-1).tolist() == [3] * 4
    more = kept_blocks(query, key, SCALE, replace(BUILT, gamma=0.1, lost=1.0, min_blocks=5))
    assert more[:, 12].sum(-1).tolist() == [5] * 4
    assert (more | ~least).all()
    assert kept_blocks(query, key, SCALE, replace(BUILT, gamma=0.1, lost=1.0, previous=1))[:, 12, 11].all()
