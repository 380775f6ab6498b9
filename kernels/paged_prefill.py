"""Block-sparse prefill attention on paged KV, one pass, with LSE.

A query tile reads the KV blocks of its list; dense attention is the list of all blocks it may see. Only the last block
of a list can need a mask (the diagonal of a causal tile, the ragged end of any other), so it is split off and the main
loop has none. Softmax runs in base 2 with the scale folded in. Sources: FlashAttention-2 (arXiv 2307.08691) for the
streaming softmax, FlexPrefill (arXiv 2502.20766) for block lists, STRING (arXiv 2410.18745) for shifted positions.
"""

import torch
import triton
import triton.language as tl
from farspan.kernels.rope_shift import RotaryShift, rotate_tile
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import PrefillConfig, device_capability, prefill_config
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)

# Which rotation of the query a key tile needs, by its distance from the query tile.
NEAR = tl.constexpr(0)
FAR = tl.constexpr(1)
STRADDLING = tl.constexpr(2)

# Entries of a block list that are compared with the shift at a time.
BLOCKS_COUNTED = tl.constexpr(128)


@triton.jit
def _look_up(ptr, index):
    """Load one int32 as two halves.

    The pipeliner shares its stages among all chained loads of 32 bits and more: seen as one of them, each look-up on
    the way to a page would cost a buffer of keys and values. The entries come out of the L1 cache in time without it.
    """
    halves = (ptr + index).to(tl.pointer_type(tl.uint16))
    return tl.load(halves).to(tl.int32) | (tl.load(halves + 1).to(tl.int32) << 16)


@triton.jit
def _load_key_value(
    key_source,
    value_source,
    table_row_ptr,
    kv_head,
    start,
    kv_end,
    stride_page,
    stride_head,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    USE_TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load the keys and values at positions [start, start + BLOCK_N) of one KV head as [BLOCK_N, BLOCK_D] tiles.

    PAGE_SIZE 0 means one page a request. With USE_TMA the sources are descriptors of rows and the strides count rows.
    MASKED zeroes the values at and past kv_end, which may be NaN in memory.
    """
    offs_n = start + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    # Whether a key tile lies in one page.
    ONE_PAGE: tl.constexpr = PAGE_SIZE == 0 or PAGE_SIZE % BLOCK_N == 0
    if ONE_PAGE:
        if PAGE_SIZE == 0:
            page = tl.load(table_row_ptr)
            offset = start
        else:
            page = _look_up(table_row_ptr, start // PAGE_SIZE)
            offset = start % PAGE_SIZE
    else:
        if MASKED:
            page = tl.load(table_row_ptr + offs_n // PAGE_SIZE, mask=offs_n < kv_end, other=0)
        else:
            page = tl.load(table_row_ptr + offs_n // PAGE_SIZE)
        offset = offs_n % PAGE_SIZE

    if USE_TMA:
        # The copy engine takes 32-bit coordinates; the launcher checks that every row has one.
        row = page * stride_page + kv_head * stride_head + offset
        key = key_source.load([row, 0])
        value = value_source.load([row, 0])
        if MASKED:
            value = tl.where((offs_n < kv_end)[:, None], value, 0.0)
    else:
        rows = page.to(tl.int64) * stride_page + kv_head.to(tl.int64) * stride_head
        if ONE_PAGE:
            rows += offset.to(tl.int64) * stride_token
            rows += tl.arange(0, BLOCK_N) * stride_token
        else:
            rows += offset * stride_token
        pointers = rows[:, None] + offs_d[None, :]
        if MASKED or HEAD_DIM != BLOCK_D:
            mask = offs_d[None, :] < HEAD_DIM
            if MASKED:
                mask = mask & (offs_n < kv_end)[:, None]
            key = tl.load(key_source + pointers, mask=mask, other=0.0)
            value = tl.load(value_source + pointers, mask=mask, other=0.0)
        else:
            key = tl.load(key_source + pointers)
            value = tl.load(value_source + pointers)
    return key, value


@triton.jit
def _attend_blocks(
    acc,
    row_max,
    row_sum,
    query,
    query_far,
    position,
    first_step,
    end_step,
    ids_ptr,
    key_source,
    value_source,
    table_row_ptr,
    kv_head,
    kv_end,
    stride_page,
    stride_head,
    stride_token,
    scale_log2,
    shift,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    MASKED: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stream key tiles [first_step, end_step) of the list into the running softmax; a block is several tiles."""
    TILES_PER_BLOCK: tl.constexpr = BLOCK_SIZE // BLOCK_N
    for step in tl.range(first_step, end_step):
        if HAS_LISTS:
            # Looked up in the loop: carrying a prefetched id through it crashes Triton 3.6's pipeliner.
            block = _look_up(ids_ptr, step // TILES_PER_BLOCK)
            start = block * BLOCK_SIZE + (step % TILES_PER_BLOCK) * BLOCK_N
        else:
            start = step * BLOCK_N
        key, value = _load_key_value(
            key_source,
            value_source,
            table_row_ptr,
            kv_head,
            start,
            kv_end,
            stride_page,
            stride_head,
            stride_token,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            PAGE_SIZE,
            USE_TMA,
            MASKED,
        )
        if DISTANCE == FAR:
            scores = tl.dot(query_far, tl.trans(key), input_precision=PRECISION)
        else:
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        offs_n = start + tl.arange(0, BLOCK_N)
        if DISTANCE == STRADDLING:
            far_scores = tl.dot(query_far, tl.trans(key), input_precision=PRECISION)
            is_far = position[:, None] - offs_n[None, :] >= shift
            scores = tl.where(is_far, far_scores, scores)
        if MASKED:
            mask = (offs_n < kv_end)[None, :]
            if IS_CAUSAL:
                mask = mask & (offs_n[None, :] <= position[:, None])
            scores = tl.where(mask, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _prefill_kernel(
    query_ptr,
    key_source,
    value_source,
    out_ptr,
    lse_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    tile_request_ptr,
    tile_block_ptr,
    block_ids_ptr,
    block_counts_ptr,
    cos_ptr,
    sin_ptr,
    scale_log2,
    shift,
    num_tiles,
    num_pieces,
    max_blocks,
    group_size,
    heads_per_list,
    units_together,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_lse_head,
    stride_table,
    stride_page,
    stride_head,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS_PER_TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_T tokens of a query tile times HEADS_PER_TILE query heads of one KV head.

    Row m of the program is head slot m // BLOCK_T and token m % BLOCK_T.
    """
    # Longest tiles first, and heads that share keys and values side by side.
    program = tl.program_id(0)
    unit = program % units_together
    program = program // units_together
    piece = num_pieces - 1 - program % num_pieces
    program = program // num_pieces
    tile = num_tiles - 1 - program % num_tiles
    unit += program // num_tiles * units_together
    first_head = unit * HEADS_PER_TILE
    kv_head = first_head // group_size

    request = tl.load(tile_request_ptr + tile)
    query_block = tl.load(tile_block_ptr + tile)
    chunk_offset = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - chunk_offset
    seq_len = tl.load(seq_lens_ptr + request)
    chunk_start = seq_len - query_len
    # Positions [first_position, end_position) are this program's.
    first_position = tl.maximum(query_block * BLOCK_SIZE, chunk_start) + piece * BLOCK_T
    end_position = tl.minimum(tl.minimum(query_block * BLOCK_SIZE + BLOCK_SIZE, seq_len), first_position + BLOCK_T)
    if first_position >= end_position:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    slot = offs_m // BLOCK_T
    position = first_position + offs_m % BLOCK_T
    mask_m = (position < end_position) & (slot < HEADS_PER_TILE)
    token = (chunk_offset + position - chunk_start).to(tl.int64)
    head = (first_head + slot).to(tl.int64)
    mask_q = mask_m[:, None] & (offs_d[None, :] < HEAD_DIM)
    query_ptrs = query_ptr + (token * stride_query_token + head * stride_query_head)[:, None] + offs_d[None, :]
    query = tl.load(query_ptrs, mask=mask_q, other=0.0)

    table_row_ptr = block_table_ptr + request.to(tl.int64) * stride_table
    if IS_CAUSAL:
        kv_end = end_position
    else:
        kv_end = seq_len
    if HAS_LISTS:
        list_index = (first_head // heads_per_list).to(tl.int64) * num_tiles + tile
        ids_ptr = block_ids_ptr + list_index * max_blocks
        num_blocks = tl.load(block_counts_ptr + list_index)
    else:
        ids_ptr = block_ids_ptr
        num_blocks = (kv_end + BLOCK_SIZE - 1) // BLOCK_SIZE
    last = tl.maximum(num_blocks - 1, 0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    TILES_PER_BLOCK: tl.constexpr = BLOCK_SIZE // BLOCK_N

    # Blocks [0, num_far) lie at distance `shift` or more from every query of the tile, [num_far, num_shifted) from
    # some, [num_shifted, last) from none. Lists ascend, so that these are ranges.
    query_far = query
    if HAS_SHIFT:
        query_far = rotate_tile(query, query_ptrs, cos_ptr, sin_ptr, mask_q, HALF_ROTARY, IS_NEOX, BLOCK_D)
        far_end = first_position - shift + 1
        shifted_end = end_position - shift
        if HAS_LISTS:
            is_far = tl.zeros([BLOCKS_COUNTED], dtype=tl.int32)
            is_shifted = tl.zeros([BLOCKS_COUNTED], dtype=tl.int32)
            for first_index in range(0, last, BLOCKS_COUNTED):
                index = first_index + tl.arange(0, BLOCKS_COUNTED)
                first_key = tl.load(ids_ptr + index, mask=index < last, other=0) * BLOCK_SIZE
                is_far += ((index < last) & (first_key + BLOCK_SIZE <= far_end)).to(tl.int32)
                is_shifted += ((index < last) & (first_key < shifted_end)).to(tl.int32)
            num_far = tl.sum(is_far, 0)
            num_shifted = tl.sum(is_shifted, 0)
        else:
            num_far = tl.minimum(tl.maximum(far_end, 0) // BLOCK_SIZE, last)
            num_shifted = tl.minimum((tl.maximum(shifted_end, 0) + BLOCK_SIZE - 1) // BLOCK_SIZE, last)
        acc, row_max, row_sum = _attend_blocks(
            acc, row_max, row_sum, query, query_far, position, 0, num_far * TILES_PER_BLOCK,
            ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
            stride_page, stride_head, stride_token, scale_log2, shift,
            BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, False, FAR, PRECISION,
        )  # fmt: skip
        acc, row_max, row_sum = _attend_blocks(
            acc, row_max, row_sum, query, query_far, position, num_far * TILES_PER_BLOCK, num_shifted * TILES_PER_BLOCK,
            ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
            stride_page, stride_head, stride_token, scale_log2, shift,
            BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, False, STRADDLING,
            PRECISION,
        )  # fmt: skip
    else:
        num_shifted = 0
    acc, row_max, row_sum = _attend_blocks(
        acc, row_max, row_sum, query, query_far, position, num_shifted * TILES_PER_BLOCK, last * TILES_PER_BLOCK,
        ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
        stride_page, stride_head, stride_token, scale_log2, shift,
        BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, False, NEAR, PRECISION,
    )  # fmt: skip
    # The last block, masked; its key tiles past kv_end are not read, as they may lie in no page.
    last_block = last
    if HAS_LISTS:
        last_block = tl.load(ids_ptr + last, mask=num_blocks > 0, other=0)
    num_last_keys = tl.minimum(kv_end - last_block * BLOCK_SIZE, BLOCK_SIZE)
    num_last_tiles = tl.where(num_blocks > 0, (num_last_keys + BLOCK_N - 1) // BLOCK_N, 0)
    acc, row_max, row_sum = _attend_blocks(
        acc, row_max, row_sum, query, query_far, position,
        last * TILES_PER_BLOCK, last * TILES_PER_BLOCK + num_last_tiles,
        ids_ptr, key_source, value_source, table_row_ptr, kv_head, kv_end,
        stride_page, stride_head, stride_token, scale_log2, shift,
        BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_LISTS, IS_CAUSAL, USE_TMA, True,
        STRADDLING if HAS_SHIFT else NEAR, PRECISION,
    )  # fmt: skip

    # An empty list leaves a zero output and an LSE of -inf.
    divisor = tl.where(row_sum > 0.0, row_sum, 1.0)
    acc = acc / divisor[:, None]
    lse = (row_max + tl.log2(divisor)) * LN_2
    out_ptrs = out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptr + head * stride_lse_head + token, lse, mask=mask_m)


def paged_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tiles: PrefillTiles,
    scale: float,
    *,
    block_lists: BlockLists | None = None,
    causal: bool = True,
    string: RotaryShift | None = None,
    max_query_len: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill attention of a varlen batch on the packed KV cache of one layer.

    kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], a token's key and value side by side; any strides
        with a contiguous last axis.
    The rest as in `prefill_attention`.
    """
    key_cache, value_cache = kv_cache.split(query.shape[-1], dim=-1)
    return prefill_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        tiles,
        scale,
        block_lists=block_lists,
        causal=causal,
        string=string,
        max_query_len=max_query_len,
        out=out,
        lse=lse,
    )


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tiles: PrefillTiles,
    scale: float,
    *,
    block_lists: BlockLists | None = None,
    causal: bool = True,
    string: RotaryShift | None = None,
    max_query_len: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill attention of a varlen batch on keys and values that lie in pages.

    query: [num_tokens, num_q_heads, head_dim], float16, bfloat16 or float32; the last axis contiguous. A request's
        chunk is its last `query_len` tokens, keys included in the cache already.
    key_cache, value_cache: [num_pages, num_kv_heads, page_size, head_dim], of the query's dtype, the same strides, the
        last axis contiguous. Contiguous tensors are pages of a whole sequence each: any page_size will do when
        `block_table` has one column.
    block_table: [num_reqs, max_pages] int32, rows contiguous; seq_lens: [num_reqs] int32, after this step;
        query_start_loc: [num_reqs + 1] int32.
    tiles: the query tiles to compute. Tokens outside of them are neither read nor written, in `out` and in `lse`.
    scale: factor on the logits, above 0.
    block_lists: the KV blocks that each tile reads; all that it may see when None.
    causal: a query at position p sees keys [0, p]; otherwise [0, seq_len).
    string: shifted rotary positions: keys at distance `shift` or more meet the query rotated by the angles given.
    max_query_len: upper bound of the requests' chunk lengths, where known: short chunks then take small tiles.
    out: [num_tokens, num_q_heads, head_dim] to write into; lse: [num_q_heads, num_tokens] float32, rows contiguous.
    Returns out and lse (natural log; -inf with zero output where a list is empty).
    Source: module docstring.
    """
    num_tokens, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = key_cache.shape
    assert num_heads % num_kv_heads == 0
    assert key_cache.shape == value_cache.shape
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.dtype == value_cache.dtype == query.dtype
    assert query.stride(-1) == key_cache.stride(-1) == block_table.stride(-1) == 1
    assert scale > 0
    group_size = num_heads // num_kv_heads
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if lse is None:
        lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)
    assert out.shape == query.shape
    assert lse.shape == (num_heads, num_tokens)
    assert lse.dtype == torch.float32
    assert out.stride(-1) == lse.stride(-1) == 1
    if tiles.num_tiles == 0:
        return out, lse

    num_list_heads = num_kv_heads
    max_blocks = 0
    if block_lists is not None:
        num_list_heads, num_tiles, max_blocks = block_lists.block_ids.shape
        assert num_tiles == tiles.num_tiles
        assert num_heads % num_list_heads == 0
        assert block_lists.block_ids.is_contiguous()
        assert block_lists.block_counts.is_contiguous()
    heads_per_list = num_heads // num_list_heads

    tokens_per_tile = min(tiles.block_size, max_query_len or tiles.block_size)
    if config is None:
        config = prefill_config(
            head_dim,
            query.dtype,
            device_capability(query.device),
            block_size=tiles.block_size,
            tokens_per_tile=tokens_per_tile,
            # Heads may share a program when they share keys, values and list.
            heads_that_share=group_size if heads_per_list % group_size == 0 else 1,
            has_shift=string is not None,
        )
    block_n = config.block_n
    assert tiles.block_size % block_n == 0
    assert group_size % config.heads_per_tile == 0
    paged = block_table.shape[1] > 1
    use_tma = config.use_tma and (not paged or page_size % block_n == 0) and has_row_view(key_cache, value_cache)
    block_d = triton.next_power_of_2(head_dim)
    stride_page, stride_head, stride_token, _ = key_cache.stride()
    key_source: torch.Tensor | TensorDescriptor = key_cache
    value_source: torch.Tensor | TensorDescriptor = value_cache
    if use_tma:
        key_source = row_descriptor(key_cache, block_n, block_d)
        value_source = row_descriptor(value_cache, block_n, block_d)
        stride_page, stride_head = stride_page // stride_token, stride_head // stride_token

    num_pieces = triton.cdiv(tokens_per_tile, config.block_t)
    num_units = num_heads // config.heads_per_tile
    together = config.kv_heads_together if num_kv_heads % config.kv_heads_together == 0 else 1
    _prefill_kernel[(num_units * num_pieces * tiles.num_tiles,)](
        query,
        key_source,
        value_source,
        out,
        lse,
        block_table,
        seq_lens,
        query_start_loc,
        tiles.tile_request,
        tiles.tile_block,
        block_lists.block_ids if block_lists is not None else None,
        block_lists.block_counts if block_lists is not None else None,
        string.cos if string is not None else None,
        string.sin if string is not None else None,
        scale * LOG2_E,
        string.shift if string is not None else 0,
        tiles.num_tiles,
        num_pieces,
        max_blocks,
        group_size,
        heads_per_list,
        together * group_size // config.heads_per_tile,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        block_table.stride(0),
        stride_page,
        stride_head,
        stride_token,
        BLOCK_SIZE=tiles.block_size,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_T=config.block_t,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        HEADS_PER_TILE=config.heads_per_tile,
        PAGE_SIZE=page_size if paged else 0,
        HALF_ROTARY=string.cos.shape[0] if string is not None else 1,
        IS_NEOX=string.is_neox if string is not None else True,
        HAS_LISTS=block_lists is not None,
        HAS_SHIFT=string is not None,
        IS_CAUSAL=causal,
        USE_TMA=use_tma,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def has_row_view(*caches: torch.Tensor) -> bool:
    """Whether the tensor copy engine can read caches [num_pages, num_kv_heads, page_size, head_dim] as rows of tokens.

    It needs pages and heads a whole number of rows apart, 16-byte alignment, and 32-bit row numbers.
    """
    for cache in caches:
        stride_page, stride_head, stride_token, _ = cache.stride()
        if stride_token <= 0 or stride_page % stride_token or stride_head % stride_token:
            return False
        if cache.data_ptr() % 16 or stride_token * cache.element_size() % 16:
            return False
        if num_rows(cache) >= 2**31:
            return False
    return True


def num_rows(cache: torch.Tensor) -> int:
    """Rows of `cache.stride(2)` elements from the first token of a cache to its last."""
    last = sum((size - 1) * stride for size, stride in zip(cache.shape[:3], cache.stride()[:3], strict=True))
    return last // cache.stride(2) + 1


def row_descriptor(cache: torch.Tensor, block_n: int, block_d: int) -> TensorDescriptor:
    """The copy engine's view of a cache as [num_rows, head_dim]; what lies past either end reads as zero."""
    return TensorDescriptor(
        cache, shape=[num_rows(cache), cache.shape[3]], strides=[cache.stride(2), 1], block_shape=[block_n, block_d]
    )
