"""Choose the KV blocks that every query tile reads, on the device and without a host sync.

Source: FlexPrefill, arXiv 2502.20766, algorithms 1 to 4; `flex_reference` says in PyTorch what is computed and where
it departs. Thresholds are found by bisection on the bits of the scores instead of by sorting: the same in every run.
"""

import torch
import triton
import triton.language as tl
from farspan.kernels.flex import estimate as flex_estimate
from farspan.kernels.flex import reference as flex_reference
from farspan.kernels.flex.types import NO_LIMIT, FlexEstimate, FlexSelection
from farspan.kernels.rotary_turn import RotaryShift
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from farspan.kernels.tiles import BlockLists, PrefillTiles


@triton.jit
def _mass_threshold(first_key, first, second_key, second, held, gamma):
    """The largest T such that `held` and the entries with key >= T reach gamma of all mass.

    first, second: mass of two vectors of entries, float32, with their keys; entries that do not count have key -1 and
    mass 0. See `flex_reference.mass_threshold`.
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
    seq_lens_ptr,
    requests_ptr,
    gamma_ptr,
    column_ptr,
    diagonal_ptr,
    threshold_ptr,
    divergence_ptr,
    aware_ptr,
    tau,
    stride_gamma_head,
    stride_gamma_request,
    num_selected,
    num_blocks,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Pattern test and line threshold of one head and request; writes its column and diagonal masses."""
    head, slot = tl.program_id(0), tl.program_id(1)
    row = (head * num_selected + slot).to(tl.int64) * num_blocks
    second_row = (tl.num_programs(0) * num_selected).to(tl.int64) * num_blocks + row
    request = tl.load(requests_ptr + slot)
    gamma = tl.load(gamma_ptr + head * stride_gamma_head + request * stride_gamma_request)
    last = tl.cdiv(tl.load(seq_lens_ptr + request), BLOCK) - 1
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
    tl.store(divergence_ptr + head * num_selected + slot, distance)
    tl.store(aware_ptr + head * num_selected + slot, (distance < tau).to(tl.int32))

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
    tl.store(threshold_ptr + head * num_selected + slot, threshold)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _pooled_keys_kernel(
    cache_ptr,
    table_ptr,
    seq_lens_ptr,
    requests_ptr,
    aware_ptr,
    mean_key_ptr,
    stride_page,
    stride_cache_head,
    stride_token,
    stride_table,
    num_selected,
    num_blocks,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Mean key of one block, [num_kv_heads, num_selected, num_blocks, HEAD_DIM], where a head of the group needs it."""
    block, kv_head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    needed = 0
    for member in range(GROUP):
        needed += tl.load(aware_ptr + (kv_head * GROUP + member) * num_selected + slot)
    request = tl.load(requests_ptr + slot)
    kv_len = tl.load(seq_lens_ptr + request)
    start = block * BLOCK
    if (needed > 0) & (start < kv_len):
        key = flex_estimate._load_keys(
            cache_ptr + kv_head.to(tl.int64) * stride_cache_head,
            table_ptr + request.to(tl.int64) * stride_table,
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
        row = ((kv_head * num_selected + slot) * num_blocks + block).to(tl.int64)
        tl.store(mean_key_ptr + row * HEAD_DIM + offs_d, mean, mask=offs_d < HEAD_DIM)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _pooled_scores_kernel(
    query_ptr,
    seq_lens_ptr,
    query_start_ptr,
    tile_request_ptr,
    tile_block_ptr,
    tile_slot_ptr,
    aware_ptr,
    mean_key_ptr,
    cos_ptr,
    sin_ptr,
    scores_ptr,
    scale,
    shift,
    stride_query_token,
    stride_query_head,
    num_selected,
    num_blocks,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """Mean query of one tile against the mean keys up to its own block, for query-aware heads."""
    tile, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tile_slot_ptr + tile)
    if tl.load(aware_ptr + head * num_selected + slot) != 0:
        request = tl.load(tile_request_ptr + tile)
        tile_block = tl.load(tile_block_ptr + tile)
        query_start = tl.load(query_start_ptr + request)
        query_end = tl.load(query_start_ptr + request + 1)
        # Row of `query` that the tile's first position has, or would have if the chunk began earlier.
        origin = query_end - tl.load(seq_lens_ptr + request) + tile_block * BLOCK
        first = tl.maximum(origin, query_start)
        num_rows = tl.minimum(origin + BLOCK, query_end) - first
        rows, far_rows = flex_estimate._load_rows(
            query_ptr + head * stride_query_head, stride_query_token, first, num_rows, cos_ptr, sin_ptr,
            BLOCK, HEAD_DIM, BLOCK_D, HALF_ROTARY, IS_NEOX,
        )  # fmt: skip
        mean_query = tl.sum(rows.to(tl.float32), 0) / num_rows * scale
        far_query = tl.sum(far_rows.to(tl.float32), 0) / num_rows * scale
        offs_d = tl.arange(0, BLOCK_D)
        key_row = ((head // GROUP) * num_selected + slot).to(tl.int64) * num_blocks
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
                far_scores = tl.sum(keys * far_query[None, :], 1)
                scores = tl.where((tile_block - offs_n) * BLOCK < shift, scores, far_scores)
            tl.store(scores_ptr + score_row + offs_n, scores, mask=mask)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _lists_kernel(
    column_ptr,
    diagonal_ptr,
    threshold_ptr,
    aware_ptr,
    scores_ptr,
    gamma_ptr,
    tile_request_ptr,
    tile_block_ptr,
    tile_slot_ptr,
    ids_ptr,
    counts_ptr,
    stride_gamma_head,
    stride_gamma_request,
    num_selected,
    num_blocks,
    min_blocks,
    max_blocks,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The list of one tile for SHARED query heads: lines or pooled scores over their threshold, budget, compaction."""
    tile, list_head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tile_slot_ptr + tile)
    tile_block = tl.load(tile_block_ptr + tile)
    offs = tl.arange(0, PADDED)
    causal = offs <= tile_block
    always = (offs == 0) | (offs == tile_block)
    chosen = always
    rank_key = tl.full([PADDED], -1.0, tl.float32)
    for member in range(SHARED):
        head = list_head * SHARED + member
        if tl.load(aware_ptr + head * num_selected + slot) != 0:
            score_row = (head * tl.num_programs(0) + tile).to(tl.int64) * num_blocks
            scores = tl.load(scores_ptr + score_row + offs, mask=causal, other=float("-inf"))
            mass = tl.exp(scores - tl.max(scores, 0))
            mass = mass / tl.sum(mass)
            request = tl.load(tile_request_ptr + tile)
            gamma = tl.load(gamma_ptr + head * stride_gamma_head + request * stride_gamma_request)
            held = tl.sum(tl.where(always, mass, 0.0))
            key = tl.where(always | (offs > tile_block), -1.0, mass)
            free = tl.where(always, 0.0, mass)
            nothing = tl.zeros([PADDED], tl.float32)
            threshold = _mass_threshold(key, free, nothing - 1.0, nothing, held, gamma)
        else:
            row = (head * num_selected + slot).to(tl.int64) * num_blocks
            column = tl.load(column_ptr + row + offs, mask=causal, other=0.0)
            diagonal = tl.load(diagonal_ptr + row + tile_block - offs, mask=causal, other=0.0)
            mass = tl.maximum(column, diagonal)
            threshold = tl.load(threshold_ptr + head * num_selected + slot)
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
    # The scores of this row, which may lie where its list goes, have all been read by now.
    tl.debug_barrier()
    out_row = (list_head * tl.num_programs(0) + tile).to(tl.int64)
    place = tl.cumsum(chosen, 0) - 1
    tl.store(ids_ptr + out_row * num_blocks + place, offs, mask=chosen != 0)
    tl.store(counts_ptr + out_row, tl.sum(chosen))


def flex_block_lists(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tiles: PrefillTiles,
    scale: float,
    *,
    requests: torch.Tensor,
    gamma: torch.Tensor,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    share_kv_group: bool = False,
    string: RotaryShift | None = None,
) -> FlexSelection:
    """Choose per query tile and head the KV blocks that are to keep `gamma` of the attention mass.

    query: [num_tokens, num_q_heads, head_dim]; kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], any page
        size; both with a contiguous last axis.
    block_table: [num_reqs, max_pages] int32; seq_lens: [num_reqs] int32, this step included; query_start_loc:
        [num_reqs + 1] int32.
    tiles: the query tiles of `requests`; requests: [num_selected] int32, ascending, each with a chunk.
    gamma: float32 [num_reqs], or [num_q_heads, num_reqs] where the closed loop raises it per head; 1 lists all.
    tau: query-aware where the divergence lies below; 0 for never.
    min_budget, max_budget: KV tokens that a list covers at least (where they exist) and at most; rounded to blocks.
    share_kv_group: one list for the query heads of a KV head, the union of theirs.
    string: shifted rotary positions: keys at distance `shift` or more meet the query rotated by the angles given.
    CPU tensors go through PyTorch, others through Triton; the lists are the same.
    """
    num_heads = query.shape[1]
    group = num_heads // kv_cache.shape[1] if share_kv_group else 1
    min_blocks = -(-min_budget // tiles.block_size)
    # The first and the diagonal block are always there.
    max_blocks = NO_LIMIT if max_budget is None else max(max_budget // tiles.block_size, 2)
    batch = (query, kv_cache, block_table, seq_lens, query_start_loc)
    blocks = tiles.max_kv_blocks
    if query.device.type == "cpu":
        found = flex_reference.estimate(*batch, requests, blocks, tiles.block_size, scale, string=string)
        scores = flex_reference.pooled_scores(*batch, tiles, blocks, scale, string=string)
        gamma = gamma.expand(num_heads, -1)[:, requests.long()]
        return flex_reference.select(
            found, scores, tiles, seq_lens, requests, gamma, tau, min_blocks, max_blocks, group
        )
    found = flex_estimate.estimate(*batch, requests, blocks, tiles.block_size, scale, string=string)
    return select(*batch, tiles, scale, found, requests, gamma, tau, min_blocks, max_blocks, group, string)


def select(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tiles: PrefillTiles,
    scale: float,
    found: FlexEstimate,
    requests: torch.Tensor,
    gamma: torch.Tensor,
    tau: float,
    min_blocks: int,
    max_blocks: int,
    group: int,
    string: RotaryShift | None = None,
) -> FlexSelection:
    """Turn estimates into block lists with Triton; arguments as in `flex_block_lists`, budgets in blocks.

    group: query heads that share a list.
    """
    num_heads, num_selected, num_blocks = found.column_share.shape
    head_dim = query.shape[2]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    num_tiles, block = tiles.num_tiles, tiles.block_size
    slots = torch.searchsorted(requests, tiles.tile_request, out_int32=True)
    gamma = gamma.expand(num_heads, -1)
    padded = triton.next_power_of_2(num_blocks)
    column, diagonal = torch.empty_like(found.column_share), torch.empty_like(found.column_share)
    threshold = query.new_empty((num_heads, num_selected), dtype=torch.float32)
    distance = torch.empty_like(threshold)
    aware = torch.empty_like(threshold, dtype=torch.int32)
    _head_kernel[(num_heads, num_selected)](
        found.tile_mass,
        found.column_share,
        found.pooled_logits,
        seq_lens,
        requests,
        gamma,
        column,
        diagonal,
        threshold,
        distance,
        aware,
        tau,
        gamma.stride(0),
        gamma.stride(1),
        num_selected,
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
    if tau > 0:
        shapes = {
            "GROUP": num_heads // num_kv_heads,
            "BLOCK": block,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        }
        mean_key = query.new_empty((num_kv_heads, num_selected, num_blocks, head_dim), dtype=torch.float32)
        _pooled_keys_kernel[(num_blocks, num_kv_heads, num_selected)](
            kv_cache,
            block_table,
            seq_lens,
            requests,
            aware,
            mean_key,
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            block_table.stride(0),
            num_selected,
            num_blocks,
            **shapes,
            PAGE_SIZE=page_size,
        )
        _pooled_scores_kernel[(num_tiles, num_heads)](
            query,
            seq_lens,
            query_start_loc,
            tiles.tile_request,
            tiles.tile_block,
            slots,
            aware,
            mean_key,
            *((query, query) if string is None else (string.cos, string.sin)),
            scores,
            scale,
            0 if string is None else string.shift,
            query.stride(0),
            query.stride(1),
            num_selected,
            num_blocks,
            **shapes,
            BLOCK_N=32,
            **flex_estimate.rotary_shapes(string),
            num_warps=4 if head_dim <= 128 and string is None else 8,
        )
    _lists_kernel[(num_tiles, num_heads // group)](
        column,
        diagonal,
        threshold,
        aware,
        scores,
        gamma,
        tiles.tile_request,
        tiles.tile_block,
        slots,
        ids,
        counts,
        gamma.stride(0),
        gamma.stride(1),
        num_selected,
        num_blocks,
        min_blocks,
        max_blocks,
        SHARED=group,
        PADDED=padded,
        num_warps=min(max(padded // 256, 1), 16),
    )
    return FlexSelection(BlockLists(ids, counts), aware.bool(), distance)
