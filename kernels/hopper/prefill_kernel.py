"""The device side of prefill on Hopper: one warp group copies pages, two others compute 64 query rows each.

The producer walks block list and block table and starts a copy of each key and value tile into a ring of buffers. A
consumer issues the product of query and keys of one tile together with that of weights and values of the tile before,
and computes the softmax of the first while the second runs; with heads of 64 in other orders (`plain_steps`,
`half_steps`). The last block of a list is the only one that can need a mask and comes first, then those that a turn's
bound crosses, so that the main loops have no mask. Softmax runs in base 2 with the scale folded in. Sources:
FlashAttention-3 (arXiv 2407.08608) for the roles of the warps and the overlap, STRING (arXiv 2410.18745) for the turned
query.
"""

from farspan.kernels.hopper.half_steps import half_steps
from farspan.kernels.hopper.plain_steps import plain_steps, steps_ahead
from farspan.kernels.hopper.tile_copies import box_of, load_tile, row_of
from farspan.kernels.hopper.tile_steps import (
    BLOCK_N,
    HALF_BLOCK,
    ROWS_AT_ONCE,
    as_operand,
    softmax_step,
    turned_query,
    zero_tail,
)
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN_2 = gl.constexpr(0.6931471805599453)
# The maximum of a row that has met no key yet: below any score, and finite, because -inf - -inf is NaN.
LOWEST = gl.constexpr(-1e30)


@gluon.jit
def _list_index(step, num_far, num_turned, last):
    """Which entry of the list a step reads: the last one first, then those that the bound crosses, then the others."""
    num_crossed = num_turned - num_far
    other = step - 1 - num_crossed
    other = gl.where(other < num_far, other, other + num_crossed)
    return gl.where(step == 0, last, gl.where(step <= num_crossed, num_far + step - 1, other))


@gluon.jit
def _produce(
    ring,
    keys,
    values,
    ids_ptr,
    table_row_ptr,
    num_blocks,
    num_far,
    num_turned,
    last_key,
    head_row,
    page_rows,
    PAGE_SIZE: gl.constexpr,
    HAS_LISTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the tiles of all steps, as soon as their buffers are free. ring: see `hopper_prefill_kernel`."""
    _, key_tiles, value_tiles, keys_full, keys_empty, values_full, values_empty = ring
    BOX: gl.constexpr = keys.block_type.shape[0]
    TILE_BYTES: gl.constexpr = BLOCK_N * key_tiles.shape[2] * 2
    for step in range(num_blocks):
        stage = step % STAGES
        # A barrier that no phase of has ended yet is passed by waiting for the phase before its first.
        phase = (step // STAGES & 1) ^ 1
        block = _list_index(step, num_far, num_turned, num_blocks - 1)
        if HAS_LISTS:
            block = gl.load(ids_ptr + block)
        start = block * BLOCK_N
        # Looked up before the wait, so that the copies follow it at once.
        rows = ()
        for box in gl.static_range(BLOCK_N // BOX):
            row = row_of(table_row_ptr, start + box * BOX, last_key, head_row, page_rows, PAGE_SIZE, BOX)
            rows += (row,)  # type: ignore[assignment]
        mbarrier.wait(keys_empty.index(stage), phase)
        mbarrier.expect(keys_full.index(stage), TILE_BYTES)
        for box in gl.static_range(BLOCK_N // BOX):
            load_tile(keys, [rows[box], 0], keys_full.index(stage), box_of(key_tiles.index(stage), box, BOX))
        mbarrier.wait(values_empty.index(stage), phase)
        mbarrier.expect(values_full.index(stage), TILE_BYTES)
        for box in gl.static_range(BLOCK_N // BOX):
            load_tile(values, [rows[box], 0], values_full.index(stage), box_of(value_tiles.index(stage), box, BOX))


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr,
    ring,
    query_ptr,
    out_ptr,
    lse_ptr,
    cos_ptr,
    sin_ptr,
    stride_query_token,
    stride_out_token,
    first_position,
    end_position,
    kv_end,
    num_blocks,
    num_far,
    num_turned,
    last_block,
    ids_ptr,
    scale_log2,
    turn_offset,
    HALF_ROTARY: gl.constexpr,
    IS_NEOX: gl.constexpr,
    HAS_LISTS: gl.constexpr,
    HAS_TURN: gl.constexpr,
    SLOPE: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Attention of 64 rows: the query's and the output's pointers are those of the program's first token and head."""
    query_tiles, key_tiles, value_tiles, keys_full, keys_empty, values_full, values_empty = ring
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    dtype: gl.constexpr = key_tiles.dtype
    KEYS: gl.constexpr = HALF_BLOCK if HALVES else BLOCK_N
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    # A thread copies 16 bytes.
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    offs_row = CONSUMER * ROWS_AT_ONCE + gl.arange(0, ROWS_AT_ONCE, layout=gl.SliceLayout(1, COPY))
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, COPY))
    mask_query = (first_position + offs_row < end_position)[:, None] & (offs_d < HEAD_DIM)[None, :]
    query_ptrs = query_ptr + offs_row[:, None] * stride_query_token + offs_d[None, :]
    query = gl.load(query_ptrs, mask=mask_query, other=0.0)
    query_tiles.index(CONSUMER).store(query)
    if HAS_TURN:
        turned = turned_query(query, query_ptrs, cos_ptr, sin_ptr, offs_d, mask_query, HALF_ROTARY, IS_NEOX)
        query_tiles.index(2 + CONSUMER).store(turned)
    fence_async_shared()

    position = first_position + CONSUMER * ROWS_AT_ONCE + gl.arange(0, ROWS_AT_ONCE, layout=gl.SliceLayout(1, SCORES))
    bound = SLOPE * position + turn_offset
    offs_n = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    acc = gl.zeros([ROWS_AT_ONCE, HEAD_DIM], gl.float32, OUT)
    no_scores = gl.zeros([ROWS_AT_ONCE, KEYS], gl.float32, SCORES)
    row_max = gl.full([ROWS_AT_ONCE], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    row_sum = gl.zeros([ROWS_AT_ONCE], gl.float32, gl.SliceLayout(1, SCORES))

    if HALVES:
        if num_blocks > 0:
            acc, row_max, row_sum = half_steps(
                query_tiles.index(CONSUMER), ring, acc, row_max, row_sum, num_blocks, last_block, kv_end, position,
                scale_log2, IS_CAUSAL, STAGES,
            )  # fmt: skip
    elif num_blocks > 0:
        # The last block, masked.
        start = last_block * BLOCK_N
        mbarrier.wait(keys_full.index(0), 0)
        scores = warpgroup_mma(
            query_tiles.index(CONSUMER), key_tiles.index(0).permute([1, 0]), no_scores, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if HAS_TURN:
            far = warpgroup_mma(
                query_tiles.index(2 + CONSUMER),
                key_tiles.index(0).permute([1, 0]),
                no_scores,
                use_acc=False,
                is_async=True,
            )
            far = warpgroup_mma_wait(0, deps=(far,))
            scores = gl.where((start + offs_n)[None, :] < bound[:, None], far, scores)
        mbarrier.arrive(keys_empty.index(0), count=1)
        mask = (start + offs_n < kv_end)[None, :]
        if IS_CAUSAL:
            mask = mask & ((start + offs_n)[None, :] <= position[:, None])
        scores = gl.where(mask, scores, float("-inf"))
        weights, _, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
        weights = as_operand(weights, dtype, WEIGHTS)
        if kv_end - start < BLOCK_N:
            mbarrier.wait(values_full.index(0), 0)
            zero_tail(value_tiles.index(0), kv_end - start, COPY)

        first_step = 1
        if HAS_TURN:
            # Blocks that the bound crosses: scores of both rotations, each where it holds.
            first_step = 1 + num_turned - num_far
            for step in range(1, first_step):
                block = num_far + step - 1
                if HAS_LISTS:
                    block = gl.load(ids_ptr + block)
                # The product of the tile before is complete first, so that its weights need no registers here.
                before = (step - 1) % STAGES
                mbarrier.wait(values_full.index(before), (step - 1) // STAGES & 1)
                acc = warpgroup_mma(weights, value_tiles.index(before), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(values_empty.index(before), count=1)
                stage = step % STAGES
                mbarrier.wait(keys_full.index(stage), step // STAGES & 1)
                scores = warpgroup_mma(
                    query_tiles.index(CONSUMER),
                    key_tiles.index(stage).permute([1, 0]),
                    no_scores,
                    use_acc=False,
                    is_async=True,
                )
                far = warpgroup_mma(
                    query_tiles.index(2 + CONSUMER),
                    key_tiles.index(stage).permute([1, 0]),
                    no_scores,
                    use_acc=False,
                    is_async=True,
                )
                scores, far = warpgroup_mma_wait(0, deps=(scores, far))
                mbarrier.arrive(keys_empty.index(stage), count=1)
                scores = gl.where((block * BLOCK_N + offs_n)[None, :] < bound[:, None], far, scores)
                new_weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
                weights = as_operand(new_weights, dtype, WEIGHTS)

        far_end = first_step
        if HAS_TURN:
            far_end = first_step + num_far
        if HEAD_DIM <= 64:
            acc, row_max, row_sum = steps_ahead(
                CONSUMER, ring, weights, acc, row_max, row_sum, first_step, far_end, num_blocks, scale_log2, HAS_TURN,
                STAGES,
            )  # fmt: skip
        else:
            if HAS_TURN:
                weights, acc, row_max, row_sum = plain_steps(
                    query_tiles.index(2 + CONSUMER), ring, weights, acc, row_max, row_sum, first_step, far_end,
                    num_blocks, scale_log2, STAGES,
                )  # fmt: skip
            weights, acc, row_max, row_sum = plain_steps(
                query_tiles.index(CONSUMER), ring, weights, acc, row_max, row_sum, far_end, num_blocks, num_blocks,
                scale_log2, STAGES,
            )  # fmt: skip
            before = (num_blocks - 1) % STAGES
            mbarrier.wait(values_full.index(before), (num_blocks - 1) // STAGES & 1)
            acc = warpgroup_mma(weights, value_tiles.index(before), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))

    # An empty list leaves a zero output and an LSE of -inf.
    divisor = gl.where(row_sum > 0.0, row_sum, 1.0)
    lse = gl.where(row_sum > 0.0, (row_max + gl.log2(divisor)) * LN_2, float("-inf"))
    row = CONSUMER * ROWS_AT_ONCE + gl.arange(0, ROWS_AT_ONCE, layout=gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + row, lse, mask=position < end_position)
    acc = acc * gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, OUT))[:, None]
    # Through shared memory, so that a thread stores 16 bytes.
    query_tiles.index(CONSUMER).store(acc.to(dtype))
    out = query_tiles.index(CONSUMER).load(COPY)
    gl.store(out_ptr + offs_row[:, None] * stride_out_token + offs_d[None, :], out, mask=mask_query)


@gluon.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def hopper_prefill_kernel(
    keys,
    values,
    query_ptr,
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
    turn_offset,
    num_tiles,
    max_blocks,
    group_size,
    heads_per_list,
    heads_in_a_row,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_lse_head,
    stride_block_table,
    page_rows,
    head_rows,
    PAGE_SIZE: gl.constexpr,
    HALF_ROTARY: gl.constexpr,
    IS_NEOX: gl.constexpr,
    HAS_LISTS: gl.constexpr,
    HAS_TURN: gl.constexpr,
    SLOPE: gl.constexpr,
    HAS_FIRST_POS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    HALVES: gl.constexpr,
):
    """One program: a query tile of one query head.

    keys, values: descriptors of rows [num_rows, head_dim]. page_rows, head_rows: rows from one page, and from one KV
    head, to the next. PAGE_SIZE 0 means one page per request. heads_in_a_row: query heads whose programs of a tile are
    neighbours. HALVES: in steps of half a block, without a turn, in at most 80 registers at entry.
    """
    HEAD_DIM: gl.constexpr = keys.block_type.shape[1]
    # The longest tiles come first.
    program = gl.program_id(0)
    head = program % heads_in_a_row
    program = program // heads_in_a_row
    tile = num_tiles - 1 - program % num_tiles
    head += program // num_tiles * heads_in_a_row
    kv_head = head // group_size

    request = gl.load(tile_request_ptr + tile)
    query_block = gl.load(tile_block_ptr + tile)
    chunk_offset = gl.load(query_start_loc_ptr + request)
    query_len = gl.load(query_start_loc_ptr + request + 1) - chunk_offset
    kv_len = gl.load(kv_lens_ptr + request)
    if HAS_FIRST_POS:
        chunk_start = gl.load(first_pos_ptr + request)
    else:
        chunk_start = kv_len - query_len
    # Positions [first_position, end_position) are this program's.
    first_position = gl.maximum(query_block * BLOCK_N, chunk_start)
    end_position = gl.minimum(query_block * BLOCK_N + BLOCK_N, chunk_start + query_len)
    kv_end = kv_len
    if IS_CAUSAL:
        kv_end = gl.minimum(end_position, kv_len)

    if HAS_LISTS:
        list_index = (head // heads_per_list).to(gl.int64) * num_tiles + tile
        ids_ptr = block_ids_ptr + list_index * max_blocks
        num_blocks = gl.load(block_counts_ptr + list_index)
        last_block = gl.load(ids_ptr + gl.maximum(num_blocks - 1, 0), mask=num_blocks > 0, other=0)
    else:
        ids_ptr = block_table_ptr
        num_blocks = (kv_end + BLOCK_N - 1) // BLOCK_N
        last_block = num_blocks - 1
    # Entries [0, num_far) of the list are before the bound of every query of the program, [num_far, num_turned) before
    # that of some, [num_turned, last) before none: ranges, as lists ascend.
    num_far = 0
    num_turned = 0
    if HAS_TURN:
        last = gl.maximum(num_blocks - 1, 0)
        far_end = SLOPE * first_position + turn_offset
        turned_end = SLOPE * (end_position - 1) + turn_offset
        if HAS_LISTS:
            COUNTED: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            offs = gl.arange(0, 128, layout=COUNTED)
            is_far = gl.zeros([128], gl.int32, COUNTED)
            is_turned = gl.zeros([128], gl.int32, COUNTED)
            for first_index in range(0, last, 128):
                index = first_index + offs
                first_key = gl.load(ids_ptr + index, mask=index < last, other=0) * BLOCK_N
                is_far += ((index < last) & (first_key + BLOCK_N <= far_end)).to(gl.int32)
                is_turned += ((index < last) & (first_key < turned_end)).to(gl.int32)
            num_far = gl.sum(is_far, 0)
            num_turned = gl.sum(is_turned, 0)
        else:
            num_far = gl.minimum(gl.maximum(far_end, 0) // BLOCK_N, last)
            num_turned = gl.minimum((gl.maximum(turned_end, 0) + BLOCK_N - 1) // BLOCK_N, last)

    token = (chunk_offset + first_position - chunk_start).to(gl.int64)
    query_ptr += token * stride_query_token + head.to(gl.int64) * stride_query_head
    out_ptr += token * stride_out_token + head.to(gl.int64) * stride_out_head
    lse_ptr += head.to(gl.int64) * stride_lse_head + token
    table_row_ptr = block_table_ptr + request.to(gl.int64) * stride_block_table

    QUERY_TILES: gl.constexpr = 4 if HAS_TURN else 2
    dtype: gl.constexpr = keys.dtype
    query_tiles = gl.allocate_shared_memory(dtype, [QUERY_TILES, ROWS_AT_ONCE, HEAD_DIM], keys.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        # Each consumer gives a buffer back.
        mbarrier.init(keys_empty.index(stage), count=2)
        mbarrier.init(values_empty.index(stage), count=2)
    fence_async_shared()
    # Buffers and barriers, in one argument.
    ring = (query_tiles, key_tiles, value_tiles, keys_full, keys_empty, values_full, values_empty)

    gl.warp_specialize(
        [
            (
                _produce,
                (
                    ring, keys, values, ids_ptr, table_row_ptr, num_blocks, num_far, num_turned, kv_end - 1,
                    kv_head * head_rows, page_rows, PAGE_SIZE, HAS_LISTS, STAGES,
                ),
            ),
            (
                _consume,
                (
                    0, ring, query_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, stride_query_token, stride_out_token,
                    first_position, end_position, kv_end, num_blocks, num_far, num_turned, last_block, ids_ptr,
                    scale_log2, turn_offset, HALF_ROTARY, IS_NEOX, HAS_LISTS, HAS_TURN, SLOPE, IS_CAUSAL, STAGES,
                    HALVES,
                ),
            ),
            (
                _consume,
                (
                    1, ring, query_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, stride_query_token, stride_out_token,
                    first_position, end_position, kv_end, num_blocks, num_far, num_turned, last_block, ids_ptr,
                    scale_log2, turn_offset, HALF_ROTARY, IS_NEOX, HAS_LISTS, HAS_TURN, SLOPE, IS_CAUSAL, STAGES,
                    HALVES,
                ),
            ),
        ],
        [4, 4],
        # Of 80 at entry the copying warps leave 104 to each consumer.
        [104 if HALVES else 240, 104 if HALVES else 240],
    )  # fmt: skip
