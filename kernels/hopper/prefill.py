"""Prefill attention on Hopper: how the launcher of prefill launches the Gluon kernel."""

import torch
from farspan.kernels.batch import PagedBatch
from farspan.kernels.hopper.prefill_kernel import hopper_prefill_kernel
from farspan.kernels.hopper.tile_steps import BLOCK_N
from farspan.kernels.repeated_launch import RepeatedLaunch
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.row_view import RowView, num_rows
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import HopperPrefillConfig
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HALVES_REGISTERS = 80
"""Of a thread at entry: two programs of 384 threads share the 65,536 of a multiprocessor."""


def hopper_launch(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    batch: PagedBatch,
    tiles: PrefillTiles,
    block_lists: BlockLists | None,
    causal: bool,
    turn: Turn | None,
    config: HopperPrefillConfig,
) -> tuple[RowView, RepeatedLaunch]:
    """How the layers of a step see their caches, and their launch.

    The arguments are those of `prefill_attention`, which has checked them, and such as `tuning.hopper_prefill_config`
    takes. A call of the launch brings query, keys, values, out, lse, block ids and counts, a turn's cosines and sines,
    and the factor on the logits, times log2(e).
    """
    assert tiles.block_size == BLOCK_N.value
    num_heads = query.shape[1]
    _, num_kv_heads, page_size, _ = key_pages.shape
    group_size = num_heads // num_kv_heads
    paged = batch.block_table.shape[1] > 1
    stride_page, stride_head, stride_token, _ = key_pages.stride()
    heads_per_list, max_blocks = group_size, 0
    if block_lists is not None:
        heads_per_list, max_blocks = num_heads // block_lists.block_ids.shape[0], block_lists.block_ids.shape[2]
    assert num_heads % config.heads_in_a_row == 0
    assert not (config.in_halves and turn is not None)
    launch = RepeatedLaunch(
        hopper_prefill_kernel,
        (num_heads * tiles.num_tiles,),
        (
            "query_ptr",
            "keys",
            "values",
            "out_ptr",
            "lse_ptr",
            "block_ids_ptr",
            "block_counts_ptr",
            "cos_ptr",
            "sin_ptr",
            "scale_log2",
        ),
        {
            "block_table_ptr": batch.block_table,
            "kv_lens_ptr": batch.kv_lens,
            "query_start_loc_ptr": batch.query_start_loc,
            "first_pos_ptr": batch.first_pos,
            "tile_request_ptr": tiles.tile_request,
            "tile_block_ptr": tiles.tile_block,
            "turn_offset": turn.offset if turn is not None else 0,
            "num_tiles": tiles.num_tiles,
            "max_blocks": max_blocks,
            "group_size": group_size,
            "heads_per_list": heads_per_list,
            "heads_in_a_row": config.heads_in_a_row,
            "stride_query_token": query.stride(0),
            "stride_query_head": query.stride(1),
            "stride_out_token": out.stride(0),
            "stride_out_head": out.stride(1),
            "stride_lse_head": lse.stride(0),
            "stride_block_table": batch.block_table.stride(0),
            "page_rows": stride_page // stride_token,
            "head_rows": stride_head // stride_token,
            "PAGE_SIZE": page_size if paged else 0,
            "HALF_ROTARY": turn.cos.shape[0] if turn is not None else 1,
            "IS_NEOX": turn.is_neox if turn is not None else True,
            "HAS_LISTS": block_lists is not None,
            "HAS_TURN": turn is not None,
            "SLOPE": turn.slope if turn is not None else 1,
            "HAS_FIRST_POS": batch.first_pos is not None,
            "IS_CAUSAL": causal,
            "STAGES": config.num_stages,
            "HALVES": config.in_halves,
        },
        num_warps=4,
        **({"maxnreg": HALVES_REGISTERS} if config.in_halves else {}),
    )
    return tile_view(key_pages, min(page_size, BLOCK_N.value) if paged else BLOCK_N.value), launch


def tile_view(like: torch.Tensor, box: int) -> RowView:
    """The copy engine's view of caches as rows, in boxes of `box` tokens in the layout that the tensor cores read.

    like: [num_pages, num_kv_heads, page_size, head_dim], of 16 bits, a cache that has a row view.
    """
    rows = num_rows(like.shape, like.stride(), like.element_size())
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return RowView(TensorDescriptor(like, [rows, like.shape[3]], [like.stride(2), 1], [box, like.shape[3]], layout))
