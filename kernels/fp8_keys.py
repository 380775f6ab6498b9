"""Flash-decoding's loop over float8 pages, whose arithmetic would cost more time than their bytes.

Keys and values are read as 16-bit pairs of adjacent components and converted in registers, in the tensor cores' own
order: the even components of a tile and the odd ones are two products. So values, whose products add up over keys,
reach registers by the loads for 16-bit numbers; as single bytes they would take one load each. Where a program has few
rows its warps have a group of each step's keys and a running softmax each, and meet only at the end.
"""

import triton
import triton.language as tl

IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Of two pairs: bytes 0 and 2 become the lower half, which one instruction converts, and 1 and 3 the upper half.
_SORTED = ".reg .b32 sorted; .reg .b16 even, odd; prmt.b32 sorted, $1, 0, 0x3120; mov.b32 {even, odd}, sorted;"
TO_EVEN = tl.constexpr(f"{{ {_SORTED} cvt.rn.f16x2.e4m3x2 $0, even; }}")
TO_ODD = tl.constexpr(f"{{ {_SORTED} cvt.rn.f16x2.e4m3x2 $0, odd; }}")


@triton.jit
def _components(pairs, IS_ODD: tl.constexpr):
    """The first or the second float8 of each pair, in float16; pairs: int16, the first one lower."""
    if IS_INTERPRETED:
        if IS_ODD:
            pairs = pairs >> 8
        components = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        components = tl.inline_asm_elementwise(
            TO_ODD if IS_ODD else TO_EVEN, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2
        )
    return components


@triton.jit
def attend_fp8_keys(
    acc,
    row_max,
    row_sum,
    query,
    key_begin,
    key_end,
    row_begin,
    row_end,
    kv_head_ptr,
    table_row_ptr,
    stride_page,
    stride_token,
    host_offset,
    stride_host_page,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_HOST: tl.constexpr,
    SKIPS_HOST: tl.constexpr,
    HAS_ROW_BOUNDS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Add the keys at positions [key_begin, key_end) to the running softmax of a float16 [BLOCK_H, BLOCK_D] query tile.

    As decode's loop over pages of other dtypes, which says what the arguments are. scale_log2 is above 0. HEAD_DIM and
    the strides and offset of pages are even. KEY_GROUPS: 1, or as many as warps, with at least 16 keys of a step each.
    """
    HALF: tl.constexpr = BLOCK_D // 2
    HAS_GROUPS: tl.constexpr = KEY_GROUPS > 1
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    query_even, query_odd = tl.split(tl.reshape(query, [BLOCK_H, HALF, 2]))
    offs_n = tl.arange(0, BLOCK_N)
    if HAS_GROUPS:
        query_even = tl.broadcast_to(query_even[None, :, :], [KEY_GROUPS, BLOCK_H, HALF])
        query_odd = tl.broadcast_to(query_odd[None, :, :], [KEY_GROUPS, BLOCK_H, HALF])
        offs_n = tl.reshape(offs_n, [KEY_GROUPS, BLOCK_N // KEY_GROUPS])
        old_max = tl.full([KEY_GROUPS, BLOCK_H], -1.0e30, dtype=tl.float32)
        sums = tl.zeros([KEY_GROUPS, BLOCK_H], dtype=tl.float32)
        even = tl.zeros([KEY_GROUPS, BLOCK_H, HALF], dtype=tl.float32)
        odd = tl.zeros([KEY_GROUPS, BLOCK_H, HALF], dtype=tl.float32)
    else:
        old_max, sums = row_max, row_sum
        even, odd = tl.split(tl.reshape(acc, [BLOCK_H, HALF, 2]))
    offs_pair = tl.arange(0, HALF)
    mask_pair = offs_pair < HEAD_DIM // 2
    kv_head_ptr = kv_head_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    first = key_begin // BLOCK_N * BLOCK_N
    # Page ids are loaded one step ahead, so that loads of keys and values do not wait for them.
    if ONE_PAGE:
        next_page = tl.load(table_row_ptr + first // PAGE_SIZE, mask=key_begin < key_end, other=0)
    else:
        position = first + offs_n
        next_page = tl.load(table_row_ptr + position // PAGE_SIZE, mask=position < key_end, other=0)
    for start in tl.range(first, key_end, BLOCK_N, num_stages=NUM_STAGES):
        position = start + offs_n
        in_reach = position < key_end
        page = next_page.to(tl.int64)
        page_offset = page * (stride_page // 2)
        if SKIPS_HOST:
            in_reach = in_reach & (page + 0 * offs_n >= 0)
        if HAS_HOST:
            page_offset = tl.where(page >= 0, page_offset, host_offset // 2 + (-1 - page) * (stride_host_page // 2))
        if ONE_PAGE:
            following = start + BLOCK_N
            pair_ptrs = kv_head_ptr + page_offset + tl.expand_dims(start % PAGE_SIZE + offs_n, -1) * (stride_token // 2)
        else:
            following = position + BLOCK_N
            pair_ptrs = kv_head_ptr + tl.expand_dims(page_offset + position % PAGE_SIZE * (stride_token // 2), -1)
        next_page = tl.load(table_row_ptr + following // PAGE_SIZE, mask=following < key_end, other=0)
        pair_ptrs += offs_pair
        # Memory past a request's end may hold NaN, which no zero weight removes.
        mask_kv = tl.expand_dims(in_reach, -1) & mask_pair
        key = tl.load(pair_ptrs, mask=mask_kv, other=0)
        value = tl.load(pair_ptrs + HEAD_DIM // 2, mask=mask_kv, other=0)
        if HAS_GROUPS:
            key_even, key_odd = _components(key, False).permute(0, 2, 1), _components(key, True).permute(0, 2, 1)
        else:
            key_even, key_odd = tl.trans(_components(key, False)), tl.trans(_components(key, True))
        products = tl.dot(query_odd, key_odd, tl.dot(query_even, key_even))
        seen = tl.expand_dims(in_reach & (position >= key_begin), -2)
        if HAS_ROW_BOUNDS:
            column = tl.expand_dims(position, -2)
            seen = seen & (column >= row_begin[:, None]) & (column < row_end[:, None])
        products = tl.where(seen, products, float("-inf"))
        largest = tl.max(products, -1, keep_dims=True) * scale_log2
        step_max = tl.maximum(old_max, tl.reshape(largest, old_max.shape))
        weights = tl.exp2(products * scale_log2 - tl.expand_dims(step_max, -1))
        decay = tl.exp2(old_max - step_max)
        sums = sums * decay + tl.sum(weights, -1)
        decay = tl.expand_dims(decay, -1)
        weights = weights.to(tl.float16)
        even = tl.dot(weights, _components(value, False), even * decay)
        odd = tl.dot(weights, _components(value, True), odd * decay)
        old_max = step_max
    if HAS_GROUPS:
        new_max = tl.maximum(row_max, tl.max(old_max, 0))
        decay, shares = tl.exp2(row_max - new_max), tl.exp2(old_max - new_max[None, :])
        new_sum = row_sum * decay + tl.sum(sums * shares, 0)
        even_sum, odd_sum = tl.sum(even * shares[:, :, None], 0), tl.sum(odd * shares[:, :, None], 0)
        acc = acc * decay[:, None] + tl.reshape(tl.join(even_sum, odd_sum), [BLOCK_H, BLOCK_D])
    else:
        new_max, new_sum = old_max, sums
        acc = tl.reshape(tl.join(even, odd), [BLOCK_H, BLOCK_D])
    return acc, new_max, new_sum
