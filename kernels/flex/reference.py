"""Dynamic block selection in plain PyTorch: what the Triton stages are tested against, and what the CPU runs.

Source: FlexPrefill, arXiv 2502.20766, algorithms 2 to 4, on a grid of blocks aligned to absolute positions. It departs
from algorithm 3 in one point: a block's mass is divided between its column and its diagonal by the shape of the mass
inside the block, and one threshold serves both, so that a vertical line does not also buy a diagonal and the reverse.
"""

import torch
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.types import SUB_BLOCKS, TINY, Budget, FlexEstimate, FlexSelection
from farspan.kernels.reference import gather_kv
from farspan.kernels.rotary_turn import Turn, apply_turn
from farspan.kernels.tiles import BlockLists, PrefillTiles


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
    """Arguments and result as in `select.flex_block_lists`, on CPU tensors."""
    found = estimate(query, kv, batch, tiles.max_kv_blocks, tiles.block_size, scale, turn=turn)
    scores = pooled_scores(query, kv, batch, tiles, scale, turn=turn)
    return select(found, scores, tiles, batch, budget)


def estimate(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    num_blocks: int,
    block_size: int,
    scale: float,
    *,
    turn: Turn | None = None,
    dtype: torch.dtype = torch.float32,
) -> FlexEstimate:
    """Sum the representative queries' attention over blocks; arguments as in `flex_block_lists`."""
    num_heads = query.shape[1]
    tile_mass = torch.zeros(2, num_heads, batch.num_reqs, num_blocks, dtype=dtype)
    column_share = torch.full((num_heads, batch.num_reqs, num_blocks), 0.5, dtype=dtype)
    pooled_logits = torch.full_like(tile_mass, float("-inf"))
    for request in range(batch.num_reqs):
        start, end = batch.query_start_loc[request : request + 2].tolist()
        kv_len, chunk_end = int(batch.kv_lens[request]), chunk_ends(batch)[request]
        used = -(-kv_len // block_size)
        key, _ = gather_kv(kv.pages, batch.block_table[request], kv_len, dtype)
        key = key.repeat_interleave(num_heads // key.shape[1], dim=1)
        num_rows = min(end - start, block_size)
        rows = query[end - num_rows : end]
        row_pos = torch.arange(chunk_end - num_rows, chunk_end)
        key_pos = torch.arange(kv_len)
        logits = torch.einsum("qhd,khd->hqk", rows.to(dtype), key) * scale
        if turn is not None:
            turned = torch.einsum("qhd,khd->hqk", apply_turn(rows, turn).to(dtype), key) * scale
            logits = torch.where(key_pos < turn.bounds(row_pos)[:, None], turned, logits)
        mask = key_pos <= row_pos[:, None]
        mass = logits.masked_fill(~mask, float("-inf")).softmax(-1) / num_rows
        row_mass = _block_sums(mass, block_size)
        in_last = row_pos // block_size == (chunk_end - 1) // block_size
        for tile, members in enumerate((~in_last, in_last)):
            tile_mass[tile, :, request, :used] = row_mass[:, members].sum(1)
            mean = logits[:, members].sum(1) / members.sum().clamp_min(1)
            pooled_logits[tile, :, request, :used] = _block_sums(mean, block_size) / _block_lens(kv_len, block_size)
        column_share[:, request, :used] = _column_share(mass, block_size)
    return FlexEstimate(tile_mass, column_share, pooled_logits)


def chunk_ends(batch: PagedBatch) -> list[int]:
    """Position after each request's last query."""
    return (batch.first_positions() + batch.query_start_loc.diff()).tolist()


def _block_lens(kv_len: int, block_size: int) -> torch.Tensor:
    starts = torch.arange(0, kv_len, block_size)
    return (kv_len - starts).clamp_max(block_size)


def _block_sums(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sums of `block_size` neighbours along the last axis, the last sum over what is left."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % block_size))
    return padded.unflatten(-1, (-1, block_size)).sum(-1)


def _column_share(mass: torch.Tensor, block_size: int) -> torch.Tensor:
    """[num_heads, num_blocks] from mass [num_heads, num_rows, kv_len]: V²/(V² + D²), where V and D are the sums of the
    squared column and diagonal sums of the block's 8 x 8 grid. A vertical line gives 0.98, a diagonal 0.03, an even
    block 0.69.
    """
    sub = block_size // SUB_BLOCKS
    mass = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % block_size, 0, block_size - mass.shape[1]))
    grid = mass.unflatten(2, (-1, SUB_BLOCKS, sub)).unflatten(1, (SUB_BLOCKS, sub)).sum((2, 5)).transpose(1, 2)
    grid = grid / grid.sum((-1, -2), keepdim=True).clamp_min(TINY)
    columns = grid.sum(-2).square().sum(-1)
    diagonals = sum(grid.diagonal(k, -2, -1).sum(-1).square() for k in range(1 - SUB_BLOCKS, SUB_BLOCKS))
    return columns.square() / (columns.square() + diagonals.square()).clamp_min(TINY)


def divergence(found: FlexEstimate) -> torch.Tensor:
    """sqrt(JSD) of the true and the pooled block distribution (algorithm 2), natural log: [num_q_heads, num_reqs].

    0·log 0 counts as 0, so that an underflowing probability does not spoil the test.
    """
    true = found.tile_mass.sum(0)
    true = true / true.sum(-1, keepdim=True)
    # Every query has mass 1, so a tile's sum is its share of the representative queries.
    shares = found.tile_mass.sum(-1, keepdim=True)
    pooled = (found.pooled_logits.softmax(-1) * shares / shares.sum(0)).sum(0)
    mean = (true + pooled) / 2
    halves = [torch.where(x > 0, x * (x / mean.clamp_min(TINY)).log(), 0.0).sum(-1) for x in (true, pooled)]
    return ((halves[0] + halves[1]) / 2).clamp_min(0).sqrt()


def mass_threshold(
    mass: torch.Tensor, forced: torch.Tensor, valid: torch.Tensor, gamma: torch.Tensor, key: torch.Tensor | None = None
) -> torch.Tensor:
    """The largest T such that the forced entries and those with key >= T hold `gamma` of the mass.

    It gives the smallest number of entries, in the order of the key, that reach `gamma`; entries that tie with the
    last one all count.
    mass, key: [..., n], the mass itself being the key when None; forced, valid: [..., n] bool; gamma: [...].
    Returns [...], 0 for "everything" (gamma >= 1).
    """
    free = torch.where(valid & ~forced, mass if key is None else key, -1.0)
    held = torch.where(valid & forced, mass, 0.0).sum(-1)
    ordered, order = free.sort(dim=-1, descending=True)
    weights = torch.where(valid & ~forced, mass, 0.0).gather(-1, order)
    target = gamma * (held + weights.sum(-1))
    reached = held[..., None] + weights.cumsum(-1) >= target[..., None]
    index = (~reached).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)
    threshold = torch.where(reached.any(-1), ordered.gather(-1, index)[..., 0], 0.0)
    # Where the forced entries suffice, no other reaches the threshold. It stays of the size of the largest of them, as
    # the order in which a minimum budget adds entries is their mass divided by the threshold.
    above = (2 * ordered[..., 0]).clamp_min(TINY)
    threshold = torch.where(held >= target, above, threshold)
    return torch.where(gamma >= 1, 0.0, threshold).clamp_min(0)


def column_and_diagonal_mass(
    found: FlexEstimate, kv_lens: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide every block's mass between its column and its diagonal: two [num_q_heads, num_reqs, num_blocks].

    kv_lens: [num_reqs] int. The first column and the main diagonal are always listed, so they take all their mass.
    A slash crosses two block diagonals; because the mass was taken on the grid of tiles, each gets what it holds.
    """
    num_blocks = found.column_share.shape[-1]
    index = torch.arange(num_blocks)
    last = ((kv_lens + block_size - 1) // block_size - 1)[None, :, None].long()
    column = torch.zeros_like(found.column_share)
    diagonal = torch.zeros_like(column)
    for tile, mass in ((last - 1, found.tile_mass[0]), (last, found.tile_mass[1])):
        share = found.column_share.masked_fill(index == tile, 0.0)
        share[..., 0] = 1.0
        column += mass * share
        distance = tile - index
        inside = (distance >= 0).expand_as(mass)
        diagonal += torch.where(inside, (mass * (1 - share)).gather(-1, distance.clamp_min(0).expand_as(mass)), 0.0)
    return column, diagonal


def line_thresholds(
    found: FlexEstimate,
    column: torch.Tensor,
    diagonal: torch.Tensor,
    kv_lens: torch.Tensor,
    block_size: int,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """The largest T whose columns and diagonals of mass >= T keep gamma of the representative queries' attention.

    A block is kept by its column or by its diagonal. Returns [num_q_heads, num_reqs].
    """
    index = torch.arange(column.shape[-1])
    last = ((kv_lens + block_size - 1) // block_size - 1)[None, :, None].long()
    keys, forced = [], []
    for tile in (last - 1, last):
        on_diagonal = diagonal.gather(-1, (tile - index).clamp_min(0).expand_as(diagonal))
        keys.append(torch.maximum(column, torch.where(index <= tile, on_diagonal, 0.0)))
        forced.append(((index == 0) | (index == tile)).expand_as(column))
    valid = (index <= last).expand_as(column)
    key, mass = torch.cat(keys, -1), torch.cat([found.tile_mass[0], found.tile_mass[1]], -1)
    return mass_threshold(mass, torch.cat(forced, -1), torch.cat([valid] * 2, -1), gamma, key)


def tile_rows(tiles: PrefillTiles, tile: int, batch: PagedBatch) -> tuple[int, int]:
    """The tile's query tokens as a half-open range of rows of `query`."""
    request, block = int(tiles.tile_request[tile]), int(tiles.tile_block[tile])
    start, end = batch.query_start_loc[request : request + 2].tolist()
    first_pos = chunk_ends(batch)[request] - (end - start)
    low = start + max(block * tiles.block_size - first_pos, 0)
    return low, min(start + (block + 1) * tiles.block_size - first_pos, end)


def pooled_scores(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles,
    scale: float,
    *,
    turn: Turn | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Scaled products of every tile's mean query and every block's mean key: [num_q_heads, num_tiles, num_blocks]."""
    num_heads = query.shape[1]
    scores = torch.full((num_heads, tiles.num_tiles, tiles.max_kv_blocks), float("-inf"), dtype=dtype)
    mean_key: dict[int, torch.Tensor] = {}
    for tile in range(tiles.num_tiles):
        request = int(tiles.tile_request[tile])
        if request not in mean_key:
            kv_len = int(batch.kv_lens[request])
            key, _ = gather_kv(kv.pages, batch.block_table[request], kv_len, dtype)
            sums = _block_sums(key.permute(1, 2, 0), tiles.block_size) / _block_lens(kv_len, tiles.block_size)
            mean_key[request] = sums.repeat_interleave(num_heads // key.shape[1], dim=0)
        low, high = tile_rows(tiles, tile, batch)
        rows = query[low:high]
        products = torch.einsum("hd,hdb->hb", rows.to(dtype).mean(0), mean_key[request]) * scale
        if turn is not None:
            mean_turned = apply_turn(rows, turn).to(dtype).mean(0)
            turned = torch.einsum("hd,hdb->hb", mean_turned, mean_key[request]) * scale
            first_keys = torch.arange(products.shape[1]) * tiles.block_size
            is_turned = first_keys < turn.bound(int(tiles.tile_block[tile]) * tiles.block_size)
            products = torch.where(is_turned, turned, products)
        scores[:, tile, : products.shape[1]] = products
    return scores


def select(
    found: FlexEstimate, scores: torch.Tensor, tiles: PrefillTiles, batch: PagedBatch, budget: Budget
) -> FlexSelection:
    """Turn estimates into block lists.

    scores: [num_q_heads, num_tiles, num_blocks] from `pooled_scores`.
    """
    num_heads, _, num_blocks = found.column_share.shape
    index = torch.arange(num_blocks)
    kv_lens = batch.kv_lens
    gamma = torch.full(found.column_share.shape[:2], budget.gamma)
    distance = divergence(found)
    is_query_aware = distance < budget.tau

    column, diagonal = column_and_diagonal_mass(found, kv_lens, tiles.block_size)
    line_threshold = line_thresholds(found, column, diagonal, kv_lens, tiles.block_size, gamma)

    of_tile = tiles.tile_request.long()
    diagonal_block = tiles.tile_block.long()[:, None]
    causal = index <= diagonal_block
    back = (diagonal_block - index).clamp_min(0).expand(num_heads, -1, -1)
    mass = torch.maximum(column[:, of_tile], diagonal[:, of_tile].gather(-1, back))
    threshold = line_threshold[:, of_tile]
    always = (index == 0) | (index == diagonal_block)
    aware = is_query_aware[:, of_tile]
    row_mass = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    row_threshold = mass_threshold(row_mass, always.expand_as(row_mass), causal.expand_as(row_mass), gamma[:, of_tile])
    mass = torch.where(aware[..., None], row_mass, mass)
    threshold = torch.where(aware, row_threshold, threshold)[..., None]

    chosen = ((mass >= threshold) | always) & causal
    rank_key = torch.where(threshold == 0, mass * 1e30 + 1, mass / threshold.clamp_min(TINY))
    chosen = chosen.unflatten(0, (-1, budget.heads_per_list)).any(1)
    rank_key = rank_key.unflatten(0, (-1, budget.heads_per_list)).amax(1)
    rank_key = rank_key.masked_fill(always, float("inf")).masked_fill(~causal, -1.0)
    chosen = _apply_budget(chosen, rank_key, diagonal_block[:, 0] + 1, budget.min_blocks, budget.max_blocks)
    return FlexSelection(_compact(chosen), is_query_aware, distance)


def _apply_budget(
    chosen: torch.Tensor, rank_key: torch.Tensor, causal_blocks: torch.Tensor, min_blocks: int, max_blocks: int
) -> torch.Tensor:
    """Add the next best blocks, or drop the worst, where a row has too few or too many; ties go to the nearest."""
    count = chosen.sum(-1)
    wanted = torch.minimum(count.clamp(min_blocks, max(max_blocks, 2)), causal_blocks)
    order = rank_key.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order)).flip(-1)
    return torch.where((wanted == count)[..., None], chosen, rank < wanted[..., None])


def _compact(chosen: torch.Tensor) -> BlockLists:
    """Ascending ids of the chosen blocks, [num_list_heads, num_tiles, num_blocks]."""
    ids = torch.argsort(~chosen, dim=-1, stable=True).int()
    return BlockLists(ids, chosen.sum(-1).int())
