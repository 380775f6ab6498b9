"""Which KV blocks a sparse pass reads: one class per method after `Selector`.

A selector serves one layer and works on any range of its KV heads. It holds nothing that one request could leave to
another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from farspan.engine_ext.config import BlockSparsePrefill, FlexPrefill
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.block_patterns import gather_rows
from farspan.kernels.flex.types import NO_LIMIT, Budget, FlexSelection
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.tiles import BlockLists, PrefillTiles

FORCED_BLOCKS = 2
"""Blocks of every flex list: the first and the diagonal one."""

SelectBlocks = Callable[..., FlexSelection]
"""`flex_block_lists` of a device: that of `kernels.flex.select` or of `kernels.flex.reference`."""


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
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: SelectBlocks
    ) -> BlockLists:
        """The blocks that each tile of `chunks.tiles` reads. Runs on the device without waiting for it.

        prefill: the options of the chunks' requests; select: the device's dynamic selection.
        """
        ...


class FlexSelector:
    """Dynamic selection per prompt and head. Source: FlexPrefill, arXiv 2502.20766."""

    def __init__(self, stats: SelectionStats | None = None) -> None:
        self.stats = stats

    def block_lists(
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: SelectBlocks
    ) -> BlockLists:
        """See `Selector`."""
        assert isinstance(prefill, FlexPrefill)
        group = chunks.query.shape[1] // chunks.kv.num_kv_heads if prefill.share_kv_group else 1
        budget = flex_budget(prefill, chunks.tiles.block_size, group)
        selection = select(chunks.query, chunks.kv, chunks.batch, chunks.tiles, chunks.scale, budget, turn=chunks.turn)
        if self.stats is not None:
            self.stats.add_selection(selection, chunks.tiles, chunks.q_heads)
        return selection.block_lists


def flex_budget(prefill: FlexPrefill, block_size: int, heads_per_list: int) -> Budget:
    """Budgets in blocks from the options' tokens."""
    max_blocks = NO_LIMIT
    if prefill.max_budget is not None:
        max_blocks = max(prefill.max_budget // block_size, FORCED_BLOCKS)
    min_blocks = -(-prefill.min_budget // block_size)
    return Budget(prefill.gamma, prefill.tau, min_blocks, max_blocks, heads_per_list)


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
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: SelectBlocks
    ) -> BlockLists:
        """See `Selector`."""
        rows = self.rows
        if rows.block_ids.shape[0] > 1:
            heads = chunks.q_heads
            own = slice(heads.start // self.heads_per_row, heads.stop // self.heads_per_row)
            rows = BlockLists(rows.block_ids[own], rows.block_counts[own])
        return gather_rows(rows, chunks.tiles)
