"""What a consumer of the Hopper prefill kernel does with a tile in registers or shared memory, step by step."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

# Keys of a step, and of a block of a list.
BLOCK_N = gl.constexpr(128)
# Keys of a step where four consumers share a multiprocessor.
HALF_BLOCK = gl.constexpr(64)
# Rows that a consumer computes: what its four warps give to one instruction of the tensor cores.
ROWS_AT_ONCE = gl.constexpr(64)


@gluon.jit
def turned_query(query, query_ptrs, cos_ptr, sin_ptr, offs_d, mask, HALF_ROTARY: gl.constexpr, IS_NEOX: gl.constexpr):
    """Rotate a query tile, loaded from `query_ptrs` under `mask`, as `rotary_turn.rotate_tile` does."""
    is_rotated = offs_d < 2 * HALF_ROTARY
    if IS_NEOX:
        is_first = offs_d < HALF_ROTARY
        pair = offs_d % HALF_ROTARY
        to_partner = gl.where(is_first, HALF_ROTARY, -HALF_ROTARY)
    else:
        is_first = offs_d % 2 == 0
        pair = offs_d // 2
        to_partner = gl.where(is_first, 1, -1)
    cos = gl.load(cos_ptr + pair, mask=is_rotated, other=1.0)
    sin = gl.load(sin_ptr + pair, mask=is_rotated, other=0.0)
    signed_sin = gl.where(is_first, -sin, sin)
    partner = gl.load(query_ptrs + gl.where(is_rotated, to_partner, 0)[None, :], mask=mask, other=0.0)
    return (query.to(gl.float32) * cos[None, :] + partner.to(gl.float32) * signed_sin[None, :]).to(query.dtype)


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights as the tensor cores take them, converted in pairs: Triton's own conversion takes two instructions."""
    if dtype == gl.bfloat16:
        weights = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [weights], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        weights = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [weights], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(weights, LAYOUT)


@gluon.jit
def softmax_step(scores, row_max, row_sum, scale_log2):
    """Weights of a tile's scores, the factor on what there was before, and the running softmax with them in it."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + gl.sum(weights, 1)
    return weights, rescale, new_max, row_sum


@gluon.jit
def zero_tail(tile, num_keys, LAYOUT: gl.constexpr):
    """Zero the values of a tile at and past `num_keys`: memory there may be NaN, which no weight of zero removes."""
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    values = tile.load(LAYOUT)
    tile.store(gl.where((offs_n < num_keys)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
