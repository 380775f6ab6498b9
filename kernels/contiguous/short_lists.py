"""The short-list kernel: attention on contiguous tensors where every block list has few blocks.

With few blocks per tile, latency decides: the paged kernel looks up request, chunk and page before its first key.
Here a tile's place follows from its number, so that queries and list are read at once, and one loop keeps the loads of
several blocks in flight. Where sequences end inside a block, a second loop with masks takes those blocks; a causal mask
applies to every step, since it cuts a large part of the blocks of a short list. Source: FlashAttention-2, arXiv
2307.08691, for the streaming softmax.
"""

import torch
import triton
import triton.language as tl
from farspan.kernels.contiguous.token_rows import have_token_rows, token_rows
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import ShortListConfig, device_capability, short_list_config

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _add_keys(
    acc,
    row_max,
    row_sum,
    query,
    key,
    value,
    position,
    offs_n,
    end,
    scale_log2,
    IS_MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """One step of the streaming softmax."""
    scores = tl.dot(query, tl.trans(key))
    if IS_MASKED:
        visible = (offs_n < end)[None, :]
        if IS_CAUSAL:
            visible = visible & (offs_n[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    finite_max = new_max
    if IS_MASKED:
        # A row may have seen no key yet.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * scale_log2 - finite_max[:, None])
    rescale = tl.exp2(row_max - finite_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    if BY_HAND:
        # The product is complete in this step, so that its weights take no registers during the next step's scores.
        acc = tl.fma(acc, tl.broadcast_to(rescale[:, None], acc.shape), tl.dot(weights.to(value.dtype), value))
    else:
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None])
    return acc, new_max, row_sum


@triton.jit
def _short_list_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_rows,
    value_rows,
    out_ptr,
    out_rows,
    lse_ptr,
    lengths_ptr,
    block_ids_ptr,
    block_counts_ptr,
    scale_log2,
    num_tiles,
    tiles_per_sequence,
    max_blocks,
    query_len,
    kv_len,
    stride_query_batch,
    stride_query_token,
    stride_query_head,
    stride_kv_batch,
    stride_kv_token,
    stride_kv_head,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_LIST: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WHOLE_KEYS: tl.constexpr,
    HAS_WHOLE_TILES: tl.constexpr,
    USE_TMA: tl.constexpr,
    BY_HAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a query tile of BLOCK_SIZE tokens of one head; the heads of a tile are neighbouring programs.

    HAS_WHOLE_KEYS: kv_len is a multiple of BLOCK_SIZE; HAS_WHOLE_TILES: so is query_len. `*_rows`: descriptors or None.
    """
    program = tl.program_id(0)
    head = program % NUM_HEADS
    tile = program // NUM_HEADS
    list_index = (head // HEADS_PER_LIST).to(tl.int64) * num_tiles + tile
    # All ids are read here: an id looked up inside the loop would keep the pipeliner from loading blocks ahead.
    offs_block = tl.arange(0, MAX_BLOCKS)
    ids = tl.load(block_ids_ptr + list_index * max_blocks + offs_block, mask=offs_block < max_blocks, other=0)
    num_blocks = tl.load(block_counts_ptr + list_index)
    sequence = tile // tiles_per_sequence
    first_query = kv_len - query_len
    query_block = first_query // BLOCK_SIZE + tile % tiles_per_sequence

    offs_m = tl.arange(0, BLOCK_SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    position = query_block * BLOCK_SIZE + offs_m
    mask_m = (position >= first_query) & (position < kv_len)
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    row = (position - first_query).to(tl.int64)
    query_ptrs = query_ptr + sequence.to(tl.int64) * stride_query_batch + head.to(tl.int64) * stride_query_head
    query_ptrs = query_ptrs + row[:, None] * stride_query_token + offs_d[None, :]
    if HAS_WHOLE_TILES and HEAD_DIM == BLOCK_D:
        query = tl.load(query_ptrs)
    else:
        query = tl.load(query_ptrs, mask=mask_q, other=0.0)

    end = kv_len
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths_ptr + sequence), kv_len).to(tl.int32)
        num_blocks = tl.where(query_block * BLOCK_SIZE < end, num_blocks, 0)
    HAS_TAIL: tl.constexpr = (HAS_LENGTHS or not HAS_WHOLE_KEYS) and not IS_CAUSAL
    num_whole = num_blocks
    if HAS_TAIL:
        is_whole = (offs_block < num_blocks) & (ids * BLOCK_SIZE + BLOCK_SIZE <= end)
        num_whole = tl.sum(is_whole.to(tl.int32), 0)

    kv_head = head // GROUP_SIZE
    kv_offset = sequence.to(tl.int64) * stride_kv_batch + kv_head.to(tl.int64) * stride_kv_head
    acc = tl.zeros([BLOCK_SIZE, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_SIZE], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    STEPS_PER_BLOCK: tl.constexpr = BLOCK_SIZE // BLOCK_N
    for step in tl.range(0, num_whole * STEPS_PER_BLOCK, num_stages=STAGES):
        block = tl.sum(tl.where(offs_block == step // STEPS_PER_BLOCK, ids, 0), 0)
        start = block * BLOCK_SIZE + (step % STEPS_PER_BLOCK) * BLOCK_N
        offs_n = start + tl.arange(0, BLOCK_N)
        if USE_TMA:
            key = key_rows.load([sequence * kv_len + start, kv_head * HEAD_DIM])
            value = value_rows.load([sequence * kv_len + start, kv_head * HEAD_DIM])
        else:
            offs_kv = kv_offset + offs_n.to(tl.int64)[:, None] * stride_kv_token + offs_d[None, :]
            if IS_CAUSAL or HEAD_DIM != BLOCK_D:
                mask_kv = (offs_n < end)[:, None] & (offs_d < HEAD_DIM)[None, :]
                key = tl.load(key_ptr + offs_kv, mask=mask_kv, other=0.0)
                value = tl.load(value_ptr + offs_kv, mask=mask_kv, other=0.0)
            else:
                key = tl.load(key_ptr + offs_kv)
                value = tl.load(value_ptr + offs_kv)
        acc, row_max, row_sum = _add_keys(
            acc,
            row_max,
            row_sum,
            query,
            key,
            value,
            position,
            offs_n,
            end,
            scale_log2,
            IS_CAUSAL,
            IS_CAUSAL,
            BY_HAND,
        )
    if HAS_TAIL:
        for step in tl.range(num_whole * STEPS_PER_BLOCK, num_blocks * STEPS_PER_BLOCK, num_stages=STAGES):
            block = tl.sum(tl.where(offs_block == step // STEPS_PER_BLOCK, ids, 0), 0)
            start = block * BLOCK_SIZE + (step % STEPS_PER_BLOCK) * BLOCK_N
            offs_n = start + tl.arange(0, BLOCK_N)
            offs_kv = kv_offset + offs_n.to(tl.int64)[:, None] * stride_kv_token + offs_d[None, :]
            mask_kv = (offs_n < end)[:, None] & (offs_d < HEAD_DIM)[None, :]
            key = tl.load(key_ptr + offs_kv, mask=mask_kv, other=0.0)
            value = tl.load(value_ptr + offs_kv, mask=mask_kv, other=0.0)
            acc, row_max, row_sum = _add_keys(
                acc, row_max, row_sum, query, key, value, position, offs_n, end, scale_log2, True, False, False
            )

    if HAS_LENGTHS:
        # Padding queries have seen no key.
        row_sum = tl.where(position < end, row_sum, 0.0)
        acc = tl.where((position < end)[:, None], acc, 0.0)
    seen = row_sum > 0.0
    divisor = tl.where(seen, row_sum, 1.0)
    # One division per row; one per element took a sixth of all instructions.
    result = (acc * (1.0 / divisor)[:, None]).to(out_ptr.dtype.element_ty)
    if USE_TMA and HAS_WHOLE_TILES:
        out_rows.store([sequence * query_len + query_block * BLOCK_SIZE - first_query, head * HEAD_DIM], result)
    else:
        token = sequence.to(tl.int64) * query_len + row
        out_ptrs = out_ptr + (token * NUM_HEADS + head)[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(out_ptrs, result, mask=mask_q)
    if HAS_LSE:
        lse = tl.where(seen, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
        num_tokens = (num_tiles // tiles_per_sequence).to(tl.int64) * query_len
        tl.store(lse_ptr + head * num_tokens + sequence.to(tl.int64) * query_len + row, lse, mask=mask_m)


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
    lse: torch.Tensor | None,
    config: ShortListConfig | None = None,
) -> None:
    """Attention over block lists, with arguments that `attention` has checked.

    q: [batch, query_len, heads, head_dim], float16 or bfloat16; k, v: [batch, kv_len, kv_heads, head_dim], with equal
        strides; the last axes contiguous, head_dim at most 128.
    tiles: those of `attention_tiles`. block_lists: ascending; may reach past a sequence's length.
    scale: factor on the logits. causal: as in `attention`.
    lengths: [batch] integers on the device, or None.
    out: contiguous, of q's shape; lse: [heads, batch * query_len] float32, natural log, contiguous, or None. Both are
        written in full, padding included.
    config: steps; those of `tuning.short_list_config` when None.
    """
    batch, query_len, heads, head_dim = q.shape
    _, kv_len, kv_heads, _ = k.shape
    assert k.stride() == v.stride()
    assert out.is_contiguous()
    assert lse is None or lse.is_contiguous()
    assert block_lists.block_ids.is_contiguous()
    assert block_lists.block_counts.is_contiguous()
    if config is None:
        config = short_list_config(
            head_dim,
            tiles.block_size,
            device_capability(q.device),
            has_rows=have_token_rows(k, v, out),
            has_tail=lengths is not None or kv_len % tiles.block_size != 0,
            causal=causal,
        )
    num_list_heads, num_tiles, max_blocks = block_lists.block_ids.shape
    has_whole_keys = kv_len % tiles.block_size == 0
    has_whole_tiles = has_whole_keys and query_len % tiles.block_size == 0
    key_rows = value_rows = out_rows = None
    if config.use_tma:
        key_rows, value_rows = (token_rows(tensor, config.block_n) for tensor in (k, v))
        out_rows = token_rows(out, tiles.block_size)
    _short_list_kernel[(num_tiles * heads,)](
        q,
        k,
        v,
        key_rows,
        value_rows,
        out,
        out_rows,
        lse,
        lengths,
        block_lists.block_ids,
        block_lists.block_counts,
        scale * LOG2_E,
        num_tiles,
        num_tiles // batch,
        max_blocks,
        query_len,
        kv_len,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        NUM_HEADS=heads,
        GROUP_SIZE=heads // kv_heads,
        HEADS_PER_LIST=heads // num_list_heads,
        MAX_BLOCKS=triton.next_power_of_2(max_blocks),
        BLOCK_SIZE=tiles.block_size,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=config.block_n,
        HAS_LENGTHS=lengths is not None,
        HAS_LSE=lse is not None,
        IS_CAUSAL=causal,
        HAS_WHOLE_KEYS=has_whole_keys,
        HAS_WHOLE_TILES=has_whole_tiles,
        USE_TMA=config.use_tma,
        BY_HAND=config.add_by_hand,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
