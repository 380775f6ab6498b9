"""Split-KV flash-decoding on paged KV: one query token a request, out and LSE.

A request's keys are cut into splits that run side by side; a second kernel combines them by their LSE. The query heads
of a KV head form one tile for the tensor cores, so every key and value is read once. Nothing depends on lengths known
to the host: a captured graph replays for any lengths. Sources: Flash-Decoding (Dao et al., 2023); FlashInfer, arXiv
2501.01005, for the combination; STRING, arXiv 2410.18745, for shifted positions.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from farspan.kernels.rotary_turn import RotaryShift, rotate_tile
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))

# Fewest keys that a split is worth where all programs run at once, so that splits hide latency, and where they queue,
# so that a split only costs its start. H100 80GB, 2026-11-22: 1 x 1K takes 8.1 us in 8 splits, 9.7 in 4; 256 x 1K
# 359 us in 1, 397 in 4.
MIN_SPLIT_KEYS = 128
MIN_QUEUED_SPLIT_KEYS = 512

# Programs that run on a multiprocessor at once, by shared memory. One alone draws its share of the bandwidth: what
# costs is a multiprocessor with more of them than the others. H100 80GB, 2026-11-22: 1 x 128K takes 190 us in 16 splits
# (128 programs), 199 in 24; 8 x 32K 364 us in 2, 4 or 6 splits (at most 384 programs), 403 in 8.
PROGRAMS_PER_SM = 3

# Programs a multiprocessor that a batch is cut into where its tiles alone fill the device: short programs leave no long
# request running alone at the end, but those that find no keys of theirs cost time. H100 80GB, 2026-11-22, 32 requests
# in 1 and in 8 splits: of 8K each 359 and 367 us, of 4K to 8K 293 and 285 us, of 2K but one of 128K 2215 and 530 us.
QUEUED_PROGRAMS_PER_SM = 16

# Most splits, so that the combination stays small.
MAX_SPLITS = 128

# Bytes of keys and values that one of three pipeline stages holds: two programs fit into Hopper's 227 KiB of shared
# memory, one into the 99 KiB of the smallest devices. H100 80GB, 2026-11-22.
STAGE_BYTES = 32 * 1024
NUM_STAGES = 3


@triton.jit
def _attend_keys(
    acc,
    row_max,
    row_sum,
    query,
    key_begin,
    key_end,
    kv_head_ptr,
    table_row_ptr,
    stride_page,
    stride_token,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Add the keys at positions [key_begin, key_end) to the running softmax of a [rows, BLOCK_D] query tile."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < HEAD_DIM
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    first = key_begin // BLOCK_N * BLOCK_N
    # Page ids are loaded one step ahead, so that the loads of keys and values wait for no other load.
    if ONE_PAGE:
        next_page = tl.load(table_row_ptr + first // PAGE_SIZE, mask=key_begin < key_end, other=0)
    else:
        position = first + offs_n
        next_page = tl.load(table_row_ptr + position // PAGE_SIZE, mask=position < key_end, other=0)
    for start in tl.range(first, key_end, BLOCK_N, num_stages=NUM_STAGES):
        position = start + offs_n
        in_reach = position < key_end
        page = next_page.to(tl.int64)
        if ONE_PAGE:
            following = start + BLOCK_N
            key_ptrs = kv_head_ptr + page * stride_page + (start % PAGE_SIZE + offs_n)[:, None] * stride_token
        else:
            following = position + BLOCK_N
            key_ptrs = kv_head_ptr + (page * stride_page + position % PAGE_SIZE * stride_token)[:, None]
        next_page = tl.load(table_row_ptr + following // PAGE_SIZE, mask=following < key_end, other=0)
        key_ptrs += offs_d[None, :]
        # Memory past a request's end may hold NaN, which no zero weight removes.
        mask_kv = in_reach[:, None] & mask_d
        key = tl.load(key_ptrs, mask=mask_kv, other=0.0)
        value = tl.load(key_ptrs + HEAD_DIM, mask=mask_kv, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        logits = tl.where((in_reach & (position >= key_begin))[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _decode_kernel(
    query_ptr,
    kv_cache_ptr,
    out_ptr,
    lse_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cos_ptr,
    sin_ptr,
    scale_log2,
    shift,
    num_splits,
    min_split_blocks,
    group_size,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    stride_table,
    stride_page,
    stride_head,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program: one split of one request's keys, for the query heads of one KV head.

    Splits lie side by side behind a head in `out_ptr` and `lse_ptr`: element [request, head, split]. A split without
    keys writes its LSE (-inf) alone, unless it is the only one.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + request)
    num_blocks = (seq_len + BLOCK_N - 1) // BLOCK_N
    split_blocks = tl.maximum((num_blocks + num_splits - 1) // num_splits, min_split_blocks)
    key_begin = split * split_blocks * BLOCK_N
    key_end = tl.minimum(key_begin + split_blocks * BLOCK_N, seq_len)

    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = offs_h < group_size
    mask_q = mask_h[:, None] & (offs_d[None, :] < HEAD_DIM)
    head = (kv_head * group_size + offs_h).to(tl.int64)
    lse_ptrs = lse_ptr + request * stride_lse_token + head * stride_lse_head + split
    if (key_begin >= key_end) & (num_splits > 1):
        tl.store(lse_ptrs, float("-inf"), mask=mask_h)
        return

    query_ptrs = query_ptr + request * stride_query_token + (head * stride_query_head)[:, None] + offs_d[None, :]
    query = tl.load(query_ptrs, mask=mask_q, other=0.0)
    kv_head_ptr = kv_cache_ptr + kv_head.to(tl.int64) * stride_head
    table_row_ptr = block_table_ptr + request * stride_table
    # Finite, so that a step whose keys are all masked leaves no NaN.
    row_max = tl.full([BLOCK_H], -1.0e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    near_begin = key_begin
    if HAS_SHIFT:
        # The token stands at seq_len - 1: keys before seq_len - shift lie at distance `shift` or more.
        near_begin = tl.minimum(tl.maximum(key_begin, seq_len - shift), key_end)
        query_far = rotate_tile(query, query_ptrs, cos_ptr, sin_ptr, mask_q, HALF_ROTARY, IS_NEOX, BLOCK_D)
        acc, row_max, row_sum = _attend_keys(
            acc, row_max, row_sum, query_far, key_begin, near_begin, kv_head_ptr, table_row_ptr, stride_page,
            stride_token, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, NUM_STAGES,
        )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, query, near_begin, key_end, kv_head_ptr, table_row_ptr, stride_page,
        stride_token, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, NUM_STAGES,
    )  # fmt: skip

    has_keys = row_sum > 0
    divisor = tl.where(has_keys, row_sum, 1.0)
    out = acc / divisor[:, None]
    lse = tl.where(has_keys, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    out_ptrs = out_ptr + request * stride_out_token + (head * stride_out_head)[:, None] + split * HEAD_DIM
    tl.store(out_ptrs + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptrs, lse, mask=mask_h)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _combine_kernel(
    split_out_ptr,
    split_lse_ptr,
    out_ptr,
    lse_ptr,
    num_splits,
    stride_out_token,
    stride_out_head,
    stride_lse_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: one head of one request, over all its splits (at most BLOCK_S), STEP of them at a time."""
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(0)
    row = (request * num_heads + head) * num_splits
    offs_s = tl.arange(0, BLOCK_S)
    split_lse = tl.load(split_lse_ptr + row + offs_s, mask=offs_s < num_splits, other=float("-inf"))
    largest = tl.max(split_lse, 0)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(split_lse - finite), 0)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, num_splits, STEP):
        step = start + tl.arange(0, STEP)
        step_lse = tl.load(split_lse_ptr + row + step, mask=step < num_splits, other=float("-inf"))
        weights = tl.exp(step_lse - finite)
        mask = (step < num_splits)[:, None] & (offs_d[None, :] < HEAD_DIM)
        partial_ptrs = split_out_ptr + (row + step)[:, None] * HEAD_DIM + offs_d[None, :]
        partial = tl.load(partial_ptrs, mask=mask, other=0.0)
        # Splits without keys wrote no output: whatever lies there, NaN too, is left out. After the load, so that it
        # need not wait for the LSE.
        partial = tl.where((step_lse > float("-inf"))[:, None], partial, 0.0)
        acc += tl.sum(weights[:, None] * partial, 0)
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor
    out_ptrs = out_ptr + request * stride_out_token + head.to(tl.int64) * stride_out_head + offs_d
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    lse = tl.where(total > 0, largest + tl.log(divisor), float("-inf"))
    tl.store(lse_ptr + head.to(tl.int64) * stride_lse_head + request, lse)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where the splits of a step wait to be combined; kept from step to step, so that captured graphs stay valid."""

    out: torch.Tensor
    """[capacity * head_dim] float32, viewed as [num_reqs, num_q_heads, num_splits, head_dim]."""
    lse: torch.Tensor
    """[capacity] float32, viewed as [num_reqs, num_q_heads, num_splits]."""


def choose_num_splits(num_reqs: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """Number of splits that loads the multiprocessors of a device evenly, whatever the lengths of a batch.

    max_seq_len: an upper bound in tokens; under graph capture the longest that the graph may see.
    num_sms: multiprocessors of the device.
    """
    tiles = max(num_reqs * num_kv_heads, 1)
    if tiles >= num_sms:
        num_splits, min_keys = QUEUED_PROGRAMS_PER_SM * num_sms // tiles, MIN_QUEUED_SPLIT_KEYS
    elif num_reqs > 1:
        num_splits, min_keys = PROGRAMS_PER_SM * num_sms // tiles, MIN_SPLIT_KEYS
    else:
        # Nothing to even out: of one, two or three programs a multiprocessor the first that leaves few without.
        shares = [(per_sm * num_sms // tiles) * tiles / (per_sm * num_sms) for per_sm in range(1, PROGRAMS_PER_SM + 1)]
        per_sm = 1 + next((index for index, share in enumerate(shares) if share >= 0.9), shares.index(max(shares)))
        num_splits, min_keys = per_sm * num_sms // tiles, MIN_SPLIT_KEYS
    return max(min(num_splits, -(-max_seq_len // min_keys), MAX_SPLITS), 1)


def decode_workspace(
    max_num_reqs: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    num_sms: int,
    device: torch.device,
) -> DecodeWorkspace:
    """Buffers that suffice for every batch of up to `max_num_reqs` with `choose_num_splits`' number of splits."""
    splits_of = (choose_num_splits(num_reqs, num_kv_heads, max_seq_len, num_sms) for num_reqs in range(max_num_reqs))
    capacity = num_q_heads * max((index + 1) * splits for index, splits in enumerate(splits_of))
    return _make_workspace(capacity, head_dim, device)


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for the CPU, where kernels run in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _make_workspace(capacity: int, head_dim: int, device: torch.device) -> DecodeWorkspace:
    out = torch.empty(capacity * head_dim, dtype=torch.float32, device=device)
    return DecodeWorkspace(out, torch.empty(capacity, dtype=torch.float32, device=device))


def paged_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    num_splits: int,
    string: RotaryShift | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token a request over its first `seq_len` keys.

    query: [num_reqs, num_q_heads, head_dim], float16, bfloat16 or float32, last dimension contiguous.
    kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], any strides, last dimension contiguous.
    block_table: [num_reqs, max_pages] int32, garbage allowed past a row's last page.
    seq_lens: [num_reqs] int32, read on the device alone; 0 (padding) gives out 0 and lse -inf. The query stands at
        position `seq_len - 1`, so that any row of a prompt can be asked for its full LSE.
    scale: factor on the logits.
    num_splits: at least 1, see `choose_num_splits`; part of the grid, hence fixed in a captured graph.
    string: shifted positions; None for ordinary ones.
    out: [num_reqs, num_q_heads, head_dim] or None; lse: [num_q_heads, num_reqs] float32 or None; natural log.
    workspace: room for num_reqs * num_q_heads * num_splits partial outputs; allocated when None and needed.
    Returns out and lse.
    """
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads, page_size = kv_cache.shape[1:3]
    assert kv_cache.shape[3] == 2 * head_dim, kv_cache.shape
    assert num_q_heads % num_kv_heads == 0, (num_q_heads, num_kv_heads)
    assert query.stride(2) == 1, query.stride()
    assert kv_cache.stride(3) == 1, kv_cache.stride()
    assert block_table.stride(1) == 1, block_table.stride()
    assert num_splits >= 1, num_splits
    out = torch.empty_like(query) if out is None else out
    if lse is None:
        lse = torch.empty(num_q_heads, num_reqs, dtype=torch.float32, device=query.device)
    assert out.stride(2) == 1, out.stride()
    assert lse.stride(1) == 1, lse.stride()
    if num_reqs == 0:
        return out, lse

    group_size = num_q_heads // num_kv_heads
    block_d = triton.next_power_of_2(head_dim)
    block_n = min(64, max(16, STAGE_BYTES // (2 * block_d * kv_cache.element_size())))
    queued = num_splits * num_kv_heads * num_reqs > PROGRAMS_PER_SM * _num_multiprocessors(query.device)
    min_split_keys = MIN_QUEUED_SPLIT_KEYS if queued else MIN_SPLIT_KEYS
    if num_splits == 1:
        split_out, split_lse = out, lse
        out_strides, lse_strides = out.stride()[:2], (1, lse.stride(0))
    else:
        rows = num_reqs * num_q_heads * num_splits
        if workspace is None:
            workspace = _make_workspace(rows, head_dim, query.device)
        assert workspace.lse.numel() >= rows, (workspace.lse.numel(), rows)
        assert workspace.out.numel() >= rows * head_dim, (workspace.out.numel(), rows * head_dim)
        split_out, split_lse = workspace.out, workspace.lse
        out_strides = (num_q_heads * num_splits * head_dim, num_splits * head_dim)
        lse_strides = (num_q_heads * num_splits, num_splits)
    _decode_kernel[(num_splits, num_kv_heads, num_reqs)](
        query,
        kv_cache,
        split_out,
        split_lse,
        block_table,
        seq_lens,
        string.cos if string else None,
        string.sin if string else None,
        scale * LOG2_E,
        string.shift if string else 0,
        num_splits,
        min_split_keys // block_n,
        group_size,
        query.stride(0),
        query.stride(1),
        *out_strides,
        *lse_strides,
        block_table.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_H=max(16, triton.next_power_of_2(group_size)),
        BLOCK_N=block_n,
        PAGE_SIZE=page_size,
        HALF_ROTARY=string.rotary_dim // 2 if string else 1,
        IS_NEOX=string.is_neox if string else True,
        HAS_SHIFT=string is not None,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        NUM_STAGES=NUM_STAGES,
        num_warps=4,
    )
    if num_splits > 1:
        _combine_kernel[(num_q_heads, num_reqs)](
            split_out,
            split_lse,
            out,
            lse,
            num_splits,
            out.stride(0),
            out.stride(1),
            lse.stride(0),
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_S=triton.next_power_of_2(num_splits),
            STEP=min(16, triton.next_power_of_2(num_splits)),
            num_warps=4,
        )
    return out, lse
