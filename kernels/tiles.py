"""How prefill work is cut up: query tiles of a varlen batch, and the KV blocks that each tile reads.

Positions are absolute: token 0 is a request's first token, in every chunk. Query tiles are aligned to absolute
positions: a chunk that starts inside a block has a first tile with fewer tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrefillTiles:
    """The query tiles of one step, over all requests that prefill in it.

    Tile t covers the query tokens of request `tile_request[t]` whose absolute positions are in
    `[tile_block[t] * block_size, (tile_block[t] + 1) * block_size)` and in the request's current chunk.
    Every tile has at least one token. Tiles of one request are adjacent, ascending.
    """

    block_size: int
    """Tokens of a query tile and of a KV block: 64 or 128."""
    tile_request: torch.Tensor
    """[num_tiles] int32, on the device: index into the requests of the batch."""
    tile_block: torch.Tensor
    """[num_tiles] int32, on the device: absolute block index of the tile's query tokens."""
    max_kv_blocks: int
    """Blocks of the longest request up to its last tile: no causal list is longer."""

    @property
    def num_tiles(self) -> int:
        return self.tile_request.shape[0]


@dataclass(frozen=True)
class BlockLists:
    """The KV blocks that each query tile reads, per list head.

    List head h serves query heads `[h * g, (h + 1) * g)` with `g = num_q_heads // num_list_heads`: one list per query
    head (`num_list_heads == num_q_heads`), one per KV head, or one for all. A block id is absolute within its request:
    block b holds KV positions `[b * block_size, (b + 1) * block_size)`, with the block size of the tiles.
    """

    block_ids: torch.Tensor
    """[num_list_heads, num_tiles, max_blocks] int32, ascending, no repeats; undefined at and past the count."""
    block_counts: torch.Tensor
    """[num_list_heads, num_tiles] int32, at least 1. Causal lists end with the tile's diagonal block."""


def make_prefill_tiles(
    query_start_loc: list[int], chunk_ends: list[int], block_size: int, device: torch.device
) -> PrefillTiles:
    """Cut the chunks of a batch into query tiles, on the host, without waiting for the device.

    query_start_loc: num_reqs + 1 offsets of each request's query tokens.
    chunk_ends: num_reqs exact positions, one past each chunk's last query; the request's length after this step where
        the chunk is the last of its keys. Requests with an empty chunk get no tile.
    block_size: tokens per tile and per KV block, 64 or 128.
    """
    tile_request: list[int] = []
    tile_block: list[int] = []
    max_kv_blocks = 0
    for request, (start, end, chunk_end) in enumerate(
        zip(query_start_loc[:-1], query_start_loc[1:], chunk_ends, strict=True)
    ):
        if start == end:
            continue
        first = (chunk_end - (end - start)) // block_size
        last = (chunk_end - 1) // block_size
        tile_request.extend([request] * (last - first + 1))
        tile_block.extend(range(first, last + 1))
        max_kv_blocks = max(max_kv_blocks, last + 1)
    both = to_device([tile_request, tile_block], device)
    return PrefillTiles(block_size, both[0], both[1], max_kv_blocks)


def to_device(values: list[list[int]], device: torch.device) -> torch.Tensor:
    """[len(values), columns] int32 on the device, without waiting for it."""
    tensor = torch.tensor(values, dtype=torch.int32)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
