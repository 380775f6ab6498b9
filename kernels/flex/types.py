"""What the stages of the dynamic block selection hand to each other."""

from dataclasses import dataclass

import torch
from farspan.kernels.tiles import BlockLists, PrefillTiles

SUB_BLOCKS = 8
"""A tile of probabilities is looked at as an 8 x 8 grid to tell columns from diagonals."""
NO_LIMIT = 1 << 30
TINY = 1e-30


@dataclass(frozen=True)
class FlexEstimate:
    """Attention of the representative queries, summed over blocks.

    The representative queries of a request are the last `min(query_len, block_size)` tokens of its chunk. They lie in
    the last query tile and, where the chunk does not end on a block boundary, in the one before it.
    """

    tile_mass: torch.Tensor
    """[2, num_q_heads, num_selected, num_blocks] float32: share of all their attention mass that falls on a KV block,
    from the queries of the tile before the last (0) and of the last (1). Together they sum to 1."""
    column_share: torch.Tensor
    """[num_q_heads, num_selected, num_blocks] float32 in [0, 1]: how far the mass in a block stands in columns (1)
    rather than along diagonals (0)."""
    pooled_logits: torch.Tensor
    """[2, num_q_heads, num_selected, num_blocks] float32: scaled product of the mean representative query of each of
    the two tiles and the block's mean key. Apart, because query-aware lists pool tile by tile as well."""


@dataclass(frozen=True)
class FlexSelection:
    """Block lists and what they were chosen by."""

    block_lists: BlockLists
    is_query_aware: torch.Tensor
    """[num_q_heads, num_selected] bool."""
    divergence: torch.Tensor
    """[num_q_heads, num_selected] float32: sqrt(Jensen-Shannon divergence), natural log; at most 0.833."""

    def density(self, tiles: PrefillTiles, requests: torch.Tensor) -> torch.Tensor:
        """Blocks listed over causal blocks, [num_list_heads, num_selected] float32, without a host sync."""
        counts = self.block_lists.block_counts
        slots = torch.searchsorted(requests, tiles.tile_request)
        kept = torch.zeros(counts.shape[0], len(requests), device=counts.device)
        kept.index_add_(1, slots, counts.float())
        causal = torch.zeros(len(requests), device=counts.device).index_add_(0, slots, tiles.tile_block.float() + 1)
        return kept / causal
