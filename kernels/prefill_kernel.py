"""The device side of `paged_prefill`: one program streams the key tiles of one query tile through a softmax.

Only the last block of a list can need a mask (the diagonal of a causal tile, the ragged end of another), so it has
its own loop and the main loop has no mask. Softmax runs in base 2 with the scale folded in. Sources: FlashAttention-2
(arXiv 2307.08691) for the streaming softmax, STRING (arXiv 2410.18745) for the turned query.
"""

import triton
import triton.language as tl
from farspan.kernels.rotary_turn import rotate_tile
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS

LN_2 = tl.constexpr(0.6931471805599453)
# The maximum of a row that has met no key yet: below any score, and finite, because -inf - -inf is NaN.
LOWEST = tl.constexpr(-1e30)

# Entries of a block list that are compared with the turn's bound at a time.
BLOCKS_COUNTED = tl.constexpr(128)


@triton.jit
def _look_up(ptr, index):
    """Load one int32 as two halves.

    Triton's pipeliner divides its stages among all dependent loads of 32 bits or more. Loads of 16 bits do not count,
    so a look-up of a page takes no buffer from keys and values; from the L1 cache it is fast enough without one.
    """
    halves = (ptr + index).to(tl.pointer_type(tl.uint16))
    return tl.load(halves).to(tl.int32) | (tl.load(halves + 1).to(tl.int32) << 16)


@triton.jit
def _load_key_value(
    key_source,
    value_source,
    table_row_ptr,
    kv_head,
    start,
    kv_end,
    stride_page,
    stride_head,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    USE_TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load the keys and values at positions [start, start + BLOCK_N) of one KV head as [BLOCK_N, BLOCK_D] tiles.

    PAGE_SIZE 0 means one page per request. With USE_TMA the sources are descriptors of rows and the strides count rows.
    MASKED zeroes the values at and past kv_end, which may be NaN in memory.
    """
    offs_n = start + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    # Whether a key tile is within one page.
    ONE_PAGE: tl.constexpr = PAGE_SIZE == 0 or PAGE_SIZE % BLOCK_N == 0
    if ONE_PAGE:
        if PAGE_SIZE == 0:
            page = tl.load(table_row_ptr)
            offset = start
        else:
            page = _look_up(table_row_ptr, start // PAGE_SIZE)
            offset = start % PAGE_SIZE
    else:
        if MASKED:
            page = tl.load(table_row_ptr + offs_n // PAGE_SIZE, mask=offs_n < kv_end, other=0)
        else:
            page = tl.load(table_row_ptr + offs_n // PAGE_SIZE)
        offset = offs_n % PAGE_SIZE

    if USE_TMA:
        # The copy engine takes 32-bit coordinates; the launcher checks that every row has one.
        row = page * stride_page + kv_head * stride_head + offset
        key = key_source.load([row, 0])
        value = value_source.load([row, 0])
        if MASKED:
            value = tl.where((offs_n < kv_end)[:, None], value, 0.0)
    else:
        rows = page.to(tl.int64) * stride_page + kv_head.to(tl.int64) * stride_head
        if ONE_PAGE:
            rows += offset.to(tl.int64) * stride_token
            rows += tl.arange(0, BLOCK_N) * stride_token
        else:
            rows += offset * stride_token
        pointers = rows[:, None] + offs_d[None, :]
        if MASKED or HEAD_DIM != BLOCK_D:
            mask = offs_d[None, :] < HEAD_DIM
            if MASKED:
                mask = mask & (offs_n < kv_end)[:, None]
            key = tl.load(key_source + pointers, mask=mask, other=0.0)
            value = tl.load(value_source + pointers, mask=mask, other=0.0)
        else:
            key = tl.load(key_source + pointers)
            value = tl.load(value_source + pointers)
    return key, value


@triton.jit
def _attend_blocks(
    acc,
    row_max,
    row_sum,
    query,
    position,
    is_near,
    first_step,
    end_step,
    ids_ptr,
    key_source,
    value_source,
    table_row_ptr,
    kv_head,
    kv_end,
    stride_page,
    stride_head,
    stride_token,
    scale_log2,
    turn_offset,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    MASKED: tl.constexpr,
    STRADDLES: tl.constexpr,
    COUNTS_KEYS: tl.constexpr,
    SLOPE: tl.constexpr,
    NARROW_IDS: tl.constexpr,
    RECOMPUTES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stream key tiles [first_step, end_step) of the list into the running softmax; a block is several tiles.

    MASKED: leave out keys past the causal or ragged end. STRADDLES: leave out keys below the turn's bound where
    `is_near` is 1, keys at and past it where it is 0. COUNTS_KEYS: the loop counts keys instead of tiles, which takes
    fewer registers in kernels with a turn and more in the others. NARROW_IDS, RECOMPUTES: see `PrefillConfig`.
    """
    STRIDE: tl.constexpr = BLOCK_N if COUNTS_KEYS else 1
    BLOCK_STRIDE: tl.constexpr = BLOCK_SIZE // BLOCK_N * STRIDE
    for at in tl.range(first_step * STRIDE, end_step * STRIDE, STRIDE, disable_licm=RECOMPUTES):
        if HAS_LISTS:
            # Looked up in the loop: carrying a prefetched id through it crashes Triton 3.6's pipeliner.
            if NARROW_IDS:
                # The lower half.
                block = tl.load((ids_ptr + at // BLOCK_STRIDE).to(tl.pointer_type(tl.uint16))).to(tl.int32)
            else:
                block = _look_up(ids_ptr, at // BLOCK_STRIDE)
            start = block * BLOCK_SIZE + at % BLOCK_STRIDE * (BLOCK_N // STRIDE)
        else:
            start = at * (BLOCK_N // STRIDE)
        key, value = _load_key_value(
            key_source,
            value_source,
            table_row_ptr,
            kv_head,
            start,
            kv_end,
            stride_page,
            stride_head,
            stride_token,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            PAGE_SIZE,
            USE_TMA,
            MASKED,
        )
        # Of float8 pages; others have the query's dtype.
        key = key.to(query.dtype)
        value = value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if MASKED or STRADDLES:
            offs_n = (start + tl.arange(0, BLOCK_N))[None, :]
            if STRADDLES:
                # One comparison per score in both passes: x >= b, or -x >= 1 - b for x < b.
                bound = SLOPE * position + turn_offset
                mask = offs_n * (2 * is_near - 1) >= tl.where(is_near == 1, bound, 1 - bound)[:, None]
                if MASKED:
                    mask = mask & (offs_n < kv_end)
            else:
                mask = offs_n < kv_end
            if MASKED and IS_CAUSAL:
                mask = mask & (offs_n <= position[:, None])
            scores = tl.where(mask, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


# num_pieces is usually 1, and Triton then makes it a constant: heads of 64 need only 128 registers with it, so that
# two programs share a multiprocessor.
@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def prefill_kernel(
    query_ptr,
    key_source,
    value_source,
    out_ptr,
    lse_ptr,
    block_table_ptr,
    kv_lens_ptr,
    query_start_loc_ptr,
    first_pos_ptr,
    tile_request_ptr,
    tile_block_ptr,
    block_ids_ptr,
    block_counts_ptr,
    cos_ptr,
    sin_ptr,
    scale_log2,
    value_scale,
    turn_offset,
    num_tiles,
    num_pieces,
    max_blocks,
    group_size,
    heads_per_list,
    units_per_group,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_lse_head,
    stride_block_table,
    stride_page,
    stride_head,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS_PER_TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    HAS_TURN: tl.constexpr,
    SLOPE: tl.constexpr,
    HAS_FIRST_POS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    NARROW_IDS: tl.constexpr,
    RECOMPUTES: tl.constexpr,
    IS_FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_T tokens of a query tile times HEADS_PER_TILE query heads of one KV head.

    Row m of the program is head slot m // BLOCK_T and token m % BLOCK_T.
    """
    # The longest tiles come first, and heads that share keys and values are neighbours.
    program = tl.program_id(0)
    unit = program % units_per_group
    program = program // units_per_group
    piece = num_pieces - 1 - program % num_pieces
    program = program // num_pieces
    tile = num_tiles - 1 - program % num_tiles
    unit += program // num_tiles * units_per_group
    first_head = unit * HEADS_PER_TILE
    kv_head = first_head // group_size

    request = tl.load(tile_request_ptr + tile)
    query_block = tl.load(tile_block_ptr + tile)
    chunk_offset = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - chunk_offset
    kv_len = tl.load(kv_lens_ptr + request)
    if HAS_FIRST_POS:
        chunk_start = tl.load(first_pos_ptr + request)
        chunk_end = chunk_start + query_len
    else:
        chunk_start = kv_len - query_len
        chunk_end = kv_len
    # Positions [first_position, end_position) are this program's.
    first_position = tl.maximum(query_block * BLOCK_SIZE, chunk_start) + piece * BLOCK_T
    end_position = tl.minimum(tl.minimum(query_block * BLOCK_SIZE + BLOCK_SIZE, chunk_end), first_position + BLOCK_T)
    if first_position >= end_position:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    slot = offs_m // BLOCK_T
    position = first_position + offs_m % BLOCK_T
    mask_m = (position < end_position) & (slot < HEADS_PER_TILE)
    token = (chunk_offset + position - chunk_start).to(tl.int64)
    head = (first_head + slot).to(tl.int64)
    mask_q = mask_m[:, None] & (offs_d[None, :] < HEAD_DIM)
    query_ptrs = query_ptr + (token * stride_query_token + head * stride_query_head)[:, None] + offs_d[None, :]

    if stride_block_table is None:  # 1
        table_row_ptr = block_table_ptr + request.to(tl.int64)
    else:
        table_row_ptr = block_table_ptr + request.to(tl.int64) * stride_block_table
    if IS_CAUSAL:
        kv_end = end_position
        if HAS_FIRST_POS:
            kv_end = tl.minimum(kv_end, kv_len)
    else:
        kv_end = kv_len
    if HAS_LISTS:
        list_index = (first_head // heads_per_list).to(tl.int64) * num_tiles + tile
        ids_ptr = block_ids_ptr + list_index * max_blocks
        num_blocks = tl.load(block_counts_ptr + list_index)
    else:
        ids_ptr = block_ids_ptr
        num_blocks = (kv_end + BLOCK_SIZE - 1) // BLOCK_SIZE
    last = tl.maximum(num_blocks - 1, 0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    TILES_PER_BLOCK: tl.constexpr = BLOCK_SIZE // BLOCK_N

    # Key tiles of the last block past kv_end are not read: there may be no page for them.
    last_block = last
    if HAS_LISTS:
        last_block = tl.load(ids_ptr + last, mask=num_blocks > 0, other=0)
    num_last_keys = tl.minimum(kv_end - last_block * BLOCK_SIZE, BLOCK_SIZE)
    num_last_tiles = tl.where(num_blocks > 0, (num_last_keys + BLOCK_N - 1) // BLOCK_N, 0)
    last_tile = last * TILES_PER_BLOCK
    end_tile = last_tile + num_last_tiles

    if HAS_TURN:
        # Blocks [0, num_far) are before the bound of every query of the program, [num_far, num_turned) before that of
        # some, [num_turned, last) before none: ranges, as lists ascend.
        far_end = SLOPE * first_position + turn_offset
        turned_end = SLOPE * (end_position - 1) + turn_offset
        if HAS_LISTS:
            is_far = tl.zeros([BLOCKS_COUNTED], dtype=tl.int32)
            is_turned = tl.zeros([BLOCKS_COUNTED], dtype=tl.int32)
            for first_index in range(0, last, BLOCKS_COUNTED):
                index = first_index + tl.arange(0, BLOCKS_COUNTED)
                first_key = tl.load(ids_ptr + index, mask=index < last, other=0) * BLOCK_SIZE
                is_far += ((index < last) & (first_key + BLOCK_SIZE <= far_end)).to(tl.int32)
                is_turned += ((index < last) & (first_key < turned_end)).to(tl.int32)
            num_far = tl.sum(is_far, 0)
            num_turned = tl.sum(is_turned, 0)
        else:
            num_far = tl.minimum(tl.maximum(far_end, 0) // BLOCK_SIZE, last)
            num_turned = tl.minimum((tl.maximum(turned_end, 0) + BLOCK_SIZE - 1) // BLOCK_SIZE, last)
        far_tile = num_far * TILES_PER_BLOCK
        near_tile = num_turned * TILES_PER_BLOCK
        last_straddles = last_block * BLOCK_SIZE < turned_end
        # Two passes, so that only one rotation of the query is in registers at a time: over far keys, if there are any,
        # then over near ones. Straddling blocks are in both. A loop, because the tensor cores take the query from
        # shared memory only if it was loaded or is carried by a loop. Other forms of these passes were slower
        # (docs/decisions/prefill-schedule.md).
        first_pass = ((num_turned == 0) & (last_block * BLOCK_SIZE >= turned_end)).to(tl.int32)
        query = tl.load(query_ptrs, mask=mask_q, other=0.0)
        if first_pass == 0:
            query = rotate_tile(query, query_ptrs, cos_ptr, sin_ptr, mask_q, HALF_ROTARY, IS_NEOX, BLOCK_D)
        for is_near in tl.range(first_pass, 2):
            acc, row_max, row_sum = _attend_blocks(
                acc, row_max, row_sum, query, position, is_near,
                tl.where(is_near == 1, near_tile, 0), tl.where(is_near == 1, last_tile, far_tile),
                ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
                stride_page, stride_head, stride_token, scale_log2, turn_offset, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
                PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, False, False, HAS_TURN, SLOPE, NARROW_IDS, RECOMPUTES,
                PRECISION,
            )  # fmt: skip
            acc, row_max, row_sum = _attend_blocks(
                acc, row_max, row_sum, query, position, is_near,
                far_tile, near_tile,
                ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
                stride_page, stride_head, stride_token, scale_log2, turn_offset, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
                PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, False, True, HAS_TURN, SLOPE, NARROW_IDS, RECOMPUTES,
                PRECISION,
            )  # fmt: skip
            acc, row_max, row_sum = _attend_blocks(
                acc, row_max, row_sum, query, position, is_near,
                last_tile, tl.where(last_straddles | (is_near == 1), end_tile, 0),
                ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
                stride_page, stride_head, stride_token, scale_log2, turn_offset, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
                PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, True, True, HAS_TURN, SLOPE, NARROW_IDS, RECOMPUTES,
                PRECISION,
            )  # fmt: skip
            # Volatile, or the compiler would keep the tile of the first load in registers.
            query = tl.load(query_ptrs, mask=mask_q & (is_near == 0), other=0.0, volatile=True)
    else:
        query = tl.load(query_ptrs, mask=mask_q, other=0.0)
        acc, row_max, row_sum = _attend_blocks(
            acc, row_max, row_sum, query, position, 1,
            0, last_tile,
            ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
            stride_page, stride_head, stride_token, scale_log2, turn_offset, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
            PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, False, False, HAS_TURN, SLOPE, NARROW_IDS, RECOMPUTES,
                PRECISION,
        )  # fmt: skip
        acc, row_max, row_sum = _attend_blocks(
            acc, row_max, row_sum, query, position, 1,
            last_tile, end_tile,
            ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
            stride_page, stride_head, stride_token, scale_log2, turn_offset, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
            PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, True, False, HAS_TURN, SLOPE, NARROW_IDS, RECOMPUTES,
                PRECISION,
        )  # fmt: skip

    # An empty list leaves a zero output and an LSE of -inf.
    divisor = tl.where(row_sum > 0.0, row_sum, 1.0)
    acc = acc / divisor[:, None]
    if IS_FP8:
        acc = acc * value_scale
    lse = tl.where(row_sum > 0.0, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    out_ptrs = out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptr + head * stride_lse_head + token, lse, mask=mask_m)
