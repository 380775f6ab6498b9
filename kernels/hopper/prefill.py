"""Prefill attention on Hopper: the launcher of the Gluon kernel, for the calls that it serves.

It has been compiled for compute capability 9.0 and has not run on a GPU yet, so nothing calls it but its tests.
"""

from functools import lru_cache

import torch
from farspan.kernels.batch import PagedBatch
from farspan.kernels.hopper.prefill_kernel import BLOCK_N, hopper_prefill_kernel
from farspan.kernels.prefill import LOG2_E, has_row_view, num_rows
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.tiles import BlockLists, PrefillTiles
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Buffers of keys and of values: two of each fill what the multiprocessor has beside the query. Compiled only.
STAGES = 2
# Pages that need several copies for a tile of keys.
SMALL_PAGES = (16, 32, 64)


def supports(query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, block_size: int) -> bool:
    """Whether `hopper_prefill` serves these tensors, apart from the device and the work that they are for.
"""
    page_size, head_dim = key_pages.shape[2:]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and head_dim in (64, 128)
        and block_size == BLOCK_N.value
        and (page_size % BLOCK_N.value == 0 or page_size in SMALL_PAGES)
        and query.stride(0) % 8 == query.stride(1) % 8 == query.data_ptr() % 16 == 0
        and has_row_view(key_pages, value_pages)
    )


def hopper_prefill(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    batch: PagedBatch,
    tiles: PrefillTiles,
    scale: float,
    *,
    block_lists: BlockLists | None,
    causal: bool,
    turn: Turn | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads_in_a_row: int | None = None,
) -> None:
    """Write `out` and `lse`; arguments as in `prefill_attention`, and such that `supports` holds.

    heads_in_a_row: query heads whose programs of one tile are neighbours, a divisor of their number; those of two KV
        heads when None, which kept the keys of neighbours in the cache in prototypes (H100 80GB, 2026-11-22).
    """
    assert supports(query, key_pages, value_pages, tiles.block_size)
    if tiles.num_tiles == 0:
        return
    num_heads = query.shape[1]
    _, num_kv_heads, page_size, _ = key_pages.shape
    group_size = num_heads // num_kv_heads
    max_pages = batch.block_table.shape[1]
    paged = max_pages > 1
    box = min(page_size, BLOCK_N.value) if paged else BLOCK_N.value
    stride_page, stride_head, stride_token, _ = key_pages.stride()
    heads_per_list = num_heads // block_lists.block_ids.shape[0] if block_lists is not None else group_size
    hopper_prefill_kernel[(num_heads * tiles.num_tiles,)](
        tile_descriptor(key_pages, box),
        tile_descriptor(value_pages, box),
        query,
        out,
        lse,
        batch.block_table,
        batch.kv_lens,
        batch.query_start_loc,
        batch.first_pos,
        tiles.tile_request,
        tiles.tile_block,
        block_lists.block_ids if block_lists is not None else None,
        block_lists.block_counts if block_lists is not None else None,
        turn.cos if turn is not None else None,
        turn.sin if turn is not None else None,
        scale * LOG2_E,
        turn.offset if turn is not None else 0,
        tiles.num_tiles,
        block_lists.block_ids.shape[2] if block_lists is not None else 0,
        group_size,
        heads_per_list,
        heads_in_a_row or (2 if num_kv_heads % 2 == 0 else 1) * group_size,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        batch.block_table.stride(0),
        stride_page // stride_token,
        stride_head // stride_token,
        PAGE_SIZE=page_size if paged else 0,
        HALF_ROTARY=turn.cos.shape[0] if turn is not None else 1,
        IS_NEOX=turn.is_neox if turn is not None else True,
        HAS_LISTS=block_lists is not None,
        HAS_TURN=turn is not None,
        SLOPE=turn.slope if turn is not None else 1,
        HAS_FIRST_POS=batch.first_pos is not None,
        IS_CAUSAL=causal,
        STAGES=STAGES,
        num_warps=4,
    )


def tile_descriptor(cache: torch.Tensor, box: int) -> TensorDescriptor:
    """The copy engine's view of a cache as [num_rows, head_dim] in boxes of `box` rows; reads outside give zero."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(_descriptor_fields(cache.shape, cache.stride(), cache.dtype, box), base=cache)
    return descriptor


@lru_cache
def _descriptor_fields(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, box: int) -> dict[str, object]:
    """All of a descriptor but its tensor, checked by Triton once."""
    rows = num_rows(shape, strides, dtype.itemsize)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    like = torch.empty(8, dtype=dtype)
    return dict(vars(TensorDescriptor(like, [rows, shape[3]], [strides[2], 1], [box, shape[3]], layout)))
