"""Steps of 64 keys in the Hopper prefill kernel: few registers, so that two programs share a multiprocessor.

In heads of 64, where exponentials take as long as the products, two consumers leave both units idle for half of the
time. Four fill them, though each of them computes one thing after the other. `ring` is that of `prefill_kernel`.
"""

from farspan.kernels.hopper.tile_steps import BLOCK_N, HALF_BLOCK, ROWS_AT_ONCE, as_operand, softmax_step, zero_tail
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _scores(query_tile, key_tile, half: gl.constexpr):
    """The product of queries and half of a block's keys."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_BLOCK, 16])
    no_scores = gl.zeros([ROWS_AT_ONCE, HALF_BLOCK], gl.float32, SCORES)
    keys = key_tile.slice(half * HALF_BLOCK, HALF_BLOCK).permute([1, 0])
    scores = warpgroup_mma(query_tile, keys, no_scores, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(scores,))


@gluon.jit
def _add_values(scores, value_tile, acc, row_max, row_sum, scale_log2, half: gl.constexpr):
    """Add half of a block's values by their scores to the running softmax."""
    OUT: gl.constexpr = acc.type.layout
    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, scale_log2)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    weights = as_operand(weights, value_tile.dtype, gl.DotOperandLayout(0, OUT, 2))
    acc = warpgroup_mma(weights, value_tile.slice(half * HALF_BLOCK, HALF_BLOCK), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
    return acc, row_max, row_sum


@gluon.jit
def _masked(scores, first_key, kv_end, position, IS_CAUSAL: gl.constexpr):
    """Scores without those of keys past the end, or past a row's own."""
    key = first_key + gl.arange(0, HALF_BLOCK, layout=gl.SliceLayout(0, scores.type.layout))
    mask = (key < kv_end)[None, :]
    if IS_CAUSAL:
        mask = mask & (key[None, :] <= position[:, None])
    return gl.where(mask, scores, float("-inf"))


@gluon.jit
def _block_step(
    query_tile,
    ring,
    scores,
    acc,
    row_max,
    row_sum,
    step,
    num_blocks,
    start,
    kv_end,
    position,
    scale_log2,
    MASKED: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One block. Returns the scores of the following one's first half, output, maximum and sum.

    scores: of the block's first half; computed where they are used, they would cost registers that there are not.
    MASKED: without keys past the end, or past a row's own; the block's first key is at `start`.
    """
    _, key_tiles, value_tiles, keys_full, keys_empty, values_full, values_empty = ring
    HEAD_DIM: gl.constexpr = key_tiles.shape[2]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    stage = step % STAGES
    value_tile = value_tiles.index(stage)
    if MASKED:
        scores = _masked(scores, start, kv_end, position, IS_CAUSAL)
    mbarrier.wait(values_full.index(stage), step // STAGES & 1)
    if MASKED and kv_end - start < BLOCK_N:
        zero_tail(value_tile, kv_end - start, COPY)
    acc, row_max, row_sum = _add_values(scores, value_tile, acc, row_max, row_sum, scale_log2, 0)
    scores = _scores(query_tile, key_tiles.index(stage), 1)
    mbarrier.arrive(keys_empty.index(stage), count=1)
    if MASKED:
        scores = _masked(scores, start + HALF_BLOCK, kv_end, position, IS_CAUSAL)
    acc, row_max, row_sum = _add_values(scores, value_tile, acc, row_max, row_sum, scale_log2, 1)
    following = (step + 1) % STAGES
    mbarrier.wait(keys_full.index(following), (step + 1) // STAGES & 1, pred=step + 1 < num_blocks)
    # Past the last block a buffer holds anything, and the scores are not used.
    scores = _scores(query_tile, key_tiles.index(following), 0)
    mbarrier.arrive(values_empty.index(stage), count=1)
    return scores, acc, row_max, row_sum


@gluon.jit
def half_steps(
    query_tile,
    ring,
    acc,
    row_max,
    row_sum,
    num_blocks,
    last_block,
    kv_end,
    position,
    scale_log2,
    IS_CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """All blocks of a list that has some, the masked one first. Returns output, maximum and sum."""
    mbarrier.wait(ring[3].index(0), 0)
    scores = _scores(query_tile, ring[1].index(0), 0)
    scores, acc, row_max, row_sum = _block_step(
        query_tile, ring, scores, acc, row_max, row_sum, 0, num_blocks, last_block * BLOCK_N, kv_end, position,
        scale_log2, True, IS_CAUSAL, STAGES,
    )  # fmt: skip
    for step in range(1, num_blocks):
        scores, acc, row_max, row_sum = _block_step(
            query_tile, ring, scores, acc, row_max, row_sum, step, num_blocks, 0, kv_end, position, scale_log2, False,
            IS_CAUSAL, STAGES,
        )  # fmt: skip
    return acc, row_max, row_sum
