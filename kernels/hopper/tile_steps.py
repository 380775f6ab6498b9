"""What a consumer of the Hopper prefill kernel does with a tile in registers or shared memory, step by step."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

# Keys of a step, and of a block of a list.
BLOCK_N = gl.constexpr(128)


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
def as_operand(weights, dtype: gl.constexpr, LAYOUT: gl.constexpr, PACK: gl.constexpr):
    """Weights as the tensor cores take them. PACK: convert pairs here, and not where the product needs them."""
    if not PACK:
        weights = weights.to(dtype)
    elif dtype == gl.bfloat16:
        weights = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [weights], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        weights = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [weights], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(weights, LAYOUT)


@gluon.jit
def column_sums(weights):
    """Sums of a row's weights by a thread's own columns: [rows, keys] to [rows, 8]."""
    ROWS: gl.constexpr = weights.shape[0]
    return gl.sum(gl.reshape(weights, [ROWS, weights.shape[1] // 8, 8]), 1)


@gluon.jit
def softmax_step(scores, row_max, row_sum, scale_log2):
    """Weights of a tile's scores, and the running softmax with them in it."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    if len(row_sum.shape) == 1:
        row_sum = row_sum * rescale + gl.sum(weights, 1)
    else:
        row_sum = row_sum * gl.convert_layout(rescale, gl.SliceLayout(1, row_sum.type.layout))[:, None] + column_sums(weights)
    return weights, rescale, new_max, row_sum


# Growth of a row's maximum, in powers of two, up to which the sums keep the old one.
_LAZY = gl.constexpr(8.0)


@gluon.jit
def lazy_softmax_step(scores, row_max, row_sum, scale_log2):
    """As `softmax_step`, but a maximum that grows little stays, so that there is mostly nothing to rescale."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    new_max = gl.where(new_max - row_max > _LAZY, new_max, row_max)
    weights = gl.exp2(scores * scale_log2 - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    if len(row_sum.shape) == 1:
        row_sum = row_sum * rescale + gl.sum(weights, 1)
    else:
        row_sum = row_sum * gl.convert_layout(rescale, gl.SliceLayout(1, row_sum.type.layout))[:, None] + column_sums(weights)
    return weights, rescale, new_max, row_sum


@triton.constexpr_function
def _rescaling(count):
    """Multiply `count` numbers by as many factors, unless the factors of the whole warp are 1."""
    lines = ["{", ".reg .pred a, b;"]
    # A thread holds two rows.
    lines.append(f"setp.ne.f32 a, ${2 * count}, 0f3F800000;")
    lines.append(f"setp.ne.or.f32 a, ${2 * count + 2}, 0f3F800000, a;")
    lines.append("vote.sync.any.pred b, a, 0xffffffff;")
    lines += [f"mov.b32 ${i}, ${count + i};" for i in range(count)] if False else []
    lines.append("@!b bra same;")
    lines += [f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)]
    lines.append("same: }")
    return "\n".join(lines)


@triton.constexpr_function
def _rescaling_operands(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def rescaled(acc, rescale):
    """The output so far times a factor for each row, which are mostly 1."""
    COUNT: gl.constexpr = acc.shape[0] * acc.shape[1] // 128
    factors = gl.zeros_like(acc) + rescale[:, None]
    return gl.inline_asm_elementwise(
        _rescaling(COUNT), _rescaling_operands(COUNT), [acc, factors], dtype=gl.float32, is_pure=True, pack=COUNT
    )


@gluon.jit
def take_turn(CONSUMER: gl.constexpr, LAYOUT: gl.constexpr):
    """Wait until the other consumer has issued its products."""
    x = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    NAME: gl.constexpr = _bar("sync", 8 + CONSUMER)
    gl.inline_asm_elementwise(NAME, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def yield_turn(CONSUMER: gl.constexpr, LAYOUT: gl.constexpr):
    x = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    NAME: gl.constexpr = _bar("arrive", 9 - CONSUMER)
    gl.inline_asm_elementwise(NAME, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _bar(what, number):
    return f"bar.{what} {number}, 256; mov.b32 $0, $1;"


@gluon.jit
def zero_tail(tile, num_keys, LAYOUT: gl.constexpr):
    """Zero the values of a tile at and past `num_keys`: memory there may be NaN, which no weight of zero removes."""
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    values = tile.load(LAYOUT)
    tile.store(gl.where((offs_n < num_keys)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
