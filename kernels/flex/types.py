"""What the stages of the dynamic block selection hand to each other."""

from dataclasses import dataclass

import torch
from farspan.kernels.tiles import BlockLists

SUB_BLOCKS = 8
"""A tile of probabilities is looked at as an 8 x 8 grid to tell columns from diagonals."""
NO_LIMIT = 1 << 30
TINY = 1e-30


@dataclass(frozen=True)
class FlexEstimate:
    """Attention of the representative queries, summed over blocks.

    The representative queries of a request are the last `min(query_len, block_size)` tokens of its chunk. They are in
    the last query tile and, where the chunk does not end on a block boundary, in the one before it.
    """

    tile_mass: torch.Tensor
    """[2, num_q_heads, num_reqs, num_blocks] float32: share of all their attention mass that falls on a KV block,
    from the queries of the tile before the last (0) and of the last (1). Together they sum to 1."""
    column_share: torch.Tensor
    """[num_q_heads, num_reqs, num_blocks] float32 in [0, 1]: how far the mass in a block is in columns (1)
    rather than along diagonals (0)."""
    pooled_logits: torch.Tensor
    """[2, num_q_heads, num_reqs, num_blocks] float32: scaled product of the mean representative query of each of
    the two tiles and the block's mean key. Apart, because query-aware lists pool tile by tile as well."""


@dataclass(frozen=True)
class FlexSelection:
    """Block lists and what they were chosen by."""

    block_lists: BlockLists
    is_query_aware: torch.Tensor
    """[num_q_heads, num_reqs] bool."""
    divergence: torch.Tensor
    """[num_q_heads, num_reqs] float32: sqrt(Jensen-Shannon divergence), natural log; at most 0.833."""


@dataclass(frozen=True)
class TileSelection:
    """Block lists by sampled rows of every span, and what the rows kept."""

    block_lists: BlockLists
    kept: torch.Tensor
    """[num_q_heads, num_spans] float32: share of the sampled rows' attention mass that is on listed blocks; undefined
    for the spans that are padding."""


@dataclass(frozen=True)
class Budget:
    """How much a selection keeps."""

    gamma: float
    """Attention mass to keep, in (0, 1]; 1 lists all blocks."""
    tau: float
    """Heads select query by query where the divergence is below this; 0 for never."""
    min_blocks: int
    """Blocks of every list, where they exist."""
    max_blocks: int
    """Most blocks of a list: 2 or more, since the first and the diagonal one are always there; or NO_LIMIT."""
    heads_per_list: int = 1
    """Query heads that share a list, the union of theirs."""
