"""Which KV blocks a prompt reads: the seam between the attention impl and the sparse prefill methods.

An impl holds one `SparsePrefill` per layer, or none; it asks it for block lists and launches the kernel with them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from farspan.engine_ext.block_sparse import load_mask_blocks, pattern_blocks
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.metadata import PrefillGroup
from farspan.kernels.tiles import BlockLists


@dataclass(frozen=True)
class LayerShape:
    """What a method may need to know about the layer that it selects for."""

    layer_index: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    max_seq_len: int
    """max_model_len of the engine."""
    tp_rank: int
    tp_size: int
    """The layer holds heads [tp_rank * num_q_heads, (tp_rank + 1) * num_q_heads) of tp_size * num_q_heads."""


class SparsePrefill(Protocol):
    """Chooses blocks for one layer; holds that layer's state (measured budgets, masks), if any."""

    def block_lists_for(self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup) -> BlockLists | None:
        """The blocks that each tile of `group.tiles` reads, or None for all causal blocks.

        query: [group.num_tokens, num_q_heads, head_dim], the group's tokens only.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], holding the group's own keys already.
        Runs on the device without waiting for it.
        """
        ...


def make_sparse_prefill(prefill: Prefill, layer: LayerShape) -> SparsePrefill | None:
    """The selector of one layer; None for dense. Raises ConfigError for a method that cannot be served."""
    if isinstance(prefill, DensePrefill):
        return None
    if isinstance(prefill, FlexPrefill):
        raise ConfigError("prefill.method='flex' is not available yet; allowed: 'dense'. Leave prefill out.")
    assert isinstance(prefill, BlockSparsePrefill)
    if prefill.pattern != "file":
        return pattern_blocks(prefill)
    return load_mask_blocks(
        prefill,
        layer_index=layer.layer_index,
        num_q_heads=layer.num_q_heads,
        num_kv_heads=layer.num_kv_heads,
        tp_rank=layer.tp_rank,
        tp_size=layer.tp_size,
        max_seq_len=layer.max_seq_len,
    )
