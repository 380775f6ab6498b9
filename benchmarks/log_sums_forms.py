"""Forms of the pass over the keys, for one tuning run: taken out again when one is chosen."""

from farspan.kernels.hopper.log_sums_kernel import _log2, _log_sums, _sampled_rows, _exp2
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
_NO_END = gl.constexpr(2**30)
_HUGE = gl.constexpr(2.0**120)


@gluon.jit
def _exp2_mixed(x, POLY: gl.constexpr):
    """2**x; of POLY neighbours one by a polynomial on the arithmetic units."""
    if POLY == 0:
        return _exp2(x)
    elif POLY == 4:
        return gl.inline_asm_elementwise(
            """{ .reg .f32 a, t, r, p; .reg .b32 i, j;
            ex2.approx.ftz.f32 $0, $4; ex2.approx.ftz.f32 $1, $5; ex2.approx.ftz.f32 $2, $6;
            max.ftz.f32 a, $7, 0fC2FC0000; min.ftz.f32 a, a, 0f42FC0000;
            add.rn.f32 t, a, 0f4B400000; sub.rn.f32 r, t, 0f4B400000; sub.rn.f32 r, a, r;
            fma.rn.f32 p, r, 0f3C1D0162, 0f3D64FE23; fma.rn.f32 p, p, r, 0f3E7601BC;
            fma.rn.f32 p, p, r, 0f3F317096; fma.rn.f32 p, p, r, 0f3F800000;
            mov.b32 i, t; shl.b32 i, i, 23; mov.b32 j, p; add.s32 i, i, j; mov.b32 $3, i; }""",
            "=f,=f,=f,=f,f,f,f,f", [x], dtype=gl.float32, is_pure=True, pack=4,
        )
    else:
        gl.static_assert(POLY == 8)
        return gl.inline_asm_elementwise(
            """{ .reg .f32 a, t, r, p; .reg .b32 i, j;
            ex2.approx.ftz.f32 $0, $8; ex2.approx.ftz.f32 $1, $9; ex2.approx.ftz.f32 $2, $10;
            ex2.approx.ftz.f32 $4, $12; ex2.approx.ftz.f32 $5, $13; ex2.approx.ftz.f32 $6, $14;
            ex2.approx.ftz.f32 $7, $15;
            max.ftz.f32 a, $11, 0fC2FC0000; min.ftz.f32 a, a, 0f42FC0000;
            add.rn.f32 t, a, 0f4B400000; sub.rn.f32 r, t, 0f4B400000; sub.rn.f32 r, a, r;
            fma.rn.f32 p, r, 0f3C1D0162, 0f3D64FE23; fma.rn.f32 p, p, r, 0f3E7601BC;
            fma.rn.f32 p, p, r, 0f3F317096; fma.rn.f32 p, p, r, 0f3F800000;
            mov.b32 i, t; shl.b32 i, i, 23; mov.b32 j, p; add.s32 i, i, j; mov.b32 $3, i; }""",
            "=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f", [x], dtype=gl.float32, is_pure=True, pack=8,
        )


@gluon.jit
def _part_sums(weights):
    """Sums over the columns that a thread has, as [rows, 4]."""
    HALVES: gl.constexpr = weights.shape[1] // 8
    return gl.sum(gl.sum(weights.reshape([ROWS_AT_ONCE, HALVES, 4, 2]), 3), 1)


@gluon.jit
def _copy_block(
    keys, key_tiles, full, table_row_ptr, block, stage, head_row, page_rows, PAGE_SIZE: gl.constexpr
):
    BOX: gl.constexpr = keys.block_type.shape[0]
    rows = ()
    for box in gl.static_range(BLOCK_N // BOX):
        start = block * BLOCK_N + box * BOX
        rows += (row_of(table_row_ptr, start, _NO_END, head_row, page_rows, PAGE_SIZE, BOX),)
    mbarrier.expect(full.index(stage), BLOCK_N * key_tiles.shape[2] * 2)
    for box in gl.static_range(BLOCK_N // BOX):
        load_tile(keys, [rows[box], 0], full.index(stage), box_of(key_tiles.index(stage), box, BOX))


@gluon.jit
def _block_of(step, has_past, first, own, num_redone):
    """The block of a step: the first block, those before own, the masked ones, and once more those before own."""
    return gl.where((step == 0) & has_past, 0, first + step - gl.where(has_past, 1, 0))


@gluon.jit
def _produce(
    keys, key_tiles, full, empty, done, verdicts, table_row_ptr, has_past, first, own, high, head_row, page_rows,
    PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
):
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lead = gl.where(has_past, 1, 0)
    num_steps = lead + high - first
    for step in range(0, num_steps):
        stage = step % STAGES
        block = gl.where(step < lead, 0, first + step - lead)
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        _copy_block(keys, key_tiles, full, table_row_ptr, block, stage, head_row, page_rows, PAGE_SIZE)
    if has_past:
        mbarrier.wait(done, 0)
        flags = verdicts.load(LANES)
        if gl.max(flags, 0) != 0:
            for step in range(num_steps, num_steps + own - first):
                stage = step % STAGES
                block = first + step - num_steps
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                _copy_block(keys, key_tiles, full, table_row_ptr, block, stage, head_row, page_rows, PAGE_SIZE)


@gluon.jit
def _await(full, step, STAGES: gl.constexpr):
    mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)


@gluon.jit
def _scores(query, key_tiles, full, empty, step, STAGES: gl.constexpr):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    no_scores = gl.zeros([ROWS_AT_ONCE, BLOCK_N], gl.float32, SCORES)
    keys = key_tiles.index(stage).permute([1, 0])
    scores = warpgroup_mma(query, keys, no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(empty.index(stage), count=1)
    return scores


@gluon.jit
def _issue(query, query_tile, key_tiles, step, START: gl.constexpr, LEN: gl.constexpr, AREG: gl.constexpr,
           STAGES: gl.constexpr):
    """Issue the products of 64 rows with keys [START, START + LEN) of a step's tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LEN, 16])
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    tile = key_tiles.index(step % STAGES)
    if LEN < BLOCK_N:
        tile = tile.slice(START, LEN)
    scores = gl.zeros([ROWS_AT_ONCE, LEN], gl.float32, SCORES)
    if AREG == 0:
        scores = warpgroup_mma(query_tile, tile.permute([1, 0]), scores, use_acc=False, is_async=True)
    elif AREG == HEAD_DIM:
        scores = warpgroup_mma(query, tile.permute([1, 0]), scores, use_acc=False, is_async=True)
    else:
        scores = warpgroup_mma(
            query, tile.slice(0, AREG, 1).permute([1, 0]), scores, use_acc=False, is_async=True
        )
        scores = warpgroup_mma(
            query_tile.slice(AREG, HEAD_DIM - AREG, 1), tile.slice(AREG, HEAD_DIM - AREG, 1).permute([1, 0]), scores,
            is_async=True,
        )
    return scores


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, PIPE: gl.constexpr, AREG: gl.constexpr, POLY: gl.constexpr, query_tiles, key_tiles, full, empty, done, verdicts, query_ptr, span_request_ptr,
    span_index_ptr, span_row_ptr, log_sums_ptr, first_segment, first_head, num_spans, num_blocks, has_past, keeps_first,
    first, own, high, scale_log2, stride_query_token, stride_query_head, GROUP: gl.constexpr, ROWS: gl.constexpr,
    SPAN_LEN: gl.constexpr, STAGES: gl.constexpr,
):
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_BLOCK, 16])
    COLUMNS: gl.constexpr = BLOCK_N // (1 + PIPE)
    A: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]), 2)
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
        first_segment, span_request_ptr, span_index_ptr, span_row_ptr, GROUP, ROWS, SPAN_LEN, gl.SliceLayout(1, SCORES)
    )
    out_ptrs = log_sums_ptr + ((first_head + head).to(gl.int64) * num_spans + span) * num_blocks * ROWS + part
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    query_tile = query_tiles.index(CONSUMER)
    step = 0
    top = gl.zeros([ROWS_AT_ONCE], gl.float32, gl.SliceLayout(1, SCORES))
    if has_past:
        scores = _scores(query_tile, key_tiles, full, empty, 0, STAGES)
        top = gl.max(scores, 1) * scale_log2
        if keeps_first:
            gl.store(out_ptrs, top + _log2(gl.sum(_exp2(scores * scale_log2 - top[:, None]), 1)), mask=is_row)
        step = 1
        most = gl.zeros_like(top)
        if first < own:
            if AREG == 0:
                query = query_tile
            elif AREG < HEAD_DIM:
                query = query_tile.slice(0, AREG, 1).load(A)
            else:
                query = query_tile.load(A)
            if PIPE:
                base = gl.convert_layout(top, gl.SliceLayout(1, HALF))
                most_half = gl.convert_layout(most, gl.SliceLayout(1, HALF))
                pointers = gl.convert_layout(out_ptrs, gl.SliceLayout(1, HALF))
                is_row_half = gl.convert_layout(is_row, gl.SliceLayout(1, HALF))
                _await(full, 1, STAGES)
                left = _issue(query, query_tile, key_tiles, 1, 0, HALF_BLOCK, AREG, STAGES)
                for block in range(first, own):
                    step = block - first + 1
                    left = warpgroup_mma_wait(0, deps=(left,))
                    right = _issue(query, query_tile, key_tiles, step, HALF_BLOCK, HALF_BLOCK, AREG, STAGES)
                    sums = _part_sums(_exp2_mixed(left * scale_log2 - base[:, None], POLY))
                    # Past the last one a buffer holds anything, and the scores are not used.
                    mbarrier.wait(
                        full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=block + 1 < own
                    )
                    right = warpgroup_mma_wait(0, deps=(right,))
                    mbarrier.arrive(empty.index(step % STAGES), count=1)
                    left = _issue(query, query_tile, key_tiles, step + 1, 0, HALF_BLOCK, AREG, STAGES)
                    sums += _part_sums(_exp2_mixed(right * scale_log2 - base[:, None], POLY))
                    total = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, HALF))
                    most_half = gl.maximum(most_half, total)
                    gl.store(pointers + block * ROWS, base + _log2(total), mask=is_row_half)
                left = warpgroup_mma_wait(0, deps=(left,))
                most = gl.convert_layout(most_half, gl.SliceLayout(1, SCORES))
            else:
                for block in range(first, own):
                    step = block - first + 1
                    _await(full, step, STAGES)
                    scores = _issue(query, query_tile, key_tiles, step, 0, BLOCK_N, AREG, STAGES)
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                    mbarrier.arrive(empty.index(step % STAGES), count=1)
                    total = gl.sum(_exp2_mixed(scores * scale_log2 - top[:, None], POLY), 1)
                    most = gl.maximum(most, total)
                    gl.store(out_ptrs + block * ROWS, top + _log2(total), mask=is_row)
            step = own - first + 1
        overflow = gl.max((most >= _HUGE).to(gl.int32), 0)
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        verdicts.slice(CONSUMER * 32, 32).store(gl.full([32], 0, gl.int32, LANES) + overflow)
        mbarrier.arrive(done, count=1)
    for block in range(own, high):
        scores = _scores(query_tile, key_tiles, full, empty, step + block - own, STAGES)
        key_pos = block * BLOCK_N + offs_n
        gl.store(out_ptrs + block * ROWS, _log_sums(scores, scale_log2, position, key_pos, True), mask=is_row)
    if has_past:
        mbarrier.wait(done, 0)
        LANES2: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        if gl.max(verdicts.load(LANES2), 0) != 0:
            step += high - own
            for block in range(first, own):
                scores = _scores(query_tile, key_tiles, full, empty, step + block - first, STAGES)
                key_pos = block * BLOCK_N + offs_n
                pointers_ = out_ptrs + block * ROWS
                is_high = gl.load(pointers_, mask=is_row, other=0.0) > top + 119.5
                gl.store(pointers_, _log_sums(scores, scale_log2, position, key_pos, True), mask=is_row & is_high)


@gluon.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def forms_kernel(
    query_ptr, keys, block_table_ptr, span_request_ptr, span_index_ptr, span_row_ptr, log_sums_ptr, scale_log2,
    num_spans, num_blocks, num_splits, stride_query_token, stride_query_head, stride_block_table, page_rows, head_rows,
    GROUP: gl.constexpr, ROWS: gl.constexpr, SPAN_LEN: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
    PIPE: gl.constexpr, AREG: gl.constexpr, POLY: gl.constexpr,
):
    HEAD_DIM: gl.constexpr = keys.block_type.shape[1]
    SEGMENTS: gl.constexpr = CONSUMERS * ROWS_AT_ONCE // ROWS
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    packs = num_spans * GROUP // SEGMENTS
    program = gl.program_id(0)
    split = program % num_splits
    program = program // num_splits
    pack = packs - 1 - program % packs
    kv_head = program // packs
    first_segment = pack * SEGMENTS
    first_span = first_segment // GROUP
    request = gl.load(span_request_ptr + first_span)
    BLOCKS: gl.constexpr = SPAN_LEN // BLOCK_N
    span = (first_segment + gl.minimum(gl.arange(0, 128, layout=LANES), SEGMENTS - 1)) // GROUP
    end = gl.where(request >= 0, (gl.max(gl.load(span_index_ptr + span), 0) + 1) * BLOCKS, 0)
    per_split = (end + num_splits - 1) // num_splits
    low = gl.minimum(split * per_split, end)
    high = gl.minimum(low + per_split, end)
    own = gl.minimum(gl.maximum(gl.load(span_index_ptr + first_span) * BLOCKS, low), high)
    has_past = low < own
    keeps_first = low == 0
    # The first block is done before the others.
    first = gl.where(has_past, gl.maximum(low, 1), low)
    table_row_ptr = block_table_ptr + request.to(gl.int64) * stride_block_table
    first_head = kv_head * GROUP

    dtype: gl.constexpr = keys.dtype
    query_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_AT_ONCE, HEAD_DIM], keys.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    FLAGS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    verdicts = gl.allocate_shared_memory(gl.int32, [128], FLAGS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    mbarrier.init(done, count=CONSUMERS)
    fence_async_shared()

    copying = (
        keys, key_tiles, full, empty, done, verdicts, table_row_ptr, has_past, first, own, high, kv_head * head_rows,
        page_rows, PAGE_SIZE, STAGES,
    )
    computing = (
        query_tiles, key_tiles, full, empty, done, verdicts, query_ptr, span_request_ptr, span_index_ptr, span_row_ptr,
        log_sums_ptr, first_segment, first_head, num_spans, num_blocks, has_past, keeps_first, first, own, high,
        scale_log2, stride_query_token, stride_query_head, GROUP, ROWS, SPAN_LEN, STAGES,
    )
    gl.warp_specialize(
        [
            (_produce, copying),
            (_consume, (0, PIPE, AREG, POLY) + computing),
            (_consume, (1, PIPE, AREG, POLY) + computing),
            (_consume, (2, PIPE, AREG, POLY) + computing),
            (_consume, (3, PIPE, AREG, POLY) + computing),
        ],
        [4, 4, 4, 4],
        [112, 112, 112, 112],
    )


LOOK = gl.constexpr(2)


@gluon.jit
def _row_of_step(copying, step, PAGE_SIZE: gl.constexpr):
    keys, key_tiles, full, empty, table_row_ptr, lead, first, num_steps, head_row, page_rows = copying
    step = gl.minimum(step, num_steps - 1)
    start = gl.where(step < lead, 0, first + step - lead) * BLOCK_N
    row = head_row
    if num_steps > 0:
        row = gl.load(table_row_ptr + start // PAGE_SIZE) * page_rows + head_row + start % PAGE_SIZE
    return row


@gluon.jit
def _copy_next(copying, row, step, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr):
    """Copy the tile of a step, if there is one, from `row`; the row of the one after it."""
    keys, key_tiles, full, empty, table_row_ptr, lead, first, num_steps, head_row, page_rows = copying
    stage = step % STAGES
    is_step = step < num_steps
    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1, pred=is_step)
    mbarrier.expect(full.index(stage), BLOCK_N * key_tiles.shape[2] * 2, pred=is_step)
    load_tile(keys, [row, 0], full.index(stage), key_tiles.index(stage), pred=is_step)
    return _row_of_step(copying, step + 1, PAGE_SIZE)


@gluon.jit
def _consume_alone(
    CONSUMER: gl.constexpr, PIPE: gl.constexpr, AREG: gl.constexpr, POLY: gl.constexpr, PAGE_SIZE: gl.constexpr, keys, table_row_ptr, head_row, page_rows, query_tiles, key_tiles, full, empty, done, verdicts, query_ptr, span_request_ptr,
    span_index_ptr, span_row_ptr, log_sums_ptr, first_segment, first_head, num_spans, num_blocks, has_past, keeps_first,
    first, own, high, scale_log2, stride_query_token, stride_query_head, GROUP: gl.constexpr, ROWS: gl.constexpr,
    SPAN_LEN: gl.constexpr, STAGES: gl.constexpr,
):
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_BLOCK, 16])
    COLUMNS: gl.constexpr = BLOCK_N // (1 + PIPE)
    A: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]), 2)
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
        first_segment, span_request_ptr, span_index_ptr, span_row_ptr, GROUP, ROWS, SPAN_LEN, gl.SliceLayout(1, SCORES)
    )
    out_ptrs = log_sums_ptr + ((first_head + head).to(gl.int64) * num_spans + span) * num_blocks * ROWS + part
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    query_tile = query_tiles.index(CONSUMER)
    lead = gl.where(has_past, 1, 0)
    num_steps = lead + high - first
    copying = (keys, key_tiles, full, empty, table_row_ptr, lead, first, num_steps, head_row, page_rows)
    row = head_row
    if CONSUMER == 0:
        row = _row_of_step(copying, 0, PAGE_SIZE)
        for ahead in gl.static_range(LOOK):
            row = _copy_next(copying, row, ahead, PAGE_SIZE, STAGES)
    step = 0
    top = gl.zeros([ROWS_AT_ONCE], gl.float32, gl.SliceLayout(1, SCORES))
    if has_past:
        scores = _scores(query_tile, key_tiles, full, empty, 0, STAGES)
        if CONSUMER == 0:
            row = _copy_next(copying, row, LOOK, PAGE_SIZE, STAGES)
        top = gl.max(scores, 1) * scale_log2
        if keeps_first:
            gl.store(out_ptrs, top + _log2(gl.sum(_exp2(scores * scale_log2 - top[:, None]), 1)), mask=is_row)
        step = 1
        most = gl.zeros_like(top)
        if first < own:
            if AREG == 0:
                query = query_tile
            elif AREG < HEAD_DIM:
                query = query_tile.slice(0, AREG, 1).load(A)
            else:
                query = query_tile.load(A)
            if PIPE:
                base = gl.convert_layout(top, gl.SliceLayout(1, HALF))
                most_half = gl.convert_layout(most, gl.SliceLayout(1, HALF))
                pointers = gl.convert_layout(out_ptrs, gl.SliceLayout(1, HALF))
                is_row_half = gl.convert_layout(is_row, gl.SliceLayout(1, HALF))
                _await(full, 1, STAGES)
                left = _issue(query, query_tile, key_tiles, 1, 0, HALF_BLOCK, AREG, STAGES)
                for block in range(first, own):
                    step = block - first + 1
                    left = warpgroup_mma_wait(0, deps=(left,))
                    right = _issue(query, query_tile, key_tiles, step, HALF_BLOCK, HALF_BLOCK, AREG, STAGES)
                    sums = _part_sums(_exp2_mixed(left * scale_log2 - base[:, None], POLY))
                    # Past the last one a buffer holds anything, and the scores are not used.
                    mbarrier.wait(
                        full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=block + 1 < own
                    )
                    right = warpgroup_mma_wait(0, deps=(right,))
                    mbarrier.arrive(empty.index(step % STAGES), count=1)
                    left = _issue(query, query_tile, key_tiles, step + 1, 0, HALF_BLOCK, AREG, STAGES)
                    if CONSUMER == 0:
                        row = _copy_next(copying, row, step + LOOK, PAGE_SIZE, STAGES)
                    sums += _part_sums(_exp2_mixed(right * scale_log2 - base[:, None], POLY))
                    total = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, HALF))
                    most_half = gl.maximum(most_half, total)
                    gl.store(pointers + block * ROWS, base + _log2(total), mask=is_row_half)
                left = warpgroup_mma_wait(0, deps=(left,))
                most = gl.convert_layout(most_half, gl.SliceLayout(1, SCORES))
            else:
                for block in range(first, own):
                    step = block - first + 1
                    _await(full, step, STAGES)
                    scores = _issue(query, query_tile, key_tiles, step, 0, BLOCK_N, AREG, STAGES)
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                    mbarrier.arrive(empty.index(step % STAGES), count=1)
                    if CONSUMER == 0:
                        row = _copy_next(copying, row, step + LOOK, PAGE_SIZE, STAGES)
                    total = gl.sum(_exp2_mixed(scores * scale_log2 - top[:, None], POLY), 1)
                    most = gl.maximum(most, total)
                    gl.store(out_ptrs + block * ROWS, top + _log2(total), mask=is_row)
            step = own - first + 1
        overflow = gl.max((most >= _HUGE).to(gl.int32), 0)
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        verdicts.slice(CONSUMER * 32, 32).store(gl.full([32], 0, gl.int32, LANES) + overflow)
        mbarrier.arrive(done, count=1)
    for block in range(own, high):
        scores = _scores(query_tile, key_tiles, full, empty, step + block - own, STAGES)
        if CONSUMER == 0:
            row = _copy_next(copying, row, step + block - own + LOOK, PAGE_SIZE, STAGES)
        key_pos = block * BLOCK_N + offs_n
        gl.store(out_ptrs + block * ROWS, _log_sums(scores, scale_log2, position, key_pos, True), mask=is_row)
    if has_past:
        mbarrier.wait(done, 0)
        LANES2: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        if gl.max(verdicts.load(LANES2), 0) != 0:
            step += high - own
            again = (keys, key_tiles, full, empty, table_row_ptr, step, first, step + own - first, head_row, page_rows)
            if CONSUMER == 0:
                row = _row_of_step(again, step, PAGE_SIZE)
                for ahead in gl.static_range(LOOK):
                    row = _copy_next(again, row, step + ahead, PAGE_SIZE, STAGES)
            for block in range(first, own):
                scores = _scores(query_tile, key_tiles, full, empty, step + block - first, STAGES)
                if CONSUMER == 0:
                    row = _copy_next(again, row, step + block - first + LOOK, PAGE_SIZE, STAGES)
                key_pos = block * BLOCK_N + offs_n
                pointers_ = out_ptrs + block * ROWS
                is_high = gl.load(pointers_, mask=is_row, other=0.0) > top + 119.5
                gl.store(pointers_, _log_sums(scores, scale_log2, position, key_pos, True), mask=is_row & is_high)


@gluon.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def alone_kernel(
    query_ptr, keys, block_table_ptr, span_request_ptr, span_index_ptr, span_row_ptr, log_sums_ptr, scale_log2,
    num_spans, num_blocks, num_splits, stride_query_token, stride_query_head, stride_block_table, page_rows, head_rows,
    GROUP: gl.constexpr, ROWS: gl.constexpr, SPAN_LEN: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
    PIPE: gl.constexpr, AREG: gl.constexpr, POLY: gl.constexpr,
):
    HEAD_DIM: gl.constexpr = keys.block_type.shape[1]
    SEGMENTS: gl.constexpr = CONSUMERS * ROWS_AT_ONCE // ROWS
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    packs = num_spans * GROUP // SEGMENTS
    program = gl.program_id(0)
    split = program % num_splits
    program = program // num_splits
    pack = packs - 1 - program % packs
    kv_head = program // packs
    first_segment = pack * SEGMENTS
    first_span = first_segment // GROUP
    request = gl.load(span_request_ptr + first_span)
    BLOCKS: gl.constexpr = SPAN_LEN // BLOCK_N
    span = (first_segment + gl.minimum(gl.arange(0, 128, layout=LANES), SEGMENTS - 1)) // GROUP
    end = gl.where(request >= 0, (gl.max(gl.load(span_index_ptr + span), 0) + 1) * BLOCKS, 0)
    per_split = (end + num_splits - 1) // num_splits
    low = gl.minimum(split * per_split, end)
    high = gl.minimum(low + per_split, end)
    own = gl.minimum(gl.maximum(gl.load(span_index_ptr + first_span) * BLOCKS, low), high)
    has_past = low < own
    keeps_first = low == 0
    # The first block is done before the others.
    first = gl.where(has_past, gl.maximum(low, 1), low)
    table_row_ptr = block_table_ptr + request.to(gl.int64) * stride_block_table
    first_head = kv_head * GROUP

    dtype: gl.constexpr = keys.dtype
    query_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS_AT_ONCE, HEAD_DIM], keys.layout)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    FLAGS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    verdicts = gl.allocate_shared_memory(gl.int32, [128], FLAGS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    mbarrier.init(done, count=CONSUMERS)
    fence_async_shared()

    computing = (
        keys, table_row_ptr, kv_head * head_rows, page_rows, query_tiles, key_tiles, full, empty, done, verdicts, query_ptr, span_request_ptr, span_index_ptr, span_row_ptr,
        log_sums_ptr, first_segment, first_head, num_spans, num_blocks, has_past, keeps_first, first, own, high,
        scale_log2, stride_query_token, stride_query_head, GROUP, ROWS, SPAN_LEN, STAGES,
    )
    gl.warp_specialize(
        [
            (_consume_alone, (0, PIPE, AREG, POLY, PAGE_SIZE) + computing),
            (_consume_alone, (1, PIPE, AREG, POLY, PAGE_SIZE) + computing),
            (_consume_alone, (2, PIPE, AREG, POLY, PAGE_SIZE) + computing),
            (_consume_alone, (3, PIPE, AREG, POLY, PAGE_SIZE) + computing),
        ],
        [4, 4, 4],
        [128, 128, 128],
    )
