"""Split-KV flash-decoding on paged KV: one query token per request or a few, out and LSE.

A request's keys are cut into splits that run in parallel; a second kernel combines them by their LSE. The query heads
of a KV head, for all tokens of the request, form one tile for the tensor cores, so every key and value is read once.
Lengths are read on the device only: a captured graph replays for any lengths. Sources: Flash-Decoding (Dao et al.,
2023); FlashInfer, arXiv 2501.01005, for the combination; STRING, arXiv 2410.18745, for the turned query.
"""

import math

import torch
import triton
import triton.language as tl
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.combine import combine_partials
from farspan.kernels.decode_workspace import DecodeWorkspace, make_decode_workspace
from farspan.kernels.fp8_keys import attend_fp8_keys
from farspan.kernels.rotary_turn import Turn, rotate_tile
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from farspan.kernels.tuning import DECODE_MAX_ROWS, decode_config

LOG2_E = math.log2(math.e)
MAX_DECODE_REQUESTS = 65_535
"""The third axis of a grid has no more programs."""
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _attend_keys(
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
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_HOST: tl.constexpr,
    SKIPS_HOST: tl.constexpr,
    HAS_ROW_BOUNDS: tl.constexpr,
    IS_FP8: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Add the keys at positions [key_begin, key_end) to the running softmax of a [rows, BLOCK_D] query tile.

    scale_log2: a number, or one per row as [rows, 1]. With HAS_ROW_BOUNDS a row sees only those at
    [row_begin, row_end), two [rows] tensors.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
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
        page_offset = page * stride_page
        if SKIPS_HOST:
            in_reach = in_reach & (page + 0 * offs_n >= 0)
        if HAS_HOST:
            page_offset = tl.where(page >= 0, page_offset, host_offset + (-1 - page) * stride_host_page)
        if ONE_PAGE:
            following = start + BLOCK_N
            key_ptrs = kv_head_ptr + page_offset + (start % PAGE_SIZE + offs_n)[:, None] * stride_token
        else:
            following = position + BLOCK_N
            key_ptrs = kv_head_ptr + (page_offset + position % PAGE_SIZE * stride_token)[:, None]
        next_page = tl.load(table_row_ptr + following // PAGE_SIZE, mask=following < key_end, other=0)
        key_ptrs += offs_d[None, :]
        # Memory past a request's end may hold NaN, which no zero weight removes.
        mask_kv = in_reach[:, None] & mask_d
        key = tl.load(key_ptrs, mask=mask_kv, other=0.0)
        value = tl.load(key_ptrs + HEAD_DIM, mask=mask_kv, other=0.0)
        if IS_FP8:
            key = key.to(query.dtype)
            value = value.to(query.dtype)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        if HAS_ROW_BOUNDS:
            seen = (position[None, :] >= row_begin[:, None]) & (position[None, :] < row_end[:, None])
            logits = tl.where(seen & (in_reach & (position >= key_begin))[None, :], logits, float("-inf"))
        else:
            logits = tl.where((in_reach & (position >= key_begin))[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _attend(
    acc, row_max, row_sum, query, key_begin, key_end, row_begin, row_end, kv_head_ptr, table_row_ptr, stride_page,
    stride_token, host_offset, stride_host_page, scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_HOST: tl.constexpr,
    SKIPS_HOST: tl.constexpr, HAS_ROW_BOUNDS: tl.constexpr, IS_FP8: tl.constexpr, KEY_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """`_attend_keys`, or `attend_fp8_keys` where there are KEY_GROUPS."""
    if KEY_GROUPS > 0:
        acc, row_max, row_sum = attend_fp8_keys(
            acc, row_max, row_sum, query, key_begin, key_end, row_begin, row_end, kv_head_ptr, table_row_ptr,
            stride_page, stride_token, host_offset, stride_host_page, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_N,
            PAGE_SIZE, HAS_HOST, SKIPS_HOST, HAS_ROW_BOUNDS, KEY_GROUPS, NUM_STAGES,
        )  # fmt: skip
    else:
        acc, row_max, row_sum = _attend_keys(
            acc, row_max, row_sum, query, key_begin, key_end, row_begin, row_end, kv_head_ptr, table_row_ptr,
            stride_page, stride_token, host_offset, stride_host_page, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N,
            PAGE_SIZE, HAS_HOST, SKIPS_HOST, HAS_ROW_BOUNDS, IS_FP8, PRECISION, NUM_STAGES,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _decode_kernel(
    query_ptr,
    kv_cache_ptr,
    out_ptr,
    lse_ptr,
    block_table_ptr,
    kv_lens_ptr,
    query_start_loc_ptr,
    first_pos_ptr,
    cos_ptr,
    sin_ptr,
    scale_log2,
    value_scale,
    turn_offset,
    num_splits,
    min_split_blocks,
    query_len,
    num_rows,
    num_row_blocks,
    group_size,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    stride_block_table,
    stride_page,
    stride_head,
    stride_token,
    host_offset,
    stride_host_page,
    stride_host_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_HOST: tl.constexpr,
    SKIPS_HOST: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_TURN: tl.constexpr,
    SLOPE: tl.constexpr,
    HAS_FIRST_POS: tl.constexpr,
    HAS_QUERY_LENS: tl.constexpr,
    IS_FP8: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program: one split of one request's keys, for the query heads of one KV head.

    The splits of a head are adjacent in `out_ptr` and `lse_ptr`: element [token, head, split]. A split without keys
    writes only its LSE (-inf), unless it is the only split. With HAS_QUERY_LENS a request has up to `query_len` tokens,
    and a program BLOCK_H of its pairs of token and head; without, request r has the one token r.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    row_block = 0
    if HAS_QUERY_LENS:
        row_block = (request % num_row_blocks).to(tl.int32)
        request = request // num_row_blocks
    kv_len = tl.load(kv_lens_ptr + request)
    num_blocks = (kv_len + BLOCK_N - 1) // BLOCK_N
    split_blocks = tl.maximum((num_blocks + num_splits - 1) // num_splits, min_split_blocks)
    key_begin = split * split_blocks * BLOCK_N
    key_end = tl.minimum(key_begin + split_blocks * BLOCK_N, kv_len)

    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    if HAS_QUERY_LENS:
        offs_h += row_block * BLOCK_H
        in_query = offs_h // group_size
        first_row = tl.load(query_start_loc_ptr + request).to(tl.int64)
        own_len = (tl.load(query_start_loc_ptr + request + 1) - first_row).to(tl.int32)
        is_padding = own_len == 0
        # Requests without tokens come last in a batch. In a captured graph theirs are the rows past all tokens.
        first_row = tl.where(is_padding, request * query_len, first_row)
        token = first_row + in_query
        mask_h = (in_query < tl.where(is_padding, query_len, own_len)) & (token < num_rows)
        kv_len = tl.where(is_padding, 0, kv_len)
        key_end = tl.where(is_padding, 0, key_end)
        head = (kv_head * group_size + offs_h % group_size).to(tl.int64)
    else:
        token = request
        mask_h = offs_h < group_size
        head = (kv_head * group_size + offs_h).to(tl.int64)
    mask_q = mask_h[:, None] & (offs_d[None, :] < HEAD_DIM)
    lse_ptrs = lse_ptr + token * stride_lse_token + head * stride_lse_head + split
    if (key_begin >= key_end) & (num_splits > 1):
        tl.store(lse_ptrs, float("-inf"), mask=mask_h)
        return

    if HAS_QUERY_LENS:
        query_ptrs = query_ptr + (token * stride_query_token + head * stride_query_head)[:, None] + offs_d[None, :]
    else:
        query_ptrs = query_ptr + token * stride_query_token + (head * stride_query_head)[:, None] + offs_d[None, :]
    query = tl.load(query_ptrs, mask=mask_q, other=0.0)
    # float8 becomes float16 in one instruction, and a row of a bfloat16 query fits once its largest number is near 1.
    NARROWS: tl.constexpr = IS_FP8 and query_ptr.dtype.element_ty == tl.bfloat16
    if NARROWS:
        exponent = tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(query.to(tl.float32)), 1), 1e-30)))
        shrink = tl.exp2(-exponent)[:, None]
        scale_log2 = scale_log2 * tl.exp2(exponent)[:, None]
    kv_head_ptr = kv_cache_ptr + kv_head.to(tl.int64) * stride_head
    if HAS_HOST:
        # From the head's place on the device to its place in host memory.
        host_offset += kv_head.to(tl.int64) * (stride_host_head - stride_head)
    table_row_ptr = block_table_ptr + request * stride_block_table
    # Finite, so that a step whose keys are all masked leaves no NaN.
    row_max = tl.full([BLOCK_H], -1.0e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    near_begin = key_begin
    # Keys that each row sees: up to its own position, and turned those below its bound.
    row_begin = offs_h
    row_end = offs_h
    if HAS_QUERY_LENS:
        if HAS_FIRST_POS:
            first_position = tl.load(first_pos_ptr + request)
        else:
            first_position = kv_len - own_len
        row_begin = tl.zeros([BLOCK_H], dtype=tl.int32)
        row_end = first_position + in_query + 1
    if HAS_TURN:
        if HAS_QUERY_LENS:
            # Keys between the bounds of the first and the last token are read twice: they meet turned queries of some
            # rows and plain ones of others.
            row_begin = SLOPE * (row_end - 1) + turn_offset
            last_bound = SLOPE * (first_position + own_len - 1) + turn_offset
            near_begin = tl.minimum(tl.maximum(key_begin, SLOPE * first_position + turn_offset), key_end)
            far_end = tl.minimum(tl.maximum(key_begin, last_bound), key_end)
        else:
            if HAS_FIRST_POS:
                first_position = tl.load(first_pos_ptr + request)
            else:
                first_position = kv_len - 1
            near_begin = tl.minimum(tl.maximum(key_begin, SLOPE * first_position + turn_offset), key_end)
            far_end = near_begin
        query_far = rotate_tile(query, query_ptrs, cos_ptr, sin_ptr, mask_q, HALF_ROTARY, IS_NEOX, BLOCK_D)
        if NARROWS:
            query_far = (query_far.to(tl.float32) * shrink).to(tl.float16)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, query_far, key_begin, far_end, tl.zeros_like(row_begin),
            tl.minimum(row_begin, row_end), kv_head_ptr, table_row_ptr, stride_page, stride_token, host_offset,
            stride_host_page, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_N, PAGE_SIZE, HAS_HOST, SKIPS_HOST,
            HAS_QUERY_LENS, IS_FP8, KEY_GROUPS, PRECISION, NUM_STAGES,
        )  # fmt: skip
    if NARROWS:
        query = (query.to(tl.float32) * shrink).to(tl.float16)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, query, near_begin, key_end, row_begin, row_end, kv_head_ptr, table_row_ptr, stride_page,
        stride_token, host_offset, stride_host_page, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_N, PAGE_SIZE,
        HAS_HOST, SKIPS_HOST, HAS_QUERY_LENS, IS_FP8, KEY_GROUPS, PRECISION, NUM_STAGES,
    )  # fmt: skip

    has_keys = row_sum > 0
    divisor = tl.where(has_keys, row_sum, 1.0)
    out = acc / divisor[:, None]
    if IS_FP8:
        out = out * value_scale
    lse = tl.where(has_keys, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    if HAS_QUERY_LENS:
        out_ptrs = out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + split * HEAD_DIM
    else:
        out_ptrs = out_ptr + token * stride_out_token + (head * stride_out_head)[:, None] + split * HEAD_DIM
    tl.store(out_ptrs + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptrs, lse, mask=mask_h)


def paged_decode(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    scale: float,
    *,
    num_splits: int,
    min_split_keys: int,
    query_len: int = 1,
    is_alone: bool = False,
    turn: Turn | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token per request over all its keys, or of a few over those up to their own.

    query: [num_tokens, num_q_heads, head_dim], float16, bfloat16 or float32, last axis contiguous.
    kv: pages of the query's dtype or float8_e4m3fn, for all KV heads that the query heads share.
    batch: lengths and positions are read on the device only.
        With `query_len` 1 row r of the query is request r, and `query_start_loc` is not read; kv_len 0 (padding) gives
        out 0 and lse -inf. Without `first_pos` a query is at position `kv_len - 1`, so that any row of a prompt can be
        a request, to learn its LSE over all its keys.
        Else `query_start_loc` says which rows a request has; a query at position p sees keys [0, p]. Requests without
        rows (padding) come after all others, and rows [r * query_len, (r + 1) * query_len) of such a request r give
        out 0 and lse -inf, as far as there are any. They are the rows that no request has where all the others have
        `query_len`; elsewhere rows that no request has are left as they are.
    scale: factor on the logits, that of stored keys included.
    query_len: the most tokens that a request may have, at least 1.
    num_splits: parts that each sequence is cut into, at least 1; part of the grid, hence fixed in a captured graph.
    min_split_keys: fewest keys per part, rounded down to whole steps of the kernel; parts without keys end at once.
    is_alone: whether every program has a multiprocessor to itself, so that it needs more keys on their way; changes how
        float8 is read.
    turn: keys below its bound meet the turned query.
    out: [num_tokens, num_q_heads, head_dim], or None to allocate it; lse: [num_q_heads, num_tokens] float32, natural
        log, or None to allocate it.
    workspace: for num_tokens * num_q_heads * num_splits partial outputs; allocated when None and num_splits > 1.
    Returns out and lse. Sources: module docstring.
    """
    num_tokens, num_q_heads, head_dim = query.shape
    num_kv_heads, block_table = kv.num_kv_heads, batch.block_table
    assert kv.head_dim == head_dim, kv.pages.shape
    assert num_q_heads % num_kv_heads == 0, (num_q_heads, num_kv_heads)
    assert query.stride(2) == 1, query.stride()
    assert kv.pages.stride(3) == 1, kv.pages.stride()
    assert block_table.stride(1) == 1, block_table.stride()
    assert query_len >= 1, query_len
    assert query_len > 1 or batch.num_reqs >= num_tokens, (batch.num_reqs, num_tokens)
    assert num_splits >= 1, num_splits
    out = torch.empty_like(query) if out is None else out
    if lse is None:
        lse = torch.empty(num_q_heads, num_tokens, dtype=torch.float32, device=query.device)
    assert out.stride(2) == 1, out.stride()
    assert lse.stride(1) == 1, lse.stride()
    if num_tokens == 0:
        return out, lse

    if num_splits == 1:
        part_out, part_lse = out[None], lse[None]
    else:
        if workspace is None:
            workspace = make_decode_workspace(num_tokens * num_q_heads * num_splits, head_dim, query.device)
        part_out, part_lse = workspace.parts(num_tokens, num_q_heads, num_splits, head_dim)
    decode_parts(
        query,
        kv,
        batch,
        scale,
        part_out,
        part_lse,
        min_split_keys=min_split_keys,
        query_len=query_len,
        is_alone=is_alone,
        turn=turn,
    )
    if num_splits > 1:
        combine_partials(part_out, part_lse, out=out, lse=lse)
    return out, lse


def decode_parts(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    scale: float,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    min_split_keys: int,
    query_len: int = 1,
    is_alone: bool = False,
    turn: Turn | None = None,
    skips_host: bool = False,
) -> None:
    """The parts of `paged_decode`, not combined.

    part_out: [num_splits, num_tokens, num_q_heads, head_dim], splits head_dim apart; part_lse: [num_splits,
        num_q_heads, num_tokens] float32, splits adjacent; both one split that lies anywhere, or of a workspace.
    skips_host: leave out the keys of pages in host memory.
    """
    num_splits, num_tokens, num_q_heads, head_dim = part_out.shape
    block_table, group_size = batch.block_table, num_q_heads // kv.num_kv_heads
    block_d, block_h = triton.next_power_of_2(head_dim), decode_rows(head_dim, group_size, query_len)
    num_row_blocks = triton.cdiv(query_len * group_size, block_h)
    num_programs = num_tokens if query_len == 1 else batch.num_reqs * num_row_blocks
    config = decode_config(head_dim, query.dtype, is_fp8=kv.is_fp8, num_rows=block_h, is_alone=is_alone)
    # Pages of float8 are read in pairs of components.
    assert config.key_groups == 0 or head_dim % 2 == 0, head_dim
    assert num_programs <= MAX_DECODE_REQUESTS, num_programs
    _decode_kernel[(num_splits, kv.num_kv_heads, num_programs)](
        query,
        kv.pages,
        part_out,
        part_lse,
        block_table,
        batch.kv_lens,
        batch.query_start_loc if query_len > 1 else None,
        batch.first_pos,
        turn.cos if turn else None,
        turn.sin if turn else None,
        scale * LOG2_E,
        kv.value_scale if kv.is_fp8 else None,
        turn.offset if turn else 0,
        num_splits,
        min_split_keys // config.keys_per_step,
        *((query_len, num_tokens, num_row_blocks) if query_len > 1 else (None, None, None)),
        group_size,
        query.stride(0),
        query.stride(1),
        part_out.stride(1),
        part_out.stride(2),
        part_lse.stride(2),
        part_lse.stride(1),
        block_table.stride(0),
        kv.pages.stride(0),
        kv.pages.stride(1),
        kv.pages.stride(2),
        host_distance(kv),
        kv.host_pages.stride(0) if kv.host_pages is not None else 0,
        kv.host_pages.stride(1) if kv.host_pages is not None else 0,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_H=block_h,
        BLOCK_N=config.keys_per_step,
        PAGE_SIZE=kv.page_size,
        HAS_HOST=kv.host_pages is not None and not skips_host,
        SKIPS_HOST=skips_host,
        HALF_ROTARY=turn.rotary_dim // 2 if turn else 1,
        IS_NEOX=turn.is_neox if turn else True,
        HAS_TURN=turn is not None,
        SLOPE=turn.slope if turn else 1,
        HAS_FIRST_POS=batch.first_pos is not None,
        HAS_QUERY_LENS=query_len > 1,
        IS_FP8=kv.is_fp8,
        KEY_GROUPS=config.key_groups,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def decode_rows(head_dim: int, group_size: int, query_len: int) -> int:
    """Rows of a program's query tile: pairs of token and query head, a power of two."""
    # The tensor cores take no fewer than 16.
    rows = max(16, triton.next_power_of_2(group_size * query_len))
    return rows if query_len == 1 else min(rows, DECODE_MAX_ROWS if head_dim <= 128 else DECODE_MAX_ROWS // 2)


def host_distance(kv: KVView) -> int:
    """Elements from the first page on the device to the first one in host memory, in the device's address space."""
    if kv.host_pages is None:
        return 0
    assert kv.host_pages.dtype == kv.pages.dtype
    assert kv.host_pages.shape[1:] == kv.pages.shape[1:]
    assert kv.host_pages.stride()[2:] == kv.pages.stride()[2:]
    num_bytes = kv.host_pages.data_ptr() - kv.pages.data_ptr()
    assert num_bytes % kv.pages.element_size() == 0
    return num_bytes // kv.pages.element_size()
