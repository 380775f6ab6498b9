"""Choose the KV blocks that every query tile reads, on the device and without a host sync.

Source: FlexPrefill, arXiv 2502.20766, algorithms 1 to 4; `reference` says in PyTorch what is computed and where
it departs. Thresholds are found by bisection on the bits of the scores instead of by sorting: the same in every run.
"""

import torch
import triton
import triton.language as tl
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex import estimate as flex_estimate
from farspan.kernels.flex.types import Budget, FlexEstimate, FlexSelection
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from farspan.kernels.tiles import BlockLists, PrefillTiles


@triton.jit
def _mass_threshold(first_key, first, second_key, second, held, gamma):
    """The largest T such that `held` and the entries with key >= T reach gamma of all mass.

    first, second: mass of two vectors of entries, float32, with their keys; entries that do not count have key -1 and
    mass 0. See `reference.mass_threshold`.
    """
    target = gamma * (held + tl.sum(first) + tl.sum(second))
    above = tl.maximum(2 * tl.maximum(tl.max(first_key, 0), tl.max(second_key, 0)), 1e-30)
    low = tl.zeros([], tl.int32)
    high = above.to(tl.int32, bitcast=True)
    while low + 1 < high:
        middle = low + (high - low) // 2
        cut = middle.to(tl.float32, bitcast=True)
        got = held + tl.sum(tl.where(first_key >= cut, first, 0.0)) + tl.sum(tl.where(second_key >= cut, second, 0.0))
        low = tl.where(got >= target, middle, low)
        high = tl.where(got >= target, high, middle)
    threshold = tl.where(held >= target, above, low.to(tl.float32, bitcast=True))
    return tl.where(gamma >= 1, 0.0, threshold)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _head_kernel(
    tile_mass_ptr,
    column_share_ptr,
    pooled_logits_ptr,
    kv_lens_ptr,
    column_ptr,
    diagonal_ptr,
    threshold_ptr,
    divergence_ptr,
    aware_ptr,
    gamma,
    tau,
    num_reqs,
    num_blocks,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Pattern test and line threshold of one head and request; writes its column and diagonal masses."""
    head, request = tl.program_id(0), tl.program_id(1)
    row = (head * num_reqs + request).to(tl.int64) * num_blocks
    second_row = (tl.num_programs(0) * num_reqs).to(tl.int64) * num_blocks + row
    last = tl.cdiv(tl.load(kv_lens_ptr + request), BLOCK) - 1
    offs = tl.arange(0, PADDED)
    used = offs <= last

    before_mass = tl.load(tile_mass_ptr + row + offs, mask=used, other=0.0)
    last_mass = tl.load(tile_mass_ptr + second_row + offs, mask=used, other=0.0)
    true = before_mass + last_mass
    true = true / tl.sum(true)
    # Every query has mass 1, so a tile's sum is its share of the representative queries.
    logits = tl.load(pooled_logits_ptr + row + offs, mask=used, other=float("-inf"))
    before_pooled = tl.exp(logits - tl.max(logits, 0))
    logits = tl.load(pooled_logits_ptr + second_row + offs, mask=used, other=float("-inf"))
    pooled = tl.exp(logits - tl.max(logits, 0))
    before_part = tl.sum(before_mass) / (tl.sum(before_mass) + tl.sum(last_mass))
    pooled = pooled / tl.sum(pooled) * (1 - before_part) + before_pooled / tl.sum(before_pooled) * before_part
    mean = tl.maximum((true + pooled) / 2, 1e-30)
    # 0·log 0 counts as 0.
    true_part = tl.where(true > 0, true * tl.log(tl.where(true > 0, true / mean, 1.0)), 0.0)
    pooled_part = tl.where(pooled > 0, pooled * tl.log(tl.where(pooled > 0, pooled / mean, 1.0)), 0.0)
    distance = tl.sqrt(tl.maximum((tl.sum(true_part) + tl.sum(pooled_part)) / 2, 0.0))
    tl.store(divergence_ptr + head * num_reqs + request, distance)
    tl.store(aware_ptr + head * num_reqs + request, (distance < tau).to(tl.int32))

    share = tl.load(column_share_ptr + row + offs, mask=used, other=0.0)
    share = tl.where(offs == 0, 1.0, share)
    before_share = tl.where((offs == last - 1) & (offs > 0), 0.0, share)
    last_share = tl.where((offs == last) & (offs > 0), 0.0, share)
    column = before_mass * before_share + last_mass * last_share
    # The same on the diagonals: entry s is block last - s for the last tile, last - 1 - s for the one before it.
    block = last - offs
    share = tl.load(column_share_ptr + row + block, mask=used, other=0.0)
    share = tl.where(block == 0, 1.0, tl.where(block == last, 0.0, share))
    diagonal = tl.load(tile_mass_ptr + second_row + block, mask=used, other=0.0) * (1 - share)
    block = last - 1 - offs
    inside = block >= 0
    share = tl.load(column_share_ptr + row + block, mask=inside, other=0.0)
    share = tl.where(block == 0, 1.0, tl.where(block == last - 1, 0.0, share))
    diagonal += tl.load(tile_mass_ptr + row + block, mask=inside, other=0.0) * (1 - share)
    tl.store(column_ptr + row + offs, column, mask=used)
    tl.store(diagonal_ptr + row + offs, diagonal, mask=used)

    # A block is kept by its column or by its diagonal: for each tile, the larger of the two decides.
    tl.debug_barrier()
    on_diagonal = tl.load(diagonal_ptr + row + last - offs, mask=used, other=0.0)
    in_before = offs < last
    before_diagonal = tl.load(diagonal_ptr + row + last - 1 - offs, mask=in_before, other=0.0)
    last_free = used & (offs > 0) & (offs != last)
    before_free = used & (offs > 0) & (offs != last - 1)
    held = tl.sum(tl.where(last_free, 0.0, last_mass)) + tl.sum(tl.where(before_free, 0.0, before_mass))
    threshold = _mass_threshold(
        tl.where(last_free, tl.maximum(column, on_diagonal), -1.0),
        tl.where(last_free, last_mass, 0.0),
        tl.where(before_free, tl.maximum(column, before_diagonal), -1.0),
        tl.where(before_free, before_mass, 0.0),
        held,
        gamma,
    )
    tl.store(threshold_ptr + head * num_reqs + request, threshold)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _pooled_keys_kernel(
    cache_ptr,
    block_table_ptr,
    kv_lens_ptr,
    aware_ptr,
    mean_key_ptr,
    stride_page,
    stride_cache_head,
    stride_token,
    stride_block_table,
    num_reqs,
    num_blocks,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Mean key of one block, [num_kv_heads, num_reqs, num_blocks, HEAD_DIM], where a head of the group needs it."""
    block, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    needed = 0
    for member in range(GROUP):
        needed += tl.load(aware_ptr + (kv_head * GROUP + member) * num_reqs + request)
    kv_len = tl.load(kv_lens_ptr + request)
    start = block * BLOCK
    if (needed > 0) & (start < kv_len):
        key = flex_estimate._load_keys(
            cache_ptr + kv_head.to(tl.int64) * stride_cache_head,
            block_table_ptr + request.to(tl.int64) * stride_block_table,
            stride_page,
            stride_token,
            start,
            kv_len,
            BLOCK,
            HEAD_DIM,
            BLOCK_D,
            PAGE_SIZE,
        )
        mean = tl.sum(key.to(tl.float32), 1) / tl.minimum(kv_len - start, BLOCK)
        offs_d = tl.arange(0, BLOCK_D)
        row = (kv_head * num_reqs + request).to(tl.int64) * num_blocks + block
        tl.store(mean_key_ptr + row * HEAD_DIM + offs_d, mean, mask=offs_d < HEAD_DIM)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _pooled_scores_kernel(
    query_ptr,
    kv_lens_ptr,
    query_start_loc_ptr,
    first_pos_ptr,
    tile_request_ptr,
    tile_block_ptr,
    aware_ptr,
    mean_key_ptr,
    cos_ptr,
    sin_ptr,
    scores_ptr,
    scale,
    turn_offset,
    stride_query_token,
    stride_query_head,
    num_reqs,
    num_blocks,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    SLOPE: tl.constexpr,
    HAS_FIRST_POS: tl.constexpr,
):
    """Mean query of one tile against the mean keys up to its own block, for query-aware heads."""
    tile, head = tl.program_id(0), tl.program_id(1)
    request = tl.load(tile_request_ptr + tile)
    if tl.load(aware_ptr + head * num_reqs + request) != 0:
        tile_block = tl.load(tile_block_ptr + tile)
        query_start = tl.load(query_start_loc_ptr + request)
        _, query_end, chunk_end = flex_estimate._chunk_end(
            kv_lens_ptr, query_start_loc_ptr, first_pos_ptr, request, HAS_FIRST_POS
        )
        # Row of `query` that the tile's first position has, or would have if the chunk began earlier.
        origin = query_end - chunk_end + tile_block * BLOCK
        first = tl.maximum(origin, query_start)
        num_rows = tl.minimum(origin + BLOCK, query_end) - first
        rows, turned_rows = flex_estimate._load_rows(
            query_ptr + head * stride_query_head, stride_query_token, first, num_rows, cos_ptr, sin_ptr,
            BLOCK, HEAD_DIM, BLOCK_D, HALF_ROTARY, IS_NEOX,
        )  # fmt: skip
        mean_query = tl.sum(rows.to(tl.float32), 0) / num_rows * scale
        turned_query = tl.sum(turned_rows.to(tl.float32), 0) / num_rows * scale
        offs_d = tl.arange(0, BLOCK_D)
        key_row = ((head // GROUP) * num_reqs + request).to(tl.int64) * num_blocks
        score_row = (head * tl.num_programs(0) + tile).to(tl.int64) * num_blocks
        for start in range(0, tile_block + 1, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask = offs_n <= tile_block
            keys = tl.load(
                mean_key_ptr + (key_row + offs_n)[:, None] * HEAD_DIM + offs_d[None, :],
                mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :],
                other=0.0,
            )
            scores = tl.sum(keys * mean_query[None, :], 1)
            if HALF_ROTARY > 0:
                turned_scores = tl.sum(keys * turned_query[None, :], 1)
                is_plain = offs_n * BLOCK >= SLOPE * tile_block * BLOCK + turn_offset
                scores = tl.where(is_plain, scores, turned_scores)
            tl.store(scores_ptr + score_row + offs_n, scores, mask=mask)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _lists_kernel(
    column_ptr,
    diagonal_ptr,
    threshold_ptr,
    aware_ptr,
    scores_ptr,
    tile_request_ptr,
    tile_block_ptr,
    ids_ptr,
    counts_ptr,
    gamma,
    num_reqs,
    num_blocks,
    min_blocks,
    max_blocks,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The list of one tile for SHARED query heads: lines or pooled scores over their threshold, budget, compaction."""
    tile, list_head = tl.program_id(0), tl.program_id(1)
    request = tl.load(tile_request_ptr + tile)
    tile_block = tl.load(tile_block_ptr + tile)
    offs = tl.arange(0, PADDED)
    causal = offs <= tile_block
    always = (offs == 0) | (offs == tile_block)
    chosen = always
    rank_key = tl.full([PADDED], -1.0, tl.float32)
    for member in range(SHARED):
        head = list_head * SHARED + member
        if tl.load(aware_ptr + head * num_reqs + request) != 0:
            score_row = (head * tl.num_programs(0) + tile).to(tl.int64) * num_blocks
            scores = tl.load(scores_ptr + score_row + offs, mask=causal, other=float("-inf"))
            mass = tl.exp(scores - tl.max(scores, 0))
            mass = mass / tl.sum(mass)
            held = tl.sum(tl.where(always, mass, 0.0))
            key = tl.where(always | (offs > tile_block), -1.0, mass)
            free = tl.where(always, 0.0, mass)
            nothing = tl.zeros([PADDED], tl.float32)
            threshold = _mass_threshold(key, free, nothing - 1.0, nothing, held, gamma)
        else:
            row = (head * num_reqs + request).to(tl.int64) * num_blocks
            column = tl.load(column_ptr + row + offs, mask=causal, other=0.0)
            diagonal = tl.load(diagonal_ptr + row + tile_block - offs, mask=causal, other=0.0)
            mass = tl.maximum(column, diagonal)
            threshold = tl.load(threshold_ptr + head * num_reqs + request)
        chosen = chosen | (mass >= threshold)
        key = tl.where(threshold == 0, mass * 1e30 + 1, tl.div_rn(mass, tl.maximum(threshold, 1e-30)))
        rank_key = tl.maximum(rank_key, key)
    chosen = (chosen & causal).to(tl.int32)
    rank_key = tl.where(always, float("inf"), rank_key)
    rank_key = tl.where(causal, rank_key, -1.0)

    count = tl.sum(chosen)
    wanted = tl.minimum(tl.minimum(tl.maximum(count, min_blocks), max_blocks), tile_block + 1)
    if wanted != count:
        # The largest cut with at least `wanted` keys; of those that tie with it, the nearest blocks.
        low = tl.zeros([], tl.int32)
        high = tl.full([], 0x7F800001, tl.int32)
        while low + 1 < high:
            middle = low + (high - low) // 2
            enough = tl.sum((rank_key >= middle.to(tl.float32, bitcast=True)).to(tl.int32)) >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        cut = low.to(tl.float32, bitcast=True)
        over = (rank_key > cut).to(tl.int32)
        ties = (rank_key == cut).to(tl.int32)
        ties_from_right = tl.sum(ties) - tl.cumsum(ties, 0) + 1
        chosen = over | (ties & (ties_from_right <= wanted - tl.sum(over)).to(tl.int32))
    # The scores of this row, which may be where its list goes, have all been read by now.
    tl.debug_barrier()
    out_row = (list_head * tl.num_programs(0) + tile).to(tl.int64)
    place = tl.cumsum(chosen, 0) - 1
    tl.store(ids_ptr + out_row * num_blocks + place, offs, mask=chosen != 0)
    tl.store(counts_ptr + out_row, tl.sum(chosen))


def flex_block_lists(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles,
    scale: float,
    budget: Budget,
    *,
    turn: Turn | None = None,
) -> FlexSelection:
    """Choose per query tile and head the KV blocks that are to keep `budget.gamma` of the attention mass.

    query: [num_tokens, num_q_heads, head_dim] with a contiguous last axis, on the GPU; the heads that `kv` serves.
    batch: every request has a chunk; tiles: the query tiles of all of them.
    turn: keys below its bound meet the turned query.
    """
    found = flex_estimate.estimate(query, kv, batch, tiles.max_kv_blocks, tiles.block_size, scale, turn=turn)
    return select(query, kv, batch, tiles, scale, found, budget, turn=turn)


def select(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles,
    scale: float,
    found: FlexEstimate,
    budget: Budget,
    *,
    turn: Turn | None = None,
) -> FlexSelection:
    """Turn estimates into block lists; arguments as in `flex_block_lists`."""
    num_heads, num_reqs, num_blocks = found.column_share.shape
    head_dim = query.shape[2]
    num_tiles, block, group = tiles.num_tiles, tiles.block_size, budget.heads_per_list
    padded = triton.next_power_of_2(num_blocks)
    column, diagonal = torch.empty_like(found.column_share), torch.empty_like(found.column_share)
    threshold = query.new_empty((num_heads, num_reqs), dtype=torch.float32)
    distance = torch.empty_like(threshold)
    aware = torch.empty_like(threshold, dtype=torch.int32)
    _head_kernel[(num_heads, num_reqs)](
        found.tile_mass,
        found.column_share,
        found.pooled_logits,
        batch.kv_lens,
        column,
        diagonal,
        threshold,
        distance,
        aware,
        budget.gamma,
        budget.tau,
        num_reqs,
        num_blocks,
        BLOCK=block,
        PADDED=padded,
        num_warps=min(max(padded // 256, 4), 16),
    )
    ids = query.new_empty((num_heads // group, num_tiles, num_blocks), dtype=torch.int32)
    counts = query.new_empty((num_heads // group, num_tiles), dtype=torch.int32)
    # A row of scores is read before its list is written, so the lists' memory serves both where rows correspond.
    scores = ids if group == 1 else query.new_empty((num_heads, num_tiles, num_blocks), dtype=torch.int32)
    scores = scores.view(torch.float32)
    if budget.tau > 0:
        shapes = {
            "GROUP": num_heads // kv.num_kv_heads,
            "BLOCK": block,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        }
        mean_key = query.new_empty((kv.num_kv_heads, num_reqs, num_blocks, head_dim), dtype=torch.float32)
        _pooled_keys_kernel[(num_blocks, kv.num_kv_heads, num_reqs)](
            kv.pages,
            batch.block_table,
            batch.kv_lens,
            aware,
            mean_key,
            kv.pages.stride(0),
            kv.pages.stride(1),
            kv.pages.stride(2),
            batch.block_table.stride(0),
            num_reqs,
            num_blocks,
            **shapes,
            PAGE_SIZE=kv.page_size,
        )
        _pooled_scores_kernel[(num_tiles, num_heads)](
            query,
            batch.kv_lens,
            batch.query_start_loc,
            batch.first_pos,
            tiles.tile_request,
            tiles.tile_block,
            aware,
            mean_key,
            *((query, query) if turn is None else (turn.cos, turn.sin)),
            scores,
            scale,
            0 if turn is None else turn.offset,
            query.stride(0),
            query.stride(1),
            num_reqs,
            num_blocks,
            **shapes,
            BLOCK_N=32,
            HAS_FIRST_POS=batch.first_pos is not None,
            **flex_estimate.turn_shapes(turn),
            num_warps=4 if head_dim <= 128 and turn is None else 8,
        )
    _lists_kernel[(num_tiles, num_heads // group)](
        column,
        diagonal,
        threshold,
        aware,
        scores,
        tiles.tile_request,
        tiles.tile_block,
        ids,
        counts,
        budget.gamma,
        num_reqs,
        num_blocks,
        budget.min_blocks,
        budget.max_blocks,
        SHARED=group,
        PADDED=padded,
        num_warps=min(max(padded // 256, 1), 16),
    )
    return FlexSelection(BlockLists(ids, counts), aware.bool(), distance)
