"""The exact attention mass of every block, and the fewest blocks that reach gamma: what a selection is held against."""

import torch
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.reference import tile_rows
from farspan.kernels.reference import gather_kv
from farspan.kernels.rotary_turn import Turn, apply_turn
from farspan.kernels.tiles import BlockLists, PrefillTiles


def block_mass(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles,
    scale: float,
    *,
    turn: Turn | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Attention mass of each KV block, mean over a tile's queries: [num_q_heads, num_tiles, num_blocks], rows sum to 1.

    Arguments as in `flex_block_lists`; on any device, one tile at a time.
    """
    num_heads, block = query.shape[1], tiles.block_size
    mass = torch.zeros(num_heads, tiles.num_tiles, tiles.max_kv_blocks, dtype=dtype, device=query.device)
    for request in range(batch.num_reqs):
        kv_len = int(batch.kv_lens[request])
        first_pos = int(batch.first_positions()[request])
        key, _ = gather_kv(kv.pages, batch.block_table[request], kv_len, dtype)
        key = key.repeat_interleave(num_heads // key.shape[1], dim=1)
        pos = torch.arange(kv_len, device=query.device)
        for tile in (tiles.tile_request == request).nonzero()[:, 0].tolist():
            low, high = tile_rows(tiles, tile, batch)
            rows = query[low:high].to(dtype)
            begin = first_pos + low - int(batch.query_start_loc[request])
            row_pos = torch.arange(begin, begin + high - low, device=query.device)
            logits = torch.einsum("qhd,khd->hqk", rows, key) * scale
            if turn is not None:
                turned = torch.einsum("qhd,khd->hqk", apply_turn(rows, turn), key) * scale
                logits = torch.where(pos < turn.bounds(row_pos)[:, None], turned, logits)
            weights = logits.masked_fill(pos > row_pos[:, None], float("-inf")).softmax(-1).mean(1)
            weights = torch.nn.functional.pad(weights, (0, -kv_len % block)).unflatten(-1, (-1, block)).sum(-1)
            mass[:, tile, : weights.shape[-1]] = weights
    return mass


def smallest_counts(mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """The fewest blocks a tile needs to keep `gamma` of its mass: [num_q_heads, num_tiles] int64.

    mass: from `block_mass`.
    """
    ordered = mass.sort(dim=-1, descending=True).values
    return (ordered.cumsum(-1) < gamma).sum(-1) + 1


def kept_mass(mass: torch.Tensor, block_lists: BlockLists) -> torch.Tensor:
    """Mass in the listed blocks, [num_q_heads, num_tiles]: the mean coverage of the tile's queries."""
    num_list_heads = block_lists.block_ids.shape[0]
    listed = torch.arange(block_lists.block_ids.shape[-1], device=mass.device) < block_lists.block_counts[..., None]
    ids = torch.where(listed, block_lists.block_ids, 0).long().repeat_interleave(mass.shape[0] // num_list_heads, 0)
    listed = listed.repeat_interleave(mass.shape[0] // num_list_heads, 0)
    return torch.where(listed, mass.gather(-1, ids), 0.0).sum(-1)
