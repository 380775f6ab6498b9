"""Selection by sampled rows in plain PyTorch: what the Triton kernels are tested against, and what the CPU runs."""

import torch
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.spans import MASS_UNIT, Spans
from farspan.kernels.flex.types import Budget, TileSelection
from farspan.kernels.reference import gather_kv
from farspan.kernels.rotary_turn import Turn, apply_turn
from farspan.kernels.tiles import BlockLists, PrefillTiles


def tile_row_lists(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles,
    spans: Spans,
    scale: float,
    budget: Budget,
    *,
    turn: Turn | None = None,
) -> TileSelection:
    """Arguments and result as in `tile_rows.tile_row_lists`, on CPU tensors."""
    mass = span_masses(query, kv, batch, spans, tiles.max_kv_blocks, tiles.block_size, scale, turn=turn)
    return choose(mass, spans, tiles, budget)


def span_masses(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    spans: Spans,
    num_blocks: int,
    block_size: int,
    scale: float,
    *,
    turn: Turn | None = None,
) -> torch.Tensor:
    """Attention mass of each span's sampled rows on every block: [num_q_heads, num_spans, 2, num_blocks] int32.

    Even and odd rows, whose sum is the mean of all. In units of 1 / MASS_UNIT, so that sums do not depend on their
    order. Computed in float32. 0 for padding.
    """
    num_heads, group = query.shape[1], query.shape[1] // kv.num_kv_heads
    span_len = spans.rule.span_len
    mass = torch.zeros(num_heads, spans.num_spans, 2, num_blocks, dtype=torch.int32)
    keys: dict[int, torch.Tensor] = {}
    for span, (request, index, row) in enumerate(
        zip(spans.span_request.tolist(), spans.span_index.tolist(), spans.span_row.tolist(), strict=True)
    ):
        if request < 0:
            continue
        if request not in keys:
            key, _ = gather_kv(kv.pages, batch.block_table[request], int(batch.kv_lens[request]), torch.float32)
            keys[request] = key.permute(1, 2, 0).contiguous()
        place = spans.rule.places(torch.tensor(index))
        position, end = index * span_len + place, (index + 1) * span_len
        rows = query[row + place].permute(1, 0, 2)
        key = keys[request][..., :end]
        key_pos = torch.arange(end)

        def scores(rows: torch.Tensor, key: torch.Tensor = key) -> torch.Tensor:
            grouped = rows.float().unflatten(0, (-1, group)).flatten(1, 2)
            return (grouped @ key).unflatten(1, (group, -1)).flatten(0, 1) * scale

        logits = scores(rows)
        if turn is not None:
            logits = torch.where(key_pos < turn.bounds(position)[:, None], scores(apply_turn(rows, turn)), logits)
        weights = logits.masked_fill_(key_pos > position[:, None], float("-inf")).softmax(-1)
        by_block = weights.unflatten(-1, (-1, block_size)).sum(-1).unflatten(1, (-1, 2)).mean(1) / 2
        mass[:, span, :, : by_block.shape[-1]] = (by_block * MASS_UNIT + 0.5).int()
    return mass


def choose(mass: torch.Tensor, spans: Spans, tiles: PrefillTiles, budget: Budget) -> TileSelection:
    """The blocks that `tile_rows.tile_row_lists` says, as lists of each span's tiles.

    mass: [num_q_heads, num_spans, 2, num_blocks] int32, of even and odd rows. Of blocks of equal mass the nearest are
    taken.
    """
    num_blocks = mass.shape[3]
    tiles_per_span, group = spans.rule.span_len // tiles.block_size, budget.heads_per_list
    block = torch.arange(num_blocks)
    first_own = (spans.span_index * tiles_per_span)[:, None].long()
    is_past, is_own = block < first_own, (block >= first_own) & (block < first_own + tiles_per_span)
    is_forced, is_free = is_past & (block == 0), is_past & (block > 0)
    num_free, num_forced = is_free.sum(-1), is_forced.sum(-1)
    whole = mass.long().sum(2)
    total = torch.where(is_past | is_own, whole, 0).sum(-1)
    free = torch.where(is_free, whole, 0).sum(-1)
    needed = (total.float() * torch.tensor(budget.gamma, dtype=torch.float32)).ceil().long() - (total - free)
    key = torch.where(is_free, whole, -1)
    halves = torch.where(is_free[:, None], mass.long(), 0)
    found = blocks_by_halves(halves[:, :, 0], halves[:, :, 1], needed)
    if budget.gamma >= 1:
        found = num_free.expand_as(found)
    # The span's first tile has the shortest lists, the last one the longest.
    wanted = torch.minimum(found.clamp_min(budget.min_blocks - 1 - num_forced), num_free)
    chosen = _highest(key, wanted).unflatten(0, (-1, group)).any(1)
    room = (budget.max_blocks - tiles_per_span - num_forced).clamp_min(0)
    rank = key.unflatten(0, (-1, group)).amax(1)
    count = chosen.sum(-1)
    chosen = torch.where((count > room)[..., None], _highest(rank, torch.minimum(room, count)), chosen) | is_forced
    listed = (chosen | is_own).repeat_interleave(group, 0)
    kept = torch.where(listed, whole, 0).sum(-1).float() / total.float()
    return TileSelection(_lists_of(chosen, spans, tiles), kept)


def blocks_by_halves(even: torch.Tensor, odd: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """How many blocks it takes for both halves to keep `needed` together, each by the other's choice.

    even, odd: [num_q_heads, num_spans, num_blocks] of free blocks, 0 elsewhere; needed: [num_q_heads, num_spans].
    """
    low, high = torch.zeros_like(needed), torch.maximum(even, odd).amax(-1) + 1
    while bool((low + 1 < high).any()):
        middle = (low + high) // 2
        cut = middle[..., None]
        enough = (torch.where(odd >= cut, even, 0) + torch.where(even >= cut, odd, 0)).sum(-1) >= needed
        is_open = low + 1 < high
        low = torch.where(enough & is_open, middle, low)
        high = torch.where(~enough & is_open, middle, high)
    taken = ((even >= low[..., None]).int() + (odd >= low[..., None]).int()).sum(-1)
    # No choice of one half speaks for the other where no cut is enough.
    found = torch.where(low > 0, (taken + 1) // 2, (even + odd > 0).sum(-1))
    return torch.where(needed <= 0, 0, found)


def _highest(key: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The `wanted` entries of the largest keys along the last axis, of equal ones those furthest right; bool."""
    order = key.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order)).flip(-1)
    return rank < wanted[..., None]


def _lists_of(chosen: torch.Tensor, spans: Spans, tiles: PrefillTiles) -> BlockLists:
    """Lists of all tiles from the past blocks chosen, [num_list_heads, num_spans, num_blocks] bool."""
    num_list_heads, _, num_blocks = chosen.shape
    tiles_per_span = spans.rule.span_len // tiles.block_size
    tile_block = tiles.tile_block.long()[:, None]
    block = torch.arange(num_blocks)
    listed = (block <= tile_block).expand(num_list_heads, -1, -1).clone()
    for span, (request, index, first_tile) in enumerate(
        zip(spans.span_request.tolist(), spans.span_index.tolist(), spans.span_tile.tolist(), strict=True)
    ):
        if request >= 0:
            own = slice(first_tile, first_tile + tiles_per_span)
            listed[:, own, : index * tiles_per_span] = chosen[:, span, None, : index * tiles_per_span]
    ids = torch.argsort(~listed, dim=-1, stable=True).int()
    return BlockLists(ids, listed.sum(-1).int())
