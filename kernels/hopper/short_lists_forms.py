"""Attention over short block lists on Hopper: persistent programs, of which two share a multiprocessor.

A list of three blocks is a chain of product, exponentials, product, which leaves most of a multiprocessor idle. So
there are four such chains at once: two programs, each of one warp group that copies and two that compute 64 queries. To
have the registers, a step is 64 keys. A program takes one query tile after another, and the next tile's queries and
keys come while this one is computed. Source: FlashAttention-3, arXiv 2407.08608, for the roles of the warps.
"""

from farspan.kernels.hopper.prefill_kernel import LN_2, LOWEST
from farspan.kernels.hopper.tile_copies import load_tile, store_tile
from farspan.kernels.hopper.tile_steps import ROWS_AT_ONCE, as_operand, softmax_step
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Tokens of a query tile and of a block.
BLOCK_SIZE = gl.constexpr(128)
# Keys of a step.
KEYS = gl.constexpr(64)
# Tiles whose queries are in shared memory: this one's and the next one's.
QUERY_STAGES = gl.constexpr(2)


@gluon.jit
def _list_of(program, num_tiles, NUM_HEADS: gl.constexpr, HEADS_PER_LIST: gl.constexpr):
    """Where the list of a program's tile stands; the heads of a tile are neighbouring programs."""
    return (program % NUM_HEADS // HEADS_PER_LIST).to(gl.int64) * num_tiles + program // NUM_HEADS


@gluon.jit
def _ring(keys, STAGES: gl.constexpr):
    """Buffers and barriers of two consumers that compute one query tile."""
    HEAD_DIM: gl.constexpr = keys.block_type.shape[1]
    LAYOUT: gl.constexpr = keys.layout
    dtype: gl.constexpr = keys.dtype
    query_tiles = gl.allocate_shared_memory(dtype, [QUERY_STAGES, BLOCK_SIZE, HEAD_DIM], LAYOUT)
    key_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], LAYOUT)
    value_tiles = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_DIM], LAYOUT)
    out_tiles = gl.allocate_shared_memory(dtype, [2, ROWS_AT_ONCE, HEAD_DIM], LAYOUT)
    queries_full = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], mbarrier.MBarrierLayout())
    queries_empty = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Each consumer gives a buffer back.
    for stage in gl.static_range(QUERY_STAGES):
        mbarrier.init(queries_full.index(stage), count=1)
        mbarrier.init(queries_empty.index(stage), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return query_tiles, key_tiles, value_tiles, out_tiles, queries_full, queries_empty, full, empty


@gluon.jit
def _num_turns(first, num_programs, RINGS: gl.constexpr):
    """How many tiles a ring has, the first of which is `first`.

    Loops count rounds and carry what they go through: inside another loop `range(step, end)` makes Triton 3.6 lose the
    outer one's `step`.
    """
    stride = gl.num_programs(0) * RINGS
    return (num_programs - first + stride - 1) // stride


@gluon.jit
def _copy_query(
    queries, query_tiles, queries_full, queries_empty, program, num_programs, turn, NUM_HEADS: gl.constexpr
):
    """Copy the queries of a tile, if there is one."""
    HEAD_DIM: gl.constexpr = query_tiles.shape[2]
    if program < num_programs:
        buffer = turn % QUERY_STAGES
        # A barrier that no phase of has ended yet is passed by waiting for the phase before its first.
        mbarrier.wait(queries_empty.index(buffer), (turn // QUERY_STAGES & 1) ^ 1)
        mbarrier.expect(queries_full.index(buffer), BLOCK_SIZE * HEAD_DIM * 2)
        place = [program // NUM_HEADS * BLOCK_SIZE, program % NUM_HEADS * HEAD_DIM]
        load_tile(queries, place, queries_full.index(buffer), query_tiles.index(buffer))


@gluon.jit
def _copy_block(
    keys, values, key_tiles, value_tiles, full, empty, ids_ptr, index, first_step, first_row, column,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy keys and values of an entry of a list, half a block a step."""
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    row = first_row + gl.load(ids_ptr + index) * BLOCK_SIZE
    for part in gl.static_range(BLOCK_SIZE // KEYS):
        step = first_step + index * (BLOCK_SIZE // KEYS) + part
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * KEYS * HEAD_DIM * 2)
        load_tile(keys, [row + part * KEYS, column], full.index(stage), key_tiles.index(stage))
        load_tile(values, [row + part * KEYS, column], full.index(stage), value_tiles.index(stage))


@gluon.jit
def _count_of(
    block_counts_ptr, program, num_programs, num_tiles, NUM_HEADS: gl.constexpr, HEADS_PER_LIST: gl.constexpr
):
    place = _list_of(program, num_tiles, NUM_HEADS, HEADS_PER_LIST)
    return gl.load(block_counts_ptr + place, mask=program < num_programs, other=0)


@gluon.jit
def _produce(
    queries,
    keys,
    values,
    ring,
    second_ring,
    block_ids_ptr,
    block_counts_ptr,
    num_programs,
    num_tiles,
    tiles_per_sequence,
    max_blocks,
    kv_len,
    NUM_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEADS_PER_LIST: gl.constexpr,
    STAGES: gl.constexpr,
    RINGS: gl.constexpr,
):
    """Copy queries, keys and values of all tiles of the program, as soon as their buffers are free."""
    query_tiles, key_tiles, value_tiles, _, queries_full, queries_empty, full, empty = ring
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    step = 0
    second_step = 0
    program = gl.program_id(0) * RINGS
    for turn in range(_num_turns(program, num_programs, RINGS)):
        count = _count_of(block_counts_ptr, program, num_programs, num_tiles, NUM_HEADS, HEADS_PER_LIST)
        most = count
        _copy_query(queries, query_tiles, queries_full, queries_empty, program, num_programs, turn, NUM_HEADS)
        ids_ptr = block_ids_ptr + _list_of(program, num_tiles, NUM_HEADS, HEADS_PER_LIST) * max_blocks
        first_row = program // NUM_HEADS // tiles_per_sequence * kv_len
        column = program % NUM_HEADS // GROUP_SIZE * HEAD_DIM
        if RINGS == 2:
            second = program + 1
            second_count = _count_of(block_counts_ptr, second, num_programs, num_tiles, NUM_HEADS, HEADS_PER_LIST)
            most = gl.maximum(count, second_count)
            _copy_query(queries, second_ring[0], second_ring[4], second_ring[5], second, num_programs, turn, NUM_HEADS)
            second_ids_ptr = block_ids_ptr + _list_of(second, num_tiles, NUM_HEADS, HEADS_PER_LIST) * max_blocks
            second_row = second // NUM_HEADS // tiles_per_sequence * kv_len
            second_column = second % NUM_HEADS // GROUP_SIZE * HEAD_DIM
        for index in range(most):
            if index < count:
                _copy_block(
                    keys, values, key_tiles, value_tiles, full, empty, ids_ptr, index, step, first_row, column, STAGES
                )
            if RINGS == 2:
                if index < second_count:
                    _copy_block(
                        keys, values, second_ring[1], second_ring[2], second_ring[6], second_ring[7], second_ids_ptr,
                        index, second_step, second_row, second_column, STAGES,
                    )  # fmt: skip
        program += gl.num_programs(0) * RINGS
        step += count * (BLOCK_SIZE // KEYS)
        if RINGS == 2:
            second_step += second_count * (BLOCK_SIZE // KEYS)


@gluon.jit
def _scores(query_tile, key_tiles, full, step, STAGES: gl.constexpr):
    """Issue the product of queries and keys of a step, when they have come."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    no_scores = gl.zeros([ROWS_AT_ONCE, KEYS], gl.float32, SCORES)
    return warpgroup_mma(query_tile, key_tiles.index(stage).permute([1, 0]), no_scores, use_acc=False, is_async=True)


@gluon.jit
def _add_values(scores, value_tiles, acc, row_max, row_sum, step, scale_log2, STAGES: gl.constexpr):
    """The softmax of a step's scores, and the product of its weights and values, which is issued."""
    OUT: gl.constexpr = acc.type.layout
    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    weights = as_operand(weights, value_tiles.dtype, gl.DotOperandLayout(0, OUT, 2))
    acc = warpgroup_mma(weights, value_tiles.index(step % STAGES), acc, is_async=True)
    return weights, acc, row_max, row_sum


@gluon.jit
def _steps0(
    query_tile, key_tiles, value_tiles, full, empty, acc, row_max, row_sum, step, end, scale_log2, STAGES: gl.constexpr
):
    for _ in range(end - step):
        scores = _scores(query_tile, key_tiles, full, step, STAGES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        weights, acc, row_max, row_sum = _add_values(
            scores, value_tiles, acc, row_max, row_sum, step, scale_log2, STAGES
        )
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1
    return acc, row_max, row_sum


@gluon.jit
def _steps1(
    query_tile, key_tiles, value_tiles, full, empty, acc, row_max, row_sum, step, end, scale_log2, STAGES: gl.constexpr
):
    if step < end:
        scores = _scores(query_tile, key_tiles, full, step, STAGES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        for _ in range(end - 1 - step):
            weights, acc, row_max, row_sum = _add_values(
                scores, value_tiles, acc, row_max, row_sum, step, scale_log2, STAGES
            )
            acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
            scores = _scores(query_tile, key_tiles, full, step + 1, STAGES)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
        weights, acc, row_max, row_sum = _add_values(
            scores, value_tiles, acc, row_max, row_sum, end - 1, scale_log2, STAGES
        )
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(empty.index((end - 1) % STAGES), count=1)
    return acc, row_max, row_sum


@gluon.jit
def _steps2(
    query_tile, key_tiles, value_tiles, full, empty, acc, row_max, row_sum, step, end, scale_log2, STAGES: gl.constexpr
):
    if step < end:
        scores = _scores(query_tile, key_tiles, full, step, STAGES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        for _ in range(end - 1 - step):
            weights, acc, row_max, row_sum = _add_values(
                scores, value_tiles, acc, row_max, row_sum, step, scale_log2, STAGES
            )
            scores = _scores(query_tile, key_tiles, full, step + 1, STAGES)
            acc, scores, weights = warpgroup_mma_wait(0, deps=(acc, scores, weights))
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
        weights, acc, row_max, row_sum = _add_values(
            scores, value_tiles, acc, row_max, row_sum, end - 1, scale_log2, STAGES
        )
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(empty.index((end - 1) % STAGES), count=1)
    return acc, row_max, row_sum


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr,
    ring,
    outs,
    lse_ptr,
    block_counts_ptr,
    num_programs,
    num_tiles,
    scale_log2,
    NUM_HEADS: gl.constexpr,
    HEADS_PER_LIST: gl.constexpr,
    HAS_LSE: gl.constexpr,
    STAGES: gl.constexpr,
    RINGS: gl.constexpr,
    FORM: gl.constexpr,
):
    """Attention of 64 rows of every tile of a ring."""
    RING: gl.constexpr = CONSUMER // 2
    HALF: gl.constexpr = CONSUMER % 2
    query_tiles, key_tiles, value_tiles, out_tiles, queries_full, queries_empty, full, empty = ring
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    step = 0
    program = gl.program_id(0) * RINGS + RING
    # Read a tile ahead.
    count = _count_of(block_counts_ptr, program, num_programs, num_tiles, NUM_HEADS, HEADS_PER_LIST)
    for turn in range(_num_turns(program, num_programs, RINGS)):
        end = step + count * (BLOCK_SIZE // KEYS)
        following = program + gl.num_programs(0) * RINGS
        count = _count_of(block_counts_ptr, following, num_programs, num_tiles, NUM_HEADS, HEADS_PER_LIST)
        acc = gl.zeros([ROWS_AT_ONCE, HEAD_DIM], gl.float32, OUT)
        row_max = gl.full([ROWS_AT_ONCE], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
        row_sum = gl.zeros([ROWS_AT_ONCE], gl.float32, gl.SliceLayout(1, SCORES))
        buffer = turn % QUERY_STAGES
        mbarrier.wait(queries_full.index(buffer), turn // QUERY_STAGES & 1)
        query_tile = query_tiles.index(buffer).slice(HALF * ROWS_AT_ONCE, ROWS_AT_ONCE)
        if FORM == 0:
            acc, row_max, row_sum = _steps0(
                query_tile, key_tiles, value_tiles, full, empty, acc, row_max, row_sum, step, end, scale_log2, STAGES
            )
        if FORM == 1:
            acc, row_max, row_sum = _steps1(
                query_tile, key_tiles, value_tiles, full, empty, acc, row_max, row_sum, step, end, scale_log2, STAGES
            )
        if FORM == 2:
            acc, row_max, row_sum = _steps2(
                query_tile, key_tiles, value_tiles, full, empty, acc, row_max, row_sum, step, end, scale_log2, STAGES
            )
        mbarrier.arrive(queries_empty.index(buffer), count=1)
        step = end

        # An empty list leaves a zero output and an LSE of -inf.
        divisor = gl.where(row_sum > 0.0, row_sum, 1.0)
        acc = acc * gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, OUT))[:, None]
        row = program // NUM_HEADS * BLOCK_SIZE + HALF * ROWS_AT_ONCE
        out_tile = out_tiles.index(HALF)
        # The copy of the tile before has left the buffer.
        tma.store_wait(0)
        out_tile.store(acc.to(value_tiles.dtype))
        fence_async_shared()
        store_tile(outs, [row, program % NUM_HEADS * HEAD_DIM], out_tile)
        if HAS_LSE:
            lse = gl.where(row_sum > 0.0, (row_max + gl.log2(divisor)) * LN_2, float("-inf"))
            rows = row + gl.arange(0, ROWS_AT_ONCE, layout=gl.SliceLayout(1, SCORES))
            head_ptr = lse_ptr + (program % NUM_HEADS).to(gl.int64) * num_tiles * BLOCK_SIZE
            gl.store(head_ptr + rows, lse)
        program = following
    tma.store_wait(0)


@gluon.jit
def hopper_short_lists_kernel(
    queries,
    keys,
    values,
    outs,
    lse_ptr,
    block_ids_ptr,
    block_counts_ptr,
    scale_log2,
    num_tiles,
    tiles_per_sequence,
    max_blocks,
    kv_len,
    NUM_HEADS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEADS_PER_LIST: gl.constexpr,
    HAS_LSE: gl.constexpr,
    STAGES: gl.constexpr,
    FORM: gl.constexpr,
    RINGS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One program: every so many query tiles of BLOCK_SIZE tokens of one head.

    queries, keys, values, outs: descriptors of rows [num_tokens, heads * head_dim] in boxes of 128, 64, 64 and 64 rows.
    """
    ring = _ring(keys, STAGES)
    second_ring = ring
    if RINGS == 2:
        second_ring = _ring(keys, STAGES)
    fence_async_shared()

    num_programs = num_tiles * NUM_HEADS
    if RINGS == 1:
        gl.warp_specialize(
            [
                (
                    _produce,
                    (
                        queries, keys, values, ring, second_ring, block_ids_ptr, block_counts_ptr, num_programs,
                        num_tiles, tiles_per_sequence, max_blocks, kv_len, NUM_HEADS, GROUP_SIZE, HEADS_PER_LIST,
                        STAGES, RINGS,
                    ),
                ),
                (
                    _consume,
                    (
                        0, ring, outs, lse_ptr, block_counts_ptr, num_programs, num_tiles, scale_log2,
                        NUM_HEADS, HEADS_PER_LIST, HAS_LSE, STAGES, RINGS, FORM,
                    ),
                ),
                (
                    _consume,
                    (
                        1, ring, outs, lse_ptr, block_counts_ptr, num_programs, num_tiles, scale_log2,
                        NUM_HEADS, HEADS_PER_LIST, HAS_LSE, STAGES, RINGS, FORM,
                    ),
                ),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _produce,
                    (
                        queries, keys, values, ring, second_ring, block_ids_ptr, block_counts_ptr, num_programs,
                        num_tiles, tiles_per_sequence, max_blocks, kv_len, NUM_HEADS, GROUP_SIZE, HEADS_PER_LIST,
                        STAGES, RINGS,
                    ),
                ),
                (
                    _consume,
                    (
                        0, ring, outs, lse_ptr, block_counts_ptr, num_programs, num_tiles, scale_log2,
                        NUM_HEADS, HEADS_PER_LIST, HAS_LSE, STAGES, RINGS, FORM,
                    ),
                ),
                (
                    _consume,
                    (
                        1, ring, outs, lse_ptr, block_counts_ptr, num_programs, num_tiles, scale_log2,
                        NUM_HEADS, HEADS_PER_LIST, HAS_LSE, STAGES, RINGS, FORM,
                    ),
                ),
                (
                    _consume,
                    (
                        2, second_ring, outs, lse_ptr, block_counts_ptr, num_programs, num_tiles, scale_log2,
                        NUM_HEADS, HEADS_PER_LIST, HAS_LSE, STAGES, RINGS, FORM,
                    ),
                ),
                (
                    _consume,
                    (
                        3, second_ring, outs, lse_ptr, block_counts_ptr, num_programs, num_tiles, scale_log2,
                        NUM_HEADS, HEADS_PER_LIST, HAS_LSE, STAGES, RINGS, FORM,
                    ),
                ),
            ],
            [4, 4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip
