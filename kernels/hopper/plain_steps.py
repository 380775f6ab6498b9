"""The main loops of a consumer of the Hopper prefill kernel: blocks that need no mask and meet one rotation.

In heads of 128 the product of a step's weights and values runs beside the next step's softmax, and that of queries and
keys beside the other consumer's. In heads of 64, where exponentials take as long as the products, registers are left
for a second tile of scores: the next step's are computed beside the softmax. `ring` is that of `prefill_kernel`.
"""

from farspan.kernels.hopper.tile_steps import BLOCK_N, ROWS_AT_ONCE, as_operand, softmax_step
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _await_tile(full, step, num_blocks, STAGES: gl.constexpr):
    """Wait for the tile of a step, if there is one."""
    mbarrier.wait(full.index(step % STAGES), step // STAGES & 1, pred=step < num_blocks)


@gluon.jit
def _start_scores(query_tile, key_tiles, step, STAGES: gl.constexpr):
    """Issue the product of queries and keys of a step."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    no_scores = gl.zeros([ROWS_AT_ONCE, BLOCK_N], gl.float32, SCORES)
    keys = key_tiles.index(step % STAGES).permute([1, 0])
    return warpgroup_mma(query_tile, keys, no_scores, use_acc=False, is_async=True)


@gluon.jit
def plain_steps(
    query_tile,
    ring,
    weights,
    acc,
    row_max,
    row_sum,
    first_step,
    end_step,
    num_blocks,
    scale_log2,
    STAGES: gl.constexpr,
):
    """Steps [first_step, end_step). Returns weights, output, maximum and sum.

    weights: of the step before the first, whose product with the values is left to do, as it is for those returned.
    """
    _, key_tiles, value_tiles, keys_full, keys_empty, values_full, values_empty = ring
    OUT: gl.constexpr = acc.type.layout
    for step in range(first_step, end_step):
        stage = step % STAGES
        before = (step - 1) % STAGES
        _await_tile(keys_full, step, num_blocks, STAGES)
        scores = _start_scores(query_tile, key_tiles, step, STAGES)
        _await_tile(values_full, step - 1, num_blocks, STAGES)
        next_acc = warpgroup_mma(weights, value_tiles.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(keys_empty.index(stage), count=1)
        new_weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
        acc, weights = warpgroup_mma_wait(0, deps=(next_acc, weights))
        mbarrier.arrive(values_empty.index(before), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
        weights = as_operand(new_weights, key_tiles.dtype, gl.DotOperandLayout(0, OUT, 2))
    return weights, acc, row_max, row_sum


@gluon.jit
def _query_of(CONSUMER: gl.constexpr, query_tiles, step, far_end, HAS_TURN: gl.constexpr):
    """The rotation of the consumer's queries that a step's keys meet."""
    if HAS_TURN:
        return query_tiles.index(gl.where(step < far_end, 2 + CONSUMER, CONSUMER))
    else:
        return query_tiles.index(CONSUMER)


@gluon.jit
def _step_ahead(
    CONSUMER: gl.constexpr,
    ring,
    scores,
    acc,
    row_max,
    row_sum,
    step,
    far_end,
    num_blocks,
    scale_log2,
    HAS_TURN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One step, the keys of whose follower have come. Returns the follower's scores, output, maximum and sum."""
    query_tiles, key_tiles, value_tiles, keys_full, keys_empty, values_full, values_empty = ring
    OUT: gl.constexpr = acc.type.layout
    following = step + 1
    query_tile = _query_of(CONSUMER, query_tiles, following, far_end, HAS_TURN)
    # Past the last step a buffer holds anything, and the scores are not used.
    next_scores = _start_scores(query_tile, key_tiles, following, STAGES)
    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    weights = as_operand(weights, key_tiles.dtype, gl.DotOperandLayout(0, OUT, 2))
    _await_tile(values_full, step, num_blocks, STAGES)
    next_acc = warpgroup_mma(weights, value_tiles.index(step % STAGES), acc, is_async=True)
    _await_tile(keys_full, following + 1, num_blocks, STAGES)
    next_scores = warpgroup_mma_wait(1, deps=(next_scores,))
    mbarrier.arrive(keys_empty.index(following % STAGES), count=1, pred=following < num_blocks)
    acc, weights = warpgroup_mma_wait(0, deps=(next_acc, weights))
    mbarrier.arrive(values_empty.index(step % STAGES), count=1)
    return next_scores, acc, row_max, row_sum


@gluon.jit
def steps_ahead(
    CONSUMER: gl.constexpr,
    ring,
    weights,
    acc,
    row_max,
    row_sum,
    first_step,
    far_end,
    num_blocks,
    scale_log2,
    HAS_TURN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Steps [first_step, num_blocks), those before `far_end` with the turned query. Returns output, maximum and sum.

    weights: of the step before the first, whose product with the values is left to do.
    """
    query_tiles, key_tiles, value_tiles, keys_full, keys_empty, values_full, values_empty = ring
    OUT: gl.constexpr = acc.type.layout
    before = (first_step - 1) % STAGES
    _await_tile(keys_full, first_step, num_blocks, STAGES)
    query_tile = _query_of(CONSUMER, query_tiles, first_step, far_end, HAS_TURN)
    scores = _start_scores(query_tile, key_tiles, first_step, STAGES)
    _await_tile(values_full, first_step - 1, num_blocks, STAGES)
    acc = warpgroup_mma(weights, value_tiles.index(before), acc, is_async=True)
    _await_tile(keys_full, first_step + 1, num_blocks, STAGES)
    scores, acc, weights = warpgroup_mma_wait(0, deps=(scores, acc, weights))
    mbarrier.arrive(keys_empty.index(first_step % STAGES), count=1, pred=first_step < num_blocks)
    mbarrier.arrive(values_empty.index(before), count=1)

    # In pairs, since scores of one step would have to move from registers to registers.
    for pair in range((num_blocks - first_step) // 2):
        step = first_step + 2 * pair
        odd_scores, acc, row_max, row_sum = _step_ahead(
            CONSUMER, ring, scores, acc, row_max, row_sum, step, far_end, num_blocks, scale_log2, HAS_TURN, STAGES
        )
        scores, acc, row_max, row_sum = _step_ahead(
            CONSUMER, ring, odd_scores, acc, row_max, row_sum, step + 1, far_end, num_blocks, scale_log2, HAS_TURN,
            STAGES,
        )  # fmt: skip
    if (num_blocks - first_step) % 2 == 1:
        last = num_blocks - 1
        new_weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
        weights = as_operand(new_weights, key_tiles.dtype, gl.DotOperandLayout(0, OUT, 2))
        _await_tile(values_full, last, num_blocks, STAGES)
        acc = warpgroup_mma(weights, value_tiles.index(last % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, row_max, row_sum
