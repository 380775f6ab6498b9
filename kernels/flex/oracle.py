"""The exact attention mass of every block, and the fewest blocks that reach gamma: what a selection is held against."""

import torch
from farspan.kernels.reference import gather_kv
from farspan.kernels.rotary_turn import RotaryShift, apply_shift
from farspan.kernels.tiles import BlockLists, PrefillTiles


def block_mass(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tiles: PrefillTiles,
    scale: float,
    dtype: torch.dtype = torch.float64,
    string: RotaryShift | None = None,
) -> torch.Tensor:
    """Attention mass of each KV block, mean over a tile's queries: [num_q_heads, num_tiles, num_blocks], rows sum to 1.

    Arguments as in `flex_block_lists`; on any device, one tile at a time.
    """
    num_heads, block = query.shape[1], tiles.block_size
    mass = torch.zeros(num_heads, tiles.num_tiles, tiles.max_kv_blocks, dtype=dtype, device=query.device)
    for request in range(len(seq_lens)):
        start, end = query_start_loc[request : request + 2].tolist()
        kv_len = int(seq_lens[request])
        key, _ = gather_kv(kv_cache, block_table[request], kv_len, dtype)
        key = key.repeat_interleave(num_heads // key.shape[1], dim=1)
        for tile in (tiles.tile_request == request).nonzero()[:, 0].tolist():
            low = max(int(tiles.tile_block[tile]) * block, kv_len - (end - start))
            high = min((int(tiles.tile_block[tile]) + 1) * block, kv_len)
            rows = query[end - kv_len + low : end - kv_len + high].to(dtype)
            logits = torch.einsum("qhd,khd->hqk", rows, key[:high]) * scale
            pos = torch.arange(high, device=query.device)
            if string is not None:
                far = torch.einsum("qhd,khd->hqk", apply_shift(rows, string), key[:high]) * scale
                logits = torch.where(pos[low:, None] - pos >= string.shift, far, logits)
            weights = logits.masked_fill(pos > pos[low:, None], float("-inf")).softmax(-1).mean(1)
            weights = torch.nn.functional.pad(weights, (0, -high % block)).unflatten(-1, (-1, block)).sum(-1)
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
