"""Block-sparse prefill attention on paged KV, one pass, with LSE.

A query tile reads the KV blocks of its list; dense attention is the list of all blocks it may see. Sources:
FlashAttention-2 (arXiv 2307.08691), FlexPrefill (arXiv 2502.20766) for block lists, STRING (arXiv 2410.18745) for the
turned query.
"""

import math

import torch
import triton
from farspan.kernels.batch import FP8, KVView, PagedBatch
from farspan.kernels.prefill_kernel import prefill_kernel
from farspan.kernels.repeated_launch import RepeatedLaunch
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.row_view import RowView, has_row_view, row_view
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import (
    HopperPrefillConfig,
    PrefillConfig,
    device_capability,
    hopper_prefill_config,
    prefill_config,
)

LOG2_E = 1.4426950408889634


def paged_prefill(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles,
    scale: float,
    *,
    block_lists: BlockLists | None = None,
    causal: bool = True,
    turn: Turn | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill attention of a varlen batch on paged KV.

    kv: pages of the query's dtype or float8_e4m3fn. The other arguments, the result and the sources are those of
    `prefill_attention`.
    """
    key_pages, value_pages = kv.split()
    return prefill_attention(
        query,
        key_pages,
        value_pages,
        batch,
        tiles,
        scale,
        block_lists=block_lists,
        causal=causal,
        turn=turn,
        out=out,
        lse=lse,
        value_scale=kv.value_scale,
    )


def prefill_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    batch: PagedBatch,
    tiles: PrefillTiles,
    scale: float,
    *,
    block_lists: BlockLists | None = None,
    causal: bool = True,
    turn: Turn | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    value_scale: float = 1.0,
    config: PrefillConfig | HopperPrefillConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill attention of a varlen batch on keys and values in pages.

    query: [num_tokens, num_q_heads, head_dim], float16, bfloat16 or float32; the last axis contiguous. The chunk's own
        keys are in their pages already.
    key_pages, value_pages: [num_pages, num_kv_heads, page_size, head_dim], of the query's dtype or float8_e4m3fn, with
        equal strides, the last axis contiguous. A contiguous tensor is a cache in which each sequence is one page: with
        one column in the block table, page_size may be any number.
    batch: the requests; its `max_query_len` decides how many tokens a program computes.
    tiles: the query tiles to compute. For other tokens the query is not read, and `out` and `lse` are not written.
    scale: factor on the logits, that of stored keys included, above 0.
    block_lists: the KV blocks that each tile reads, none past the request's keys. None means all that it may see.
    causal: a query at position p sees keys [0, p]; otherwise [0, kv_len).
    turn: keys below its bound meet the turned query.
    out: [num_tokens, num_q_heads, head_dim], last axis contiguous; lse: [num_q_heads, num_tokens] float32, rows
        contiguous; either is allocated when None.
    value_scale: what stored values are multiplied by; only for float8.
    config: which kernel, and its tile shapes; those of `tuning.hopper_prefill_config`, or else of
        `tuning.prefill_config`, when None.
    Returns out and lse (natural log; -inf with zero output where a query sees no key).
    Source: module docstring.
    """
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if lse is None:
        lse = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=query.device)
    if tiles.num_tiles == 0:
        return out, lse
    ids = counts = cos = sin = turned = lists = None
    if block_lists is not None:
        ids, counts = block_lists.block_ids, block_lists.block_counts
        lists = (ids.shape, ids.stride(), counts.stride())
    if turn is not None:
        cos, sin, turned = turn.cos, turn.sin, (turn.cos.shape, turn.is_neox, turn.slope, turn.offset)
    tensors = (query, key_pages, value_pages, out, lse)
    on_rows = (key_pages.data_ptr() | value_pages.data_ptr()) % 16 == 0
    kinds = tuple((each.shape, each.stride(), each.dtype) for each in tensors)
    assert scale > 0
    assert key_pages.dtype == FP8 or value_scale == 1.0
    # Not the scales: with those of a checkpoint's float8 pages every layer would have a launch of its own.
    key = ("prefill", kinds, on_rows, lists, turned, causal, config)
    made: _TiledLaunch | None = batch.launches.get(key)
    if made is None or made.tiles is not tiles:
        made = _TiledLaunch(*tensors, batch, tiles, block_lists, causal, turn, config)
        batch.launches[key] = made
    rows = made.rows
    keys, values = (key_pages, value_pages) if rows is None else (rows.of(key_pages), rows.of(value_pages))
    of_layer = (query, keys, values, out, lse, ids, counts, cos, sin, scale * LOG2_E)
    if isinstance(made.config, HopperPrefillConfig):
        made.launch(*of_layer)
    else:
        # None is no argument: with one more, the compiler gives the 16-bit kernels other registers.
        made.launch(*of_layer, value_scale if key_pages.dtype == FP8 else None)
    return out, lse


class _TiledLaunch:
    """What the layers of a step share in a call of `prefill_attention`, whose arguments these are."""

    def __init__(
        self,
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
        config: PrefillConfig | HopperPrefillConfig | None,
    ) -> None:
        num_tokens, num_heads, head_dim = query.shape
        _, num_kv_heads, page_size, _ = key_pages.shape
        assert num_heads % num_kv_heads == 0
        assert key_pages.shape == value_pages.shape
        assert key_pages.stride() == value_pages.stride()
        assert key_pages.dtype == value_pages.dtype
        is_fp8 = key_pages.dtype == FP8
        assert is_fp8 or key_pages.dtype == query.dtype
        assert query.stride(-1) == key_pages.stride(-1) == batch.block_table.stride(-1) == 1
        assert out.shape == query.shape
        assert lse.shape == (num_heads, num_tokens)
        assert lse.dtype == torch.float32
        assert out.stride(-1) == lse.stride(-1) == 1
        group_size = num_heads // num_kv_heads
        num_list_heads = num_kv_heads
        max_blocks = 0
        if block_lists is not None:
            num_list_heads, num_tiles, max_blocks = block_lists.block_ids.shape
            assert num_tiles == tiles.num_tiles
            assert num_heads % num_list_heads == 0
            assert block_lists.block_ids.is_contiguous()
            assert block_lists.block_counts.is_contiguous()
        heads_per_list = num_heads // num_list_heads
        max_pages = batch.block_table.shape[1]
        paged = max_pages > 1
        tokens_per_tile = min(tiles.block_size, batch.max_query_len)
        # float8 passes through registers to be converted, which is what the copy engine would spare it.
        has_rows = not is_fp8 and has_row_view(key_pages, value_pages)
        capability = device_capability(query.device)
        if config is None and has_rows:
            config = hopper_prefill_config(
                head_dim,
                query.dtype,
                capability,
                block_size=tiles.block_size,
                page_size=page_size if paged else 0,
                tokens_per_tile=tokens_per_tile,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                has_turn=turn is not None,
                has_lists=block_lists is not None,
            )
        if config is None:
            config = prefill_config(
                head_dim,
                query.dtype,
                capability,
                block_size=tiles.block_size,
                tokens_per_tile=tokens_per_tile,
                # Heads may share a program when they share keys, values and list.
                heads_that_share=group_size if heads_per_list % group_size == 0 else 1,
                keys_in_a_row=(math.gcd(page_size, 128) if paged else 128) if has_rows else 0,
                has_turn=turn is not None,
                has_lists=block_lists is not None,
            )
        self.tiles, self.config = tiles, config
        self.rows: RowView | None = None
        """How the copy engine sees keys and values; None where it is not used."""
        if isinstance(config, HopperPrefillConfig):
            assert not is_fp8
            # Loads Gluon, which other devices do without.
            from farspan.kernels.hopper.prefill import hopper_launch

            self.rows, self.launch = hopper_launch(
                query, key_pages, value_pages, out, lse, batch, tiles, block_lists, causal, turn, config
            )
            return
        block_n = config.block_n
        assert tiles.block_size % block_n == 0
        assert group_size % config.heads_per_tile == 0
        block_d = triton.next_power_of_2(head_dim)
        stride_page, stride_head, stride_token, _ = key_pages.stride()
        if config.use_tma:
            assert not paged or page_size % block_n == 0
            assert has_rows
            self.rows = row_view(key_pages, block_n, block_d)
            stride_page, stride_head = stride_page // stride_token, stride_head // stride_token

        num_pieces = triton.cdiv(tokens_per_tile, config.block_t)
        num_units = num_heads // config.heads_per_tile
        self.launch = RepeatedLaunch(
            prefill_kernel,
            (num_units * num_pieces * tiles.num_tiles,),
            (
                "query_ptr",
                "key_source",
                "value_source",
                "out_ptr",
                "lse_ptr",
                "block_ids_ptr",
                "block_counts_ptr",
                "cos_ptr",
                "sin_ptr",
                "scale_log2",
                "value_scale",
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
                "num_pieces": num_pieces,
                "max_blocks": max_blocks,
                "group_size": group_size,
                "heads_per_list": heads_per_list,
                "units_per_group": group_size // config.heads_per_tile,
                "stride_query_token": query.stride(0),
                "stride_query_head": query.stride(1),
                "stride_out_token": out.stride(0),
                "stride_out_head": out.stride(1),
                "stride_lse_head": lse.stride(0),
                # Of one column None, which is no argument: with one more, the compiler gives other registers.
                "stride_block_table": None if batch.block_table.stride(0) == 1 else batch.block_table.stride(0),
                "stride_page": stride_page,
                "stride_head": stride_head,
                "stride_token": stride_token,
                "BLOCK_SIZE": tiles.block_size,
                "HEAD_DIM": head_dim,
                "BLOCK_D": block_d,
                "BLOCK_T": config.block_t,
                "BLOCK_M": config.block_m,
                "BLOCK_N": block_n,
                "HEADS_PER_TILE": config.heads_per_tile,
                "PAGE_SIZE": page_size if paged else 0,
                "HALF_ROTARY": turn.cos.shape[0] if turn is not None else 1,
                "IS_NEOX": turn.is_neox if turn is not None else True,
                "HAS_LISTS": block_lists is not None,
                "HAS_TURN": turn is not None,
                "SLOPE": turn.slope if turn is not None else 1,
                "HAS_FIRST_POS": batch.first_pos is not None,
                "IS_CAUSAL": causal,
                "USE_TMA": config.use_tma,
                "NARROW_IDS": config.narrow_ids and max_pages * page_size <= 2**16 * tiles.block_size,
                "RECOMPUTES": config.recomputes,
                "IS_FP8": is_fp8,
                "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
