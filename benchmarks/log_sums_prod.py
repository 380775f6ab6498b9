"""The pass of selection by sampled rows over the keys on Hopper: log-sums of every row over every block.

One warp group copies key tiles, the others compute 64 sampled rows each. A key tile that is in shared memory serves all
of them, since the pass would otherwise be bound by what the L2 cache delivers, and while some compute exponentials the
tensor cores work for the others.

Exponentials of a block that a row sees whole are taken relative to the row's highest score in the prompt's first block,
not in the block itself: nothing has to be known of all scores before the first exponential. So a block is computed in
halves, one half's products beside the other's exponentials. float32 has room for what differs from block to block:
what is below 2^-126 of that score weighs nothing in any choice, and where a block's highest score is 2^120 of it or
more, its own is used. A row's result depends on its query and the keys alone, not on other rows, splits or chunks.
"""

from farspan.kernels.flex.spans import PART_STEP, SPAN_STEP
from farspan.kernels.hopper.tile_copies import box_of, load_tile, row_of
from farspan.kernels.hopper.tile_steps import BLOCK_N, HALF_BLOCK, ROWS_AT_ONCE
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CONSUMERS = gl.constexpr(4)
_PART_STEP, _SPAN_STEP = gl.constexpr(PART_STEP), gl.constexpr(SPAN_STEP)
# Past any key: no box of a whole span is beyond the last one.
_NO_END = gl.constexpr(2**30)
# Binary orders above the first block's highest score from which on a block's own is used; 128 scores of 2^120 have room.
_FAR_ABOVE = gl.constexpr(120.0)


@gluon.jit
def _sampled_rows(
    first_segment,
    span_request_ptr,
    span_index_ptr,
    span_row_ptr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    SPAN_LEN: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Span, head of the group, part, position, row of the query, and whether there is one, of a consumer's rows."""
    row = gl.arange(0, ROWS_AT_ONCE, layout=LAYOUT)
    segment = first_segment + row // ROWS
    span = segment // GROUP
    part = row % ROWS
    PART_LEN: gl.constexpr = SPAN_LEN // ROWS
    index = gl.load(span_index_ptr + span)
    place = part * PART_LEN + (part * _PART_STEP + index * _SPAN_STEP) % PART_LEN
    token = gl.load(span_row_ptr + span) + place
    is_row = gl.load(span_request_ptr + span) >= 0
    return span, segment % GROUP, part, index * SPAN_LEN + place, token, is_row


@gluon.jit
def _copy_blocks(
    keys,
    key_tiles,
    full,
    empty,
    table_row_ptr,
    first_step,
    low,
    high,
    head_row,
    page_rows,
    PAGE_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the key tiles of blocks [low, high), as soon as their buffers are free. Returns the step after them."""
    BOX: gl.constexpr = keys.block_type.shape[0]
    TILE_BYTES: gl.constexpr = BLOCK_N * key_tiles.shape[2] * 2
    for block in range(low, high):
        step = first_step + block - low
        stage = step % STAGES
        rows = ()
        for box in gl.static_range(BLOCK_N // BOX):
            start = block * BLOCK_N + box * BOX
            row = row_of(table_row_ptr, start, _NO_END, head_row, page_rows, PAGE_SIZE, BOX)
            rows += (row,)  # type: ignore[assignment]
        # A barrier that no phase of has ended yet is passed by waiting for the phase before its first.
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), TILE_BYTES)
        for box in gl.static_range(BLOCK_N // BOX):
            load_tile(keys, [rows[box], 0], full.index(stage), box_of(key_tiles.index(stage), box, BOX))
    return first_step + gl.maximum(high - low, 0)


@gluon.jit
def _overflowed(done, overflows):
    """Whether a row of any consumer has a block far above its first one, once all of them know."""
    mbarrier.wait(done, 0)
    return gl.max(overflows.load(gl.BlockedLayout([1], [32], [4], [0])), 0) != 0


@gluon.jit
def _produce(
    keys,
    key_tiles,
    full,
    empty,
    done,
    overflows,
    table_row_ptr,
    first,
    low,
    own,
    high,
    head_row,
    page_rows,
    PAGE_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the key tiles that `_consume` computes, in its order."""
    step = _copy_blocks(
        keys, key_tiles, full, empty, table_row_ptr, 0, 0, first, head_row, page_rows, PAGE_SIZE, STAGES
    )  # fmt: skip
    step = _copy_blocks(
        keys, key_tiles, full, empty, table_row_ptr, step, low, high, head_row, page_rows, PAGE_SIZE, STAGES
    )  # fmt: skip
    if low < own:
        if _overflowed(done, overflows):  # noqa: SIM102
            _copy_blocks(
                keys, key_tiles, full, empty, table_row_ptr, step, low, own, head_row, page_rows, PAGE_SIZE, STAGES
            )  # fmt: skip


@gluon.jit
def _exp2(x):
    """As `gl.exp2`, with numbers below the normal ones as 0, which spares the scaling that they need."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _start_half(query, key_tiles, step, half: gl.constexpr, STAGES: gl.constexpr):
    """Issue the products of 64 rows and half of a step's keys."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_BLOCK, 16])
    no_scores = gl.zeros([ROWS_AT_ONCE, HALF_BLOCK], gl.float32, SCORES)
    keys = key_tiles.index(step % STAGES).slice(half * HALF_BLOCK, HALF_BLOCK).permute([1, 0])
    return warpgroup_mma(query, keys, no_scores, use_acc=False, is_async=True)


@gluon.jit
def _half_sums(scores, scale_log2, base):
    """Sums of the exponentials that a thread has of a row, relative to `base`: [rows, 4]."""
    weights = _exp2(scores * scale_log2 - base[:, None])
    return gl.sum(gl.sum(weights.reshape([ROWS_AT_ONCE, HALF_BLOCK // 8, 4, 2]), 3), 1)


@gluon.jit
def _log_sum(base, sums):
    return base + _log2(gl.convert_layout(gl.sum(sums, 1), base.type.layout))


@gluon.jit
def _masked_halves(query, key_tiles, full, empty, step, block, position, scale_log2, STAGES: gl.constexpr):
    """The scores of a step's block, -inf for keys past a row's own, and the rows' highest ones, in base 2."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    left, right = _start_half(query, key_tiles, step, 0, STAGES), _start_half(query, key_tiles, step, 1, STAGES)
    left, right = warpgroup_mma_wait(0, deps=(left, right))
    mbarrier.arrive(empty.index(stage), count=1)
    key_pos = block * BLOCK_N + gl.arange(0, HALF_BLOCK, layout=gl.SliceLayout(0, left.type.layout))
    left = gl.where(key_pos[None, :] <= position[:, None], left, float("-inf"))
    right = gl.where(key_pos[None, :] + HALF_BLOCK <= position[:, None], right, float("-inf"))
    return left, right, gl.maximum(gl.max(left, 1), gl.max(right, 1)) * scale_log2


@gluon.jit
def _masked_log_sums(left, right, top, base, sees_whole, scale_log2):
    """Base-2 log-sums of the rows of a block from `_masked_halves`; -inf for rows that see none of its keys.

    base: what `_whole_blocks` takes for rows that see the block whole.
    """
    base = gl.where(sees_whole & (top - base < _FAR_ABOVE), base, gl.where(top == float("-inf"), 0.0, top))
    return _log_sum(base, _half_sums(left, scale_log2, base) + _half_sums(right, scale_log2, base))


@gluon.jit
def _masked_blocks(
    query,
    key_tiles,
    full,
    empty,
    out_ptrs,
    is_row,
    base,
    position,
    first_step,
    low,
    high,
    scale_log2,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Log-sums over blocks [low, high), from a step on, which rows see in part, or which are far above `base`."""
    for block in range(low, high):
        left, right, top = _masked_halves(
            query, key_tiles, full, empty, first_step + block - low, block, position, scale_log2, STAGES
        )  # fmt: skip
        sees_whole = (block + 1) * BLOCK_N <= position + 1
        log_sums = _masked_log_sums(left, right, top, base, sees_whole, scale_log2)
        gl.store(out_ptrs + block * ROWS, log_sums, mask=is_row)


@gluon.jit
def _whole_blocks(
    query, key_tiles, full, empty, out_ptrs, is_row, base, low, own, scale_log2, ROWS: gl.constexpr, STAGES: gl.constexpr
):
    """Log-sums over blocks [low, own), from step 1 on, which rows see whole; whether any is far above `base`.

    base: of the exponentials, per row. One half's products run beside the other's exponentials.
    """
    most = base
    mbarrier.wait(full.index(1 % STAGES), 0)
    left = _start_half(query, key_tiles, 1, 0, STAGES)
    for block in range(low, own):
        step = block - low + 1
        following = step + 1
        left = warpgroup_mma_wait(0, deps=(left,))
        right = _start_half(query, key_tiles, step, 1, STAGES)
        sums = _half_sums(left, scale_log2, base)
        mbarrier.wait(full.index(following % STAGES), following // STAGES & 1, pred=block + 1 < own)
        right = warpgroup_mma_wait(0, deps=(right,))
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        # Past the last block a buffer holds anything, and the scores are not used.
        left = _start_half(query, key_tiles, following, 0, STAGES)
        sums += _half_sums(right, scale_log2, base)
        log_sums = _log_sum(base, sums)
        most = gl.maximum(most, log_sums)
        gl.store(out_ptrs + block * ROWS, log_sums, mask=is_row)
    warpgroup_mma_wait(0, deps=(left,))
    return gl.max((most - base > _FAR_ABOVE - 1).to(gl.int32), 0)


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr,
    query_tiles,
    key_tiles,
    full,
    empty,
    done,
    overflows,
    query_ptr,
    span_request_ptr,
    span_index_ptr,
    span_row_ptr,
    log_sums_ptr,
    first_segment,
    first_head,
    num_spans,
    num_blocks,
    first,
    has_first,
    low,
    own,
    high,
    scale_log2,
    stride_query_token,
    stride_query_head,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    SPAN_LEN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Log-sums of 64 rows over the prompt's first block, if `first` is 1, and blocks [low, high).

    All rows see those before `own` whole. The first block's are stored with `has_first`.
    """
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_BLOCK, 16]))
    FLAGS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    # A thread copies 16 bytes.
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    first_segment += CONSUMER * (ROWS_AT_ONCE // ROWS)

    _, head, _, _, token, is_row = _sampled_rows(
        first_segment, span_request_ptr, span_index_ptr, span_row_ptr, GROUP, ROWS, SPAN_LEN, gl.SliceLayout(1, COPY)
    )
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, COPY))
    offsets = token.to(gl.int64) * stride_query_token + (first_head + head).to(gl.int64) * stride_query_head
    mask = is_row[:, None] & (offs_d < HEAD_DIM)[None, :]
    query_tiles.index(CONSUMER).store(gl.load(query_ptr + offsets[:, None] + offs_d[None, :], mask=mask, other=0.0))
    fence_async_shared()

    span, head, part, position, _, is_row = _sampled_rows(
        first_segment, span_request_ptr, span_index_ptr, span_row_ptr, GROUP, ROWS, SPAN_LEN, ROW
    )
    out_ptrs = log_sums_ptr + ((first_head + head).to(gl.int64) * num_spans + span) * num_blocks * ROWS + part
    query = query_tiles.index(CONSUMER)

    if first > 0:
        left, right, base = _masked_halves(query, key_tiles, full, empty, 0, 0, position, scale_log2, STAGES)
        if has_first:
            log_sums = _masked_log_sums(left, right, base, base, is_row, scale_log2)
            gl.store(out_ptrs, log_sums, mask=is_row)
        if low < own:
            is_far = _whole_blocks(
                query, key_tiles, full, empty, out_ptrs, is_row, base, low, own, scale_log2, ROWS, STAGES
            )  # fmt: skip
            overflows.slice(CONSUMER * 32, 32).store(gl.full([32], 0, gl.int32, FLAGS) + is_far)
            mbarrier.arrive(done, count=1)
        step = 1 + own - low
        _masked_blocks(
            query, key_tiles, full, empty, out_ptrs, is_row, base, position, step, own, high, scale_log2, ROWS, STAGES
        )  # fmt: skip
        if low < own:
            if _overflowed(done, overflows):  # noqa: SIM102
                step += high - own
                _masked_blocks(
                    query, key_tiles, full, empty, out_ptrs, is_row, base, position, step, low, own, scale_log2, ROWS,
                    STAGES,
                )  # fmt: skip


@gluon.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def hopper_log_sums_kernel(
    query_ptr,
    keys,
    block_table_ptr,
    span_request_ptr,
    span_index_ptr,
    span_row_ptr,
    log_sums_ptr,
    scale_log2,
    num_spans,
    num_blocks,
    num_splits,
    stride_query_token,
    stride_query_head,
    stride_block_table,
    page_rows,
    head_rows,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    SPAN_LEN: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: 256 rows, 64 for each consumer, of one KV head and request, over one split of the keys.

    keys: descriptor of rows [num_rows, head_dim]; page_rows, head_rows: rows from one page, and from one KV head, to
    the next. Rows lie as in `tile_rows_kernel.log_sums_kernel`, which computes the same.
    """
    HEAD_DIM: gl.constexpr = keys.block_type.shape[1]
    SEGMENTS: gl.constexpr = CONSUMERS * ROWS_AT_ONCE // ROWS
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    packs = num_spans * GROUP // SEGMENTS
    program = gl.program_id(0)
    split = program % num_splits
    program = program // num_splits
    # Longest first.
    pack = packs - 1 - program % packs
    kv_head = program // packs
    first_segment = pack * SEGMENTS
    first_span = first_segment // GROUP
    request = gl.load(span_request_ptr + first_span)
    BLOCKS: gl.constexpr = SPAN_LEN // BLOCK_N
    # Spans of a request ascend, and padding has number 0. Packs of padding alone have no steps.
    span = (first_segment + gl.minimum(gl.arange(0, 128, layout=LANES), SEGMENTS - 1)) // GROUP
    end = gl.where(request >= 0, (gl.max(gl.load(span_index_ptr + span), 0) + 1) * BLOCKS, 0)
    per_split = (end + num_splits - 1) // num_splits
    low = gl.minimum(split * per_split, end)
    high = gl.minimum(low + per_split, end)
    # Blocks before the first span's own are seen by every row whole.
    own = gl.minimum(gl.maximum(gl.load(span_index_ptr + first_span) * BLOCKS, low), high)
    # The prompt's first block comes first in any case.
    has_first = low == 0
    first = gl.minimum(high - low, 1)
    low = gl.minimum(gl.maximum(low, 1), high)
    own = gl.maximum(low, own)
    table_row_ptr = block_table_ptr + request.to(gl.int64) * stride_block_table
    first_head = kv_head * GROUP

    dtype: gl.constexpr = keys.dtype
    query_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_AT_ONCE, HEAD_DIM], keys.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Consumers tell the others and the copying warps whether a sum has overflowed.
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    overflows = gl.allocate_shared_memory(gl.int32, [CONSUMERS * 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbarrier.init(done, count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        # Each consumer gives a buffer back.
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    copying = (
        keys, key_tiles, full, empty, done, overflows, table_row_ptr, first, low, own, high, kv_head * head_rows,
        page_rows, PAGE_SIZE, STAGES,
    )  # fmt: skip
    computing = (
        query_tiles, key_tiles, full, empty, done, overflows, query_ptr, span_request_ptr, span_index_ptr, span_row_ptr,
        log_sums_ptr, first_segment, first_head, num_spans, num_blocks, first, has_first, low, own, high,
        scale_log2, stride_query_token, stride_query_head, GROUP, ROWS, SPAN_LEN, STAGES,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_produce, copying),
            (_consume, (0,) + computing),  # noqa: RUF005
            (_consume, (1,) + computing),  # noqa: RUF005
            (_consume, (2,) + computing),  # noqa: RUF005
            (_consume, (3,) + computing),  # noqa: RUF005
        ],
        [4, 4, 4, 4],
        [112, 112, 112, 112],
    )
