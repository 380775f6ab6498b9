"""Which KV blocks a sparse pass reads: one class per method after `Selector`.

A selector serves one layer and works on any range of its KV heads. It holds nothing that one request could leave to
another.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from farspan.engine_ext.config import BlockSparsePrefill, FlexPrefill
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.block_patterns import gather_rows
from farspan.kernels.flex.spans import SpanRule, Spans
from farspan.kernels.flex.types import NO_LIMIT, Budget, FlexSelection, TileSelection
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import TILE_ROWS, TILE_ROWS_LOST_SHARE, TILE_ROWS_SPAN_LEN

FORCED_BLOCKS = 2
"""Blocks of every flex list: the first and the diagonal one."""

TILE_ROWS_RULE = SpanRule(TILE_ROWS_SPAN_LEN, TILE_ROWS)


@dataclass(frozen=True)
class DeviceSelections:
    """The dynamic selections of a device: Triton's or PyTorch's."""

    flex_block_lists: Callable[..., FlexSelection]
    """Of `kernels.flex.select` or `kernels.flex.reference`."""
    tile_row_lists: Callable[..., TileSelection]
    """Of `kernels.flex.tile_rows` or `kernels.flex.tile_rows_reference`."""


@dataclass(frozen=True)
class Chunks:
    """What a selector chooses blocks for: some rows and some KV heads of its layer."""

    query: torch.Tensor
    """[num_tokens, num_q_heads, head_dim], the heads that `kv` serves."""
    kv: KVView
    """Holds the chunks' own keys already."""
    batch: PagedBatch
    tiles: PrefillTiles
    scale: float
    """Factor on the logits."""
    turn: Turn | None
    spans: Spans | None = None
    """For selection by tile rows."""

    @property
    def q_heads(self) -> slice:
        """The query heads within the layer."""
        group = self.query.shape[1] // self.kv.num_kv_heads
        first = self.kv.first_kv_head * group
        return slice(first, first + self.query.shape[1])


class Selector(Protocol):
    """Chooses blocks for one layer."""

    stats: SelectionStats | None
    """What was chosen and kept, added up on the device; None unless asked for."""

    def block_lists(
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: DeviceSelections
    ) -> BlockLists:
        """The blocks that each tile of `chunks.tiles` reads. Runs on the device without waiting for it.

        prefill: the options of the chunks' requests; select: the device's dynamic selections.
        """
        ...


class FlexSelector:
    """Dynamic selection per prompt and head, by tile rows or after FlexPrefill (arXiv 2502.20766)."""

    def __init__(self, stats: SelectionStats | None = None) -> None:
        self.stats = stats

    def block_lists(
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: DeviceSelections
    ) -> BlockLists:
        """See `Selector`."""
        assert isinstance(prefill, FlexPrefill)
        group = chunks.query.shape[1] // chunks.kv.num_kv_heads if prefill.share_kv_group else 1
        budget = flex_budget(prefill, chunks.tiles.block_size, group)
        inputs = (chunks.query, chunks.kv, chunks.batch, chunks.tiles)
        measured = nullcontext() if self.stats is None else self.stats.time.measure()
        if chunks.spans is not None:
            with measured:
                by_rows = select.tile_row_lists(*inputs, chunks.spans, chunks.scale, budget, turn=chunks.turn)
            if self.stats is not None:
                self.stats.add_tile_selection(
                    by_rows, chunks.tiles, chunks.spans, chunks.q_heads, chunks.batch.num_reqs
                )
            return by_rows.block_lists
        with measured:
            selection = select.flex_block_lists(*inputs, chunks.scale, budget, turn=chunks.turn)
        if self.stats is not None:
            self.stats.add_selection(selection, chunks.tiles, chunks.q_heads)
        return selection.block_lists


@lru_cache
def flex_budget(prefill: FlexPrefill, block_size: int, heads_per_list: int) -> Budget:
    """Budgets in blocks from the options' tokens; with tile rows, gamma with its margin."""
    max_blocks = NO_LIMIT
    if prefill.max_budget is not None:
        max_blocks = max(prefill.max_budget // block_size, FORCED_BLOCKS)
    min_blocks = -(-prefill.min_budget // block_size)
    gamma = prefill.gamma
    if prefill.selection == "tile_rows":
        # Of what rows keep that do not choose.
        gamma = 1 - (1 - gamma) * TILE_ROWS_LOST_SHARE
    return Budget(gamma, prefill.tau, min_blocks, max_blocks, heads_per_list)


class MaskSelector:
    """The layer's own mask from a file, per head if the file says so."""

    def __init__(self, rows: BlockLists, num_q_heads: int) -> None:
        """Serve a layer of `num_q_heads` query heads on this rank.

        rows: row i lists the blocks that query block i reads; for one head, or as many as divide `num_q_heads`.
        """
        self.rows = rows
        self.heads_per_row = num_q_heads // rows.block_ids.shape[0]
        self.stats: SelectionStats | None = None

    def block_lists(
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: DeviceSelections
    ) -> BlockLists:
        """See `Selector`."""
        rows = self.rows
        if rows.block_ids.shape[0] > 1:
            heads = chunks.q_heads
            own = slice(heads.start // self.heads_per_row, heads.stop // self.heads_per_row)
            rows = BlockLists(rows.block_ids[own], rows.block_counts[own])
        return gather_rows(rows, chunks.tiles)
