"""The kernels of the selection by sampled rows; `tile_rows` launches them and says what they are for."""

import triton
import triton.language as tl
from farspan.kernels import prefill_kernel as attention_kernel
from farspan.kernels.flex.spans import PART_STEP, SPAN_STEP
from farspan.kernels.rotary_turn import rotate_tile
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS

_PART_STEP, _SPAN_STEP = tl.constexpr(PART_STEP), tl.constexpr(SPAN_STEP)


@triton.jit
def _load_key_tile(
    key_source,
    table_row_ptr,
    kv_head,
    start,
    stride_page,
    stride_head,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Keys of positions [start, start + BLOCK), all of which exist, as [BLOCK, BLOCK_D]."""
    offs_n = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    if USE_TMA:
        page = attention_kernel._look_up(table_row_ptr, start // PAGE_SIZE)
        key = key_source.load([page * stride_page + kv_head * stride_head + start % PAGE_SIZE, 0])
    else:
        if PAGE_SIZE % BLOCK == 0:
            page = attention_kernel._look_up(table_row_ptr, start // PAGE_SIZE).to(tl.int64)
            rows = page * stride_page + (start % PAGE_SIZE + offs_n).to(tl.int64) * stride_token
        else:
            page = tl.load(table_row_ptr + (start + offs_n) // PAGE_SIZE).to(tl.int64)
            rows = page * stride_page + ((start + offs_n) % PAGE_SIZE).to(tl.int64) * stride_token
        pointers = key_source + kv_head.to(tl.int64) * stride_head + rows[:, None] + offs_d[None, :]
        if HEAD_DIM == BLOCK_D:
            key = tl.load(pointers)
        else:
            key = tl.load(pointers, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    return key


@triton.jit
def _stream_blocks(
    low,
    high,
    query,
    turned,
    position,
    valid,
    out_ptrs,
    key_source,
    table_row_ptr,
    kv_head,
    stride_page,
    stride_head,
    stride_token,
    scale_log2,
    turn_offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    USE_TMA: tl.constexpr,
    MASKED: tl.constexpr,
    TURNS: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the base-2 log-sum of every row over each block of [low, high).

    MASKED: leave out keys past a row's own. TURNS: 0 for keys that meet the plain query, 1 for the turned one, 2 where
    each pair decides.
    """
    for block in tl.range(low, high):
        start = block * BLOCK
        key = _load_key_tile(
            key_source, table_row_ptr, kv_head, start, stride_page, stride_head, stride_token,
            HEAD_DIM, BLOCK_D, BLOCK, PAGE_SIZE, USE_TMA,
        )  # fmt: skip
        # Of float8 pages; others have the query's dtype.
        key = key.to(query.dtype)
        key_pos = (start + tl.arange(0, BLOCK))[None, :]
        if TURNS == 1:
            scores = tl.dot(turned, tl.trans(key), input_precision=PRECISION)
        else:
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            if TURNS == 2:
                is_plain = key_pos >= (SLOPE * position + turn_offset)[:, None]
                scores = tl.where(is_plain, scores, tl.dot(turned, tl.trans(key), input_precision=PRECISION))
        if MASKED:
            scores = tl.where(key_pos <= position[:, None], scores, float("-inf"))
        top = tl.max(scores, 1) * scale_log2
        if MASKED:
            # A row that sees no key of the block has the log-sum -inf: keep -inf - -inf and log2(0) out of it.
            base = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(tl.exp2(scores * scale_log2 - base[:, None]), 1)
            log_sum = tl.where(top == float("-inf"), top, base + tl.log2(tl.maximum(total, 1e-30)))
        else:
            log_sum = top + tl.log2(tl.sum(tl.exp2(scores * scale_log2 - top[:, None]), 1))
        tl.store(out_ptrs + block * ROWS, log_sum, mask=valid)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def log_sums_kernel(
    query_ptr,
    key_source,
    block_table_ptr,
    span_request_ptr,
    span_index_ptr,
    span_row_ptr,
    cos_ptr,
    sin_ptr,
    log_sums_ptr,
    scale_log2,
    turn_offset,
    num_spans,
    num_blocks,
    num_splits,
    stride_query_token,
    stride_query_head,
    stride_block_table,
    stride_page,
    stride_head,
    stride_token,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    USE_TMA: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M sampled rows of one KV head and request over one split of the keys.

    The rows of a KV head lie span by span, in a span query head by query head. Writes log_sums
    [num_q_heads, num_spans, num_blocks, ROWS] float32 up to the last block of the program's last span.
    """
    SEGMENTS: tl.constexpr = BLOCK_M // ROWS
    packs = (num_spans * GROUP) // SEGMENTS
    program = tl.program_id(0)
    split = program % num_splits
    program = program // num_splits
    # Longest first.
    pack = packs - 1 - program % packs
    kv_head = program // packs
    first_span = pack * SEGMENTS // GROUP
    request = tl.load(span_request_ptr + first_span)
    if request < 0:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    segment = pack * SEGMENTS + offs_m // ROWS
    span = segment // GROUP
    head = (kv_head * GROUP + segment % GROUP).to(tl.int64)
    part = offs_m % ROWS
    valid = tl.load(span_request_ptr + span) >= 0
    index = tl.load(span_index_ptr + span)
    PART_LEN: tl.constexpr = SPAN_LEN // ROWS
    place = part * PART_LEN + (part * _PART_STEP + index * _SPAN_STEP) % PART_LEN
    position = index * SPAN_LEN + place
    token = (tl.load(span_row_ptr + span) + place).to(tl.int64)
    mask = valid[:, None] & (offs_d < HEAD_DIM)[None, :]
    query_ptrs = query_ptr + (token * stride_query_token + head * stride_query_head)[:, None] + offs_d[None, :]
    query = tl.load(query_ptrs, mask=mask, other=0.0)
    table_row_ptr = block_table_ptr + request.to(tl.int64) * stride_block_table
    out_ptrs = log_sums_ptr + (head * num_spans + span) * num_blocks * ROWS + part

    BLOCKS: tl.constexpr = SPAN_LEN // BLOCK
    first_index = tl.load(span_index_ptr + first_span)
    last_index = tl.max(tl.where(valid, index, 0))
    end = (last_index + 1) * BLOCKS
    per_split = tl.cdiv(end, num_splits)
    low = split * per_split
    high = tl.minimum(low + per_split, end)
    # Blocks before the first span's own are seen by every row whole.
    own = tl.minimum(tl.maximum(first_index * BLOCKS, low), high)
    if HALF_ROTARY > 0:
        turned = rotate_tile(query, query_ptrs, cos_ptr, sin_ptr, mask, HALF_ROTARY, IS_NEOX, BLOCK_D)
        # Blocks [0, far) are before the bound of every row, those from near on at or past it.
        first_bound = SLOPE * (first_index * SPAN_LEN) + turn_offset
        last_bound = SLOPE * ((last_index + 1) * SPAN_LEN - 1) + turn_offset
        far = tl.minimum(tl.maximum(tl.maximum(first_bound, 0) // BLOCK, low), own)
        near = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last_bound, 0), BLOCK), far), own)
        _stream_blocks(
            low, far, query, turned, position, valid, out_ptrs, key_source, table_row_ptr, kv_head, stride_page,
            stride_head, stride_token, scale_log2, turn_offset, ROWS, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE, USE_TMA,
            False, 1, SLOPE, PRECISION,
        )  # fmt: skip
        _stream_blocks(
            far, near, query, turned, position, valid, out_ptrs, key_source, table_row_ptr, kv_head, stride_page,
            stride_head, stride_token, scale_log2, turn_offset, ROWS, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE, USE_TMA,
            False, 2, SLOPE, PRECISION,
        )  # fmt: skip
        _stream_blocks(
            near, own, query, turned, position, valid, out_ptrs, key_source, table_row_ptr, kv_head, stride_page,
            stride_head, stride_token, scale_log2, turn_offset, ROWS, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE, USE_TMA,
            False, 0, SLOPE, PRECISION,
        )  # fmt: skip
        _stream_blocks(
            own, high, query, turned, position, valid, out_ptrs, key_source, table_row_ptr, kv_head, stride_page,
            stride_head, stride_token, scale_log2, turn_offset, ROWS, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE, USE_TMA,
            True, 2, SLOPE, PRECISION,
        )  # fmt: skip
    else:
        _stream_blocks(
            low, own, query, query, position, valid, out_ptrs, key_source, table_row_ptr, kv_head, stride_page,
            stride_head, stride_token, scale_log2, turn_offset, ROWS, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE, USE_TMA,
            False, 0, SLOPE, PRECISION,
        )  # fmt: skip
        _stream_blocks(
            own, high, query, query, position, valid, out_ptrs, key_source, table_row_ptr, kv_head, stride_page,
            stride_head, stride_token, scale_log2, turn_offset, ROWS, BLOCK, HEAD_DIM, BLOCK_D, PAGE_SIZE, USE_TMA,
            True, 0, SLOPE, PRECISION,
        )  # fmt: skip


@triton.jit
def _load_halves(mass_ptr, row, num_blocks, offs, end):
    """Masses of the even and of the odd rows on the blocks `offs`, 0 from `end` on."""
    even = tl.load(mass_ptr + row * 2 * num_blocks + offs, mask=offs < end, other=0)
    odd = tl.load(mass_ptr + (row * 2 + 1) * num_blocks + offs, mask=offs < end, other=0)
    return even, odd


@triton.jit
def _cut_with_count(key, wanted):
    """The largest cut that `wanted` entries reach; keys are -1 or above."""
    low = tl.zeros([], tl.int32)
    high = tl.maximum(tl.max(key, 0), 0) + 1
    while low + 1 < high:
        middle = low + (high - low) // 2
        enough = tl.sum((key >= middle).to(tl.int32)) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _highest(key, cut, wanted):
    """The `wanted` entries of the largest keys, those that tie with the last being the ones furthest right; as 0 or 1.

    cut: the key of the last one.
    """
    over = (key > cut).to(tl.int32)
    ties = (key == cut).to(tl.int32)
    from_right = tl.sum(ties) - tl.cumsum(ties, 0) + 1
    return over | (ties & (from_right <= wanted - tl.sum(over)).to(tl.int32))


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def choice_kernel(
    log_sums_ptr,
    mass_ptr,
    span_request_ptr,
    span_index_ptr,
    span_tile_ptr,
    cut_tile_ptr,
    tile_block_ptr,
    ids_ptr,
    counts_ptr,
    kept_ptr,
    gamma,
    num_spans,
    num_tiles,
    num_blocks,
    min_blocks,
    max_blocks,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The lists of one span, or of one tile in no span, for SHARED query heads.

    mass: [num_q_heads, num_spans, 2, num_blocks] int32, of the even and the odd rows, written here first; kept:
    [num_q_heads, num_spans] float32.
    """
    item, list_head = tl.program_id(0), tl.program_id(1)
    offs = tl.arange(0, PADDED)
    list_row = list_head.to(tl.int64) * num_tiles
    if item >= num_spans:
        tile = tl.load(cut_tile_ptr + item - num_spans)
        tile_block = tl.load(tile_block_ptr + tile)
        tl.store(ids_ptr + (list_row + tile) * num_blocks + offs, offs, mask=offs <= tile_block)
        tl.store(counts_ptr + list_row + tile, tile_block + 1)
        return
    if tl.load(span_request_ptr + item) < 0:
        return
    first_own = tl.load(span_index_ptr + item) * TILES
    end = first_own + TILES

    # Masses of each head, a fixed number of blocks at a time.
    offs_b = tl.arange(0, AT_ONCE)
    offs_r = tl.arange(0, ROWS)
    for member in range(SHARED):
        row = (list_head * SHARED + member).to(tl.int64) * num_spans + item
        logs_ptr = log_sums_ptr + row * num_blocks * ROWS
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, end, AT_ONCE):
            inside = (start + offs_b < end)[:, None]
            logs = tl.load(
                logs_ptr + (start + offs_b)[:, None] * ROWS + offs_r[None, :], mask=inside, other=float("-inf")
            )
            # Every row sees a key of the first block, so the maximum is finite from the start.
            new_top = tl.maximum(top, tl.max(logs, 0))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logs - new_top[None, :]), 0)
            top = new_top
        lse = top + tl.log2(total)
        for start in range(0, end, AT_ONCE):
            inside = start + offs_b < end
            logs = tl.load(
                logs_ptr + (start + offs_b)[:, None] * ROWS + offs_r[None, :], mask=inside[:, None], other=float("-inf")
            )
            weights = tl.exp2(logs - lse[None, :])
            even = tl.sum(tl.where((offs_r % 2 == 0)[None, :], weights, 0.0), 1) * (UNIT / ROWS)
            odd = tl.sum(tl.where((offs_r % 2 == 1)[None, :], weights, 0.0), 1) * (UNIT / ROWS)
            mass_ptrs = mass_ptr + row * 2 * num_blocks + start + offs_b
            tl.store(mass_ptrs, (even + 0.5).to(tl.int32), mask=inside)
            tl.store(mass_ptrs + num_blocks, (odd + 0.5).to(tl.int32), mask=inside)
    tl.debug_barrier()

    is_past = offs < first_own
    is_free = is_past & (offs > 0)
    num_free = tl.maximum(first_own - 1, 0)
    num_forced = tl.minimum(first_own, 1)
    chosen = (is_past & (offs == 0)).to(tl.int32)
    rank = tl.full([PADDED], -1, tl.int32)
    for member in range(SHARED):
        row = (list_head * SHARED + member).to(tl.int64) * num_spans + item
        even, odd = _load_halves(mass_ptr, row, num_blocks, offs, end)
        mass = even + odd
        key = tl.where(is_free, mass, -1)
        even, odd = tl.where(is_free, even, 0), tl.where(is_free, odd, 0)
        all_mass = tl.sum(mass)
        needed = tl.ceil(all_mass.to(tl.float32) * gamma).to(tl.int32) - (all_mass - tl.sum(even + odd))
        low = tl.zeros([], tl.int32)
        high = tl.max(tl.maximum(even, odd), 0) + 1
        while low + 1 < high:
            middle = low + (high - low) // 2
            # What each half keeps of the other's choice.
            enough = tl.sum(tl.where(odd >= middle, even, 0) + tl.where(even >= middle, odd, 0)) >= needed
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        taken = tl.sum((even >= low).to(tl.int32) + (odd >= low).to(tl.int32))
        found = tl.where(low > 0, tl.cdiv(taken, 2), tl.sum((key > 0).to(tl.int32)))
        found = tl.where(needed <= 0, 0, found)
        found = tl.where(gamma >= 1, num_free, found)
        # The span's first tile has the shortest lists: the past and one block of its own.
        wanted = tl.minimum(tl.maximum(found, min_blocks - 1 - num_forced), num_free)
        chosen = chosen | _highest(key, _cut_with_count(key, wanted), wanted)
        rank = tl.maximum(rank, key)
    # The last tile has the longest lists.
    room = tl.maximum(max_blocks - TILES - num_forced, 0)
    if tl.sum(chosen) - num_forced > room:
        chosen = (is_past & (offs == 0)).to(tl.int32) | _highest(rank, _cut_with_count(rank, room), room)

    num_past = tl.sum(chosen)
    place = tl.cumsum(chosen, 0) - 1
    first_tile = tl.load(span_tile_ptr + item)
    offs_t = tl.arange(0, TILES)
    for in_span in tl.static_range(TILES):
        tile_row = list_row + first_tile + in_span
        tl.store(ids_ptr + tile_row * num_blocks + place, offs, mask=chosen != 0)
        tl.store(ids_ptr + tile_row * num_blocks + num_past + offs_t, first_own + offs_t, mask=offs_t <= in_span)
        tl.store(counts_ptr + tile_row, num_past + in_span + 1)
    for member in range(SHARED):
        row = (list_head * SHARED + member).to(tl.int64) * num_spans + item
        even, odd = _load_halves(mass_ptr, row, num_blocks, offs, end)
        mass = even + odd
        kept = tl.sum(tl.where((chosen != 0) | (offs >= first_own), mass, 0))
        tl.store(kept_ptr + row, kept.to(tl.float32) / tl.sum(mass).to(tl.float32))
