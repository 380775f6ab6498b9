"""Attention over short block lists on contiguous tensors: the kernel behind `attention` where a tile reads few blocks.

With few blocks a tile, time goes to latency: the paged kernel looks up request, chunk and page before its first key,
and runs one loop without and one with masks. Here a tile's place follows from its number alone, so that queries and
list are read at once, and one loop keeps the loads of all its blocks in flight. Any mask applies to every step.
"""

import torch
import triton
import triton.language as tl
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import short_list_config

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _short_list_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    lengths_ptr,
    block_ids_ptr,
    block_counts_ptr,
    scale_log2,
    num_heads,
    num_tiles,
    tiles_per_sequence,
    max_blocks,
    query_len,
    kv_len,
    group_size,
    heads_per_list,
    stride_query_batch,
    stride_query_token,
    stride_query_head,
    stride_kv_batch,
    stride_kv_token,
    stride_kv_head,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_RAGGED: tl.constexpr,
):
    """One program: a query tile of BLOCK_SIZE tokens of one head; heads of a tile run side by side."""
    program = tl.program_id(0)
    head = program % num_heads
    tile = program // num_heads
    sequence = (tile // tiles_per_sequence).to(tl.int64)
    first_query = kv_len - query_len
    query_block = first_query // BLOCK_SIZE + tile % tiles_per_sequence
    list_index = (head // heads_per_list).to(tl.int64) * num_tiles + tile
    num_blocks = tl.load(block_counts_ptr + list_index)
    # Read at once: an id looked up inside the loop would keep the pipeliner from loading blocks ahead.
    offs_block = tl.arange(0, MAX_BLOCKS)
    ids = tl.load(block_ids_ptr + list_index * max_blocks + offs_block, mask=offs_block < num_blocks, other=0)
    length = kv_len
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + sequence), kv_len)
        num_blocks = tl.where(query_block * BLOCK_SIZE < length, num_blocks, 0)

    offs_m = tl.arange(0, BLOCK_SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    position = query_block * BLOCK_SIZE + offs_m
    mask_m = (position >= first_query) & (position < kv_len)
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    row = (position - first_query).to(tl.int64)
    query_ptrs = query_ptr + sequence * stride_query_batch + head.to(tl.int64) * stride_query_head
    query = tl.load(query_ptrs + row[:, None] * stride_query_token + offs_d[None, :], mask=mask_q, other=0.0)

    kv_offset = sequence * stride_kv_batch + (head // group_size).to(tl.int64) * stride_kv_head
    acc = tl.zeros([BLOCK_SIZE, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_SIZE], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    STEPS_PER_BLOCK: tl.constexpr = BLOCK_SIZE // BLOCK_N
    HAS_MASK: tl.constexpr = HAS_LENGTHS or IS_CAUSAL or IS_RAGGED
    for step in tl.range(0, num_blocks * STEPS_PER_BLOCK):
        block = tl.sum(tl.where(offs_block == step // STEPS_PER_BLOCK, ids, 0), 0)
        offs_n = block * BLOCK_SIZE + (step % STEPS_PER_BLOCK) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_kv = kv_offset + offs_n.to(tl.int64)[:, None] * stride_kv_token + offs_d[None, :]
        if HAS_MASK or HEAD_DIM != BLOCK_D:
            mask_kv = (offs_n < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
            key = tl.load(key_ptr + offs_kv, mask=mask_kv, other=0.0)
            value = tl.load(value_ptr + offs_kv, mask=mask_kv, other=0.0)
        else:
            key = tl.load(key_ptr + offs_kv)
            value = tl.load(value_ptr + offs_kv)
        scores = tl.dot(query, tl.trans(key))
        if HAS_MASK:
            visible = (offs_n < length)[None, :]
            if IS_CAUSAL:
                visible = visible & (offs_n[None, :] <= position[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = new_max
        if HAS_MASK:
            # A row may have seen no key yet.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None])
        row_max = new_max

    if HAS_LENGTHS:
        # Padding queries: as if they had seen no key.
        row_sum = tl.where(position < length, row_sum, 0.0)
        acc = tl.where((position < length)[:, None], acc, 0.0)
    seen = row_sum > 0.0
    divisor = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    token = sequence * query_len + row
    out_ptrs = out_ptr + (token * num_heads + head)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, (acc / divisor[:, None]).to(out_ptr.dtype.element_ty), mask=mask_q)
    num_tokens = (num_tiles // tiles_per_sequence).to(tl.int64) * query_len
    tl.store(lse_ptr + head * num_tokens + token, lse, mask=mask_m)


def short_list_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: PrefillTiles,
    block_lists: BlockLists,
    scale: float,
    *,
    causal: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: tuple[int, int, int] | None = None,
) -> None:
    """Attention over block lists; the arguments are those of `attention`, checked.

    q: [batch, query_len, heads, head_dim], float16 or bfloat16; k, v: [batch, kv_len, kv_heads, head_dim], of equal
        strides; the last axes contiguous, head_dim at most 128.
    tiles: those of `attention_tiles`. Lists may reach past a sequence's length.
    lengths: [batch] integers on the device, or None.
    out: contiguous, of q's shape; lse: [heads, batch * query_len] float32, contiguous. Both are written in full.
    config: keys of a step, warps and stages; tuned if None.
    """
    batch, query_len, heads, head_dim = q.shape
    _, kv_len, kv_heads, _ = k.shape
    assert k.stride() == v.stride()
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert block_lists.block_ids.is_contiguous()
    assert block_lists.block_counts.is_contiguous()
    block_n, num_warps, num_stages = config or short_list_config(head_dim, tiles.block_size)
    num_list_heads, num_tiles, max_blocks = block_lists.block_ids.shape
    _short_list_kernel[(num_tiles * heads,)](
        q,
        k,
        v,
        out,
        lse,
        lengths,
        block_lists.block_ids,
        block_lists.block_counts,
        scale * LOG2_E,
        heads,
        num_tiles,
        num_tiles // batch,
        max_blocks,
        query_len,
        kv_len,
        heads // kv_heads,
        heads // num_list_heads,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        MAX_BLOCKS=triton.next_power_of_2(max_blocks),
        BLOCK_SIZE=tiles.block_size,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=block_n,
        HAS_LENGTHS=lengths is not None,
        IS_CAUSAL=causal,
        IS_RAGGED=kv_len % tiles.block_size != 0,
        num_warps=num_warps,
        num_stages=num_stages,
    )
