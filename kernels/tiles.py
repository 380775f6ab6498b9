"""How prefill work is cut up: query tiles of a varlen batch, and the KV blocks that each tile reads.

Positions are absolute: token 0 is a request's first token, wherever a chunk starts. Query tiles are aligned to
absolute positions, so a chunk that starts inside a block has a short first tile, and the blocks chosen for a tile do
not depend on how the prompt was cut into chunks.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrefillTiles:
    """The query tiles of one step, over all requests that prefill in it.

    Tile t covers the query tokens of request `tile_request[t]` whose absolute positions lie in
    `[tile_block[t] * block_size, (tile_block[t] + 1) * block_size)` and in the request's current chunk
    `[seq_len - query_len, seq_len)`. Every tile has at least one token. Tiles of one request are adjacent, ascending.
    """

    block_size: int
    """Tokens of a query tile and of a KV block: 64 or 128."""
    tile_request: torch.Tensor
    """[num_tiles] int32, on the device: index into `query_start_loc`, `seq_lens` and `block_table`."""
    tile_block: torch.Tensor
    """[num_tiles] int32, on the device: absolute block index of the tile's query tokens."""
    max_kv_blocks: int
    """ceil(max seq_len / block_size) over the requests with tiles (host-side upper bound)."""

    @property
    def num_tiles(self) -> int:
        return self.tile_request.shape[0]


@dataclass(frozen=True)
class BlockLists:
    """The KV blocks that each query tile reads, per list head.

    List head h serves query heads `[h * g, (h + 1) * g)` with `g = num_q_heads // num_list_heads`: one list a query
    head (`num_list_heads == num_q_heads`), one a KV head, or one for all. A block id is absolute within its request:
    block b holds KV positions `[b * block_size, (b + 1) * block_size)`, with the block size of the tiles.
    """

    block_ids: torch.Tensor
    """[num_list_heads, num_tiles, max_blocks] int32, ascending, no repeats; undefined at and past the count."""
    block_counts: torch.Tensor
    """[num_list_heads, num_tiles] int32, at least 1. Causal lists end with the tile's diagonal block."""


def make_prefill_tiles(
    query_start_loc: list[int],
    seq_lens: list[int],
    block_size: int,
    device: torch.device,
    requests: list[int] | None = None,
) -> PrefillTiles:
    """Cut the chunks of a batch into query tiles, on the host, without touching the device's results.

    query_start_loc: num_reqs + 1 offsets of each request's query tokens.
    seq_lens: num_reqs lengths after this step, the chunk's own tokens included; exact for the requests given.
    requests: the requests to cut, ascending; all when None. Requests with an empty chunk get no tile.
    """
    tile_request: list[int] = []
    tile_block: list[int] = []
    max_kv_blocks = 0
    for request in range(len(seq_lens)) if requests is None else requests:
        query_len = query_start_loc[request + 1] - query_start_loc[request]
        if query_len == 0:
            continue
        first = (seq_lens[request] - query_len) // block_size
        last = (seq_lens[request] - 1) // block_size
        tile_request.extend([request] * (last - first + 1))
        tile_block.extend(range(first, last + 1))
        max_kv_blocks = max(max_kv_blocks, last + 1)
    both = torch.tensor([tile_request, tile_block], dtype=torch.int32)
    if device.type == "cuda":
        both = both.pin_memory()
    both = both.to(device, non_blocking=True)
    return PrefillTiles(block_size, both[0], both[1], max_kv_blocks)
