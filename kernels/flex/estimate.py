"""Attention of the representative queries, summed over blocks while the keys stream by: two passes over the pages.

The first pass finds every representative query's log-sum-exp, the second adds up its probabilities. Nothing larger
than one number per block and head is written. The query heads of a KV head run side by side on the same keys, so that
the keys leave device memory once per pass and reach the others from L2.
"""

import torch
import triton
import triton.language as tl
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.types import SUB_BLOCKS, FlexEstimate
from farspan.kernels.rotary_turn import Turn, rotate_tile
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from farspan.kernels.tuning import (
    ESTIMATE_PROGRAMS,
    SHARED_MEMORY_KIB,
    SMALLEST_SHARED_MEMORY_KIB,
    device_capability,
)


@triton.jit
def _load_keys(
    cache_ptr,
    block_table_ptr,
    stride_page,
    stride_token,
    start,
    kv_len,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Keys of positions [start, start + BLOCK_N) as [BLOCK_D, BLOCK_N], zero past kv_len; cache_ptr is the head's."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    valid = start + offs_n < kv_len
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(block_table_ptr + start // PAGE_SIZE).to(tl.int64)
        rows = page * stride_page + (start % PAGE_SIZE + offs_n).to(tl.int64) * stride_token
    else:
        page = tl.load(block_table_ptr + (start + offs_n) // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
        rows = page * stride_page + ((start + offs_n) % PAGE_SIZE).to(tl.int64) * stride_token
    mask = valid[None, :] & (offs_d[:, None] < HEAD_DIM)
    return tl.load(cache_ptr + rows[None, :] + offs_d[:, None], mask=mask, other=0.0)


@triton.jit
def _load_rows(
    query_ptr,
    stride_query_token,
    first_row,
    num_rows,
    cos_ptr,
    sin_ptr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """Query rows [first_row, first_row + num_rows) of one head as [BLOCK_M, BLOCK_D], zero beyond.

    Returns them as they are and turned; the same where HALF_ROTARY is 0.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m[:, None] < num_rows) & (offs_d[None, :] < HEAD_DIM)
    rows = (first_row + offs_m).to(tl.int64) * stride_query_token
    query_ptrs = query_ptr + rows[:, None] + offs_d[None, :]
    query = tl.load(query_ptrs, mask=mask, other=0.0)
    turned = query
    if HALF_ROTARY > 0:
        turned = rotate_tile(query, query_ptrs, cos_ptr, sin_ptr, mask, HALF_ROTARY, IS_NEOX, BLOCK_D)
    return query, turned


@triton.jit
def _logits(
    query, turned, key, position, key_position, turn_offset, scale, HALF_ROTARY: tl.constexpr, SLOPE: tl.constexpr
):
    """Scaled logits in base 2; keys below the turn's bound meet the turned query."""
    # Of float8 pages; others have the query's dtype.
    key = key.to(query.dtype)
    logits = tl.dot(query, key, input_precision="ieee")
    if HALF_ROTARY > 0:
        is_plain = key_position >= SLOPE * position + turn_offset
        logits = tl.where(is_plain, logits, tl.dot(turned, key, input_precision="ieee"))
    return logits * (scale * 1.4426950408889634)


@triton.jit
def _chunk_end(kv_lens_ptr, query_start_loc_ptr, first_pos_ptr, request, HAS_FIRST_POS: tl.constexpr):
    """Number of keys, row of `query` after the chunk's last, and position after its last query, of one request."""
    kv_len = tl.load(kv_lens_ptr + request)
    query_end = tl.load(query_start_loc_ptr + request + 1)
    chunk_end = kv_len
    if HAS_FIRST_POS:
        chunk_end = tl.load(first_pos_ptr + request) + query_end - tl.load(query_start_loc_ptr + request)
    return kv_len, query_end, chunk_end


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _lse_kernel(
    query_ptr,
    cache_ptr,
    block_table_ptr,
    kv_lens_ptr,
    query_start_loc_ptr,
    first_pos_ptr,
    cos_ptr,
    sin_ptr,
    max_ptr,
    sum_ptr,
    pooled_logits_ptr,
    scale,
    turn_offset,
    stride_query_token,
    stride_query_head,
    stride_page,
    stride_cache_head,
    stride_token,
    stride_block_table,
    num_reqs,
    num_blocks,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    SLOPE: tl.constexpr,
    HAS_FIRST_POS: tl.constexpr,
):
    """Running maximum (base 2) and sum of every representative query over one split of the keys.

    Writes max, sum [num_splits, num_q_heads, num_reqs, BLOCK] and the pooled logits of the split's blocks.
    """
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len, query_end, chunk_end = _chunk_end(kv_lens_ptr, query_start_loc_ptr, first_pos_ptr, request, HAS_FIRST_POS)
    num_rows = tl.minimum(query_end - tl.load(query_start_loc_ptr + request), BLOCK)
    query_ptr += head * stride_query_head
    query, turned = _load_rows(
        query_ptr, stride_query_token, query_end - num_rows, num_rows, cos_ptr, sin_ptr,
        BLOCK, HEAD_DIM, BLOCK_D, HALF_ROTARY, IS_NEOX,
    )  # fmt: skip
    cache_ptr += (head // GROUP).to(tl.int64) * stride_cache_head
    block_table_ptr += request.to(tl.int64) * stride_block_table
    row_pos = chunk_end - num_rows + tl.arange(0, BLOCK)
    in_last = row_pos // BLOCK == (chunk_end - 1) // BLOCK
    rows_in_last = tl.minimum((chunk_end - 1) % BLOCK + 1, num_rows)
    out_row = (head * num_reqs + request).to(tl.int64)
    second_row = (tl.num_programs(0) * num_reqs).to(tl.int64) + out_row

    blocks_per_split = tl.cdiv(tl.cdiv(kv_len, BLOCK), tl.num_programs(1))
    low = split * blocks_per_split
    high = tl.minimum(low + blocks_per_split, tl.cdiv(kv_len, BLOCK))
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(low, high):
        start = block * BLOCK
        key = _load_keys(
            cache_ptr, block_table_ptr, stride_page, stride_token, start, kv_len, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE
        )
        key_pos = start + tl.arange(0, BLOCK)
        logits = _logits(query, turned, key, row_pos[:, None], key_pos[None, :], turn_offset, scale, HALF_ROTARY, SLOPE)
        # Rows and keys that do not exist are zero: the mean over the rest needs no mask.
        row_mean = tl.sum(logits, 1) * (0.6931471805599453 / tl.minimum(kv_len - start, BLOCK))
        before_last = tl.sum(tl.where(in_last, 0.0, row_mean)) / tl.maximum(num_rows - rows_in_last, 1)
        tl.store(pooled_logits_ptr + out_row * num_blocks + block, before_last)
        last = tl.sum(tl.where(in_last, row_mean, 0.0)) / rows_in_last
        tl.store(pooled_logits_ptr + second_row * num_blocks + block, last)
        logits = tl.where(key_pos[None, :] <= row_pos[:, None], logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        # Rows with no visible key in this split have the maximum -inf: keep -inf - -inf out of exp2.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        maximum = new_maximum
    out = ((split * tl.num_programs(0) * num_reqs).to(tl.int64) + out_row) * BLOCK + tl.arange(0, BLOCK)
    tl.store(max_ptr + out, maximum)
    tl.store(sum_ptr + out, total)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _mass_kernel(
    query_ptr,
    cache_ptr,
    block_table_ptr,
    kv_lens_ptr,
    query_start_loc_ptr,
    first_pos_ptr,
    cos_ptr,
    sin_ptr,
    max_ptr,
    sum_ptr,
    tile_mass_ptr,
    column_share_ptr,
    scale,
    turn_offset,
    stride_query_token,
    stride_query_head,
    stride_page,
    stride_cache_head,
    stride_token,
    stride_block_table,
    num_reqs,
    num_blocks,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    SLOPE: tl.constexpr,
    HAS_FIRST_POS: tl.constexpr,
    SUB: tl.constexpr,
):
    """Block sums of the probabilities; grid and splits as in `_lse_kernel`, whose results it combines first."""
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len, query_end, chunk_end = _chunk_end(kv_lens_ptr, query_start_loc_ptr, first_pos_ptr, request, HAS_FIRST_POS)
    num_rows = tl.minimum(query_end - tl.load(query_start_loc_ptr + request), BLOCK)
    query_ptr += head * stride_query_head
    query, turned = _load_rows(
        query_ptr, stride_query_token, query_end - num_rows, num_rows, cos_ptr, sin_ptr,
        BLOCK, HEAD_DIM, BLOCK_D, HALF_ROTARY, IS_NEOX,
    )  # fmt: skip
    cache_ptr += (head // GROUP).to(tl.int64) * stride_cache_head
    block_table_ptr += request.to(tl.int64) * stride_block_table
    offs_m = tl.arange(0, BLOCK)
    row_pos = chunk_end - num_rows + offs_m
    out_row = (head * num_reqs + request).to(tl.int64)
    split_size = (tl.num_programs(0) * num_reqs).to(tl.int64) * BLOCK

    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    for part in range(tl.num_programs(1)):
        maximum = tl.maximum(maximum, tl.load(max_ptr + part * split_size + out_row * BLOCK + offs_m))
    maximum = tl.where(offs_m < num_rows, maximum, 0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(tl.num_programs(1)):
        offs = part * split_size + out_row * BLOCK + offs_m
        total += tl.load(sum_ptr + offs) * tl.exp2(tl.load(max_ptr + offs) - maximum)
    lse = tl.where(offs_m < num_rows, maximum + tl.log2(total), 0.0)

    offs_grid = tl.arange(0, SUB * SUB)
    on_diagonal = (offs_grid % SUB - offs_grid // SUB + SUB)[:, None] == tl.arange(0, 2 * SUB)[None, :]
    num_used = tl.cdiv(kv_len, BLOCK)
    blocks_per_split = tl.cdiv(num_used, tl.num_programs(1))
    low = split * blocks_per_split
    for block in range(low, tl.minimum(low + blocks_per_split, num_used)):
        start = block * BLOCK
        key = _load_keys(
            cache_ptr, block_table_ptr, stride_page, stride_token, start, kv_len, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE
        )
        key_pos = start + tl.arange(0, BLOCK)
        logits = _logits(query, turned, key, row_pos[:, None], key_pos[None, :], turn_offset, scale, HALF_ROTARY, SLOPE)
        causal = (key_pos[None, :] <= row_pos[:, None]) & (offs_m < num_rows)[:, None]
        mass = tl.where(causal, tl.exp2(logits - lse[:, None]), 0.0) / num_rows
        by_columns = tl.sum(tl.reshape(mass, (BLOCK, SUB, BLOCK // SUB)), 2)
        row_mass = tl.sum(by_columns, 1)
        in_last = row_pos // BLOCK == (chunk_end - 1) // BLOCK
        before_last = tl.sum(tl.where(in_last, 0.0, row_mass))
        last = tl.sum(tl.where(in_last, row_mass, 0.0))
        grid = tl.sum(tl.reshape(by_columns, (SUB, BLOCK // SUB, SUB)), 1) / tl.maximum(before_last + last, 1e-30)
        columns = tl.sum(grid, 0)
        diagonals = tl.sum(tl.where(on_diagonal, tl.reshape(grid, (SUB * SUB,))[:, None], 0.0), 0)
        column_sq = tl.sum(columns * columns)
        diagonal_sq = tl.sum(diagonals * diagonals)
        share = column_sq * column_sq / tl.maximum(column_sq * column_sq + diagonal_sq * diagonal_sq, 1e-30)
        tl.store(tile_mass_ptr + out_row * num_blocks + block, before_last)
        second = (tl.num_programs(0) * num_reqs).to(tl.int64) + out_row
        tl.store(tile_mass_ptr + second * num_blocks + block, last)
        tl.store(column_share_ptr + out_row * num_blocks + block, share)


def estimate(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    num_blocks: int,
    block_size: int,
    scale: float,
    *,
    turn: Turn | None = None,
    num_splits: int | None = None,
) -> FlexEstimate:
    """Sum the representative queries' attention over blocks; arguments as in `flex_block_lists`.

    num_blocks: host-side upper bound of the requests' KV blocks. num_splits: parts of the keys that run in parallel.
    """
    num_heads, head_dim = query.shape[1:]
    num_reqs = batch.num_reqs
    assert query.stride(-1) == 1
    assert kv.pages.stride(-1) == 1
    if num_splits is None:
        num_splits = max(1, min(-(-ESTIMATE_PROGRAMS // (num_heads * num_reqs)), num_blocks))
    shape = (num_heads, num_reqs, num_blocks)
    tile_mass = query.new_zeros((2, *shape), dtype=torch.float32)
    column_share = query.new_full(shape, 0.5, dtype=torch.float32)
    pooled_logits = query.new_full((2, *shape), float("-inf"), dtype=torch.float32)
    maximum = query.new_empty((num_splits, num_heads, num_reqs, block_size), dtype=torch.float32)
    total = torch.empty_like(maximum)
    grid = (num_heads, num_splits, num_reqs)
    cos, sin = (query, query) if turn is None else (turn.cos, turn.sin)
    tensors = (
        query,
        kv.pages,
        batch.block_table,
        batch.kv_lens,
        batch.query_start_loc,
        batch.first_pos,
        cos,
        sin,
        maximum,
        total,
    )
    scalars = (
        scale,
        0 if turn is None else turn.offset,
        query.stride(0),
        query.stride(1),
        kv.pages.stride(0),
        kv.pages.stride(1),
        kv.pages.stride(2),
        batch.block_table.stride(0),
        num_reqs,
        num_blocks,
    )
    block_d = max(triton.next_power_of_2(head_dim), 16)
    shapes = {
        "GROUP": num_heads // kv.num_kv_heads,
        "BLOCK": block_size,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "PAGE_SIZE": kv.page_size,
        "HAS_FIRST_POS": batch.first_pos is not None,
        **turn_shapes(turn),
        "num_warps": 8 if block_size == 128 else 4,
        "num_stages": _num_stages(query.device, block_size * block_d * query.element_size(), 1 if turn is None else 2),
    }
    _lse_kernel[grid](*tensors, pooled_logits, *scalars, **shapes)
    _mass_kernel[grid](*tensors, tile_mass, column_share, *scalars, **shapes, SUB=SUB_BLOCKS)
    return FlexEstimate(tile_mass, column_share, pooled_logits)


def _num_stages(device: torch.device, tile_bytes: int, num_query_tiles: int) -> int:
    """Key tiles in flight: up to 3, as shared memory has room beside the queries."""
    room = SHARED_MEMORY_KIB.get(device_capability(device), SMALLEST_SHARED_MEMORY_KIB) * 1024
    return max(1, min(room // tile_bytes - num_query_tiles, 3))


def turn_shapes(turn: Turn | None) -> dict[str, int | bool]:
    """Compile-time parameters of the turned query."""
    if turn is None:
        return {"HALF_ROTARY": 0, "IS_NEOX": True, "SLOPE": 1}
    return {"HALF_ROTARY": len(turn.cos), "IS_NEOX": turn.is_neox, "SLOPE": turn.slope}
