"""Static block masks: which KV blocks each query tile reads, from a named pattern or a boolean mask.

Rows and columns are absolute blocks of a request: a tile's list does not depend on the chunk. (Results can still depend
on the chunks, since the engine computes a chunk of one token as a decode, over all keys.) Named patterns cost memory in
proportion to the blocks that they list; no `num_tiles x num_blocks` array is made. All of it is plain tensor arithmetic
on the device of the tiles; functions that wait for the device say so.

Sources: sink + local: StreamingLLM, arXiv 2309.17453; strided: Sparse Transformers, arXiv 1904.10509, section 4.3;
butterfly: Pixelated Butterfly, arXiv 2112.00029, section 3.2 (the flat block butterfly, which Block-Sparse
FlashAttention, arXiv 2205.14135, section 3.3, uses); dilated: Longformer, arXiv 2004.05150, section 3.1.
"""

import torch
from farspan.kernels.tiles import BlockLists, PrefillTiles

PATTERNS = ("sink_local", "strided", "butterfly", "dilated")

# Larger than any block id, so that what is not listed sorts to the end.
_NOT_LISTED = 2**31 - 1


def static_block_lists(
    tiles: PrefillTiles,
    pattern: str,
    *,
    sink_blocks: int = 1,
    local_blocks: int = 8,
    stride: int = 8,
    causal: bool = True,
    num_kv_blocks: torch.Tensor | None = None,
) -> BlockLists:
    """Lists of a named pattern, the same for every head; the tile's own (diagonal) block is always among them.

    For a tile in absolute block i, with n = local_blocks and s = stride:

    - `sink_local`: blocks 0 … sink_blocks - 1, and the n blocks i - n + 1 … i.
    - `strided`: the n blocks i - n + 1 … i, and every block i - k·s.
    - `butterfly`: block i, and every block whose number differs from i in one bit.
    - `dilated`: the n blocks i, i - s, …, i - (n - 1)·s.

    Causal lists keep the blocks up to i. Otherwise windows and strides reach as far to the right as to the left.

    tiles: the tiles to make lists for; the lists are on their device.
    sink_blocks, local_blocks, stride: in blocks of `tiles.block_size` tokens.
    num_kv_blocks: [num_reqs] int32 on that device, the KV blocks of each request; needed if not causal.
    Returns lists with one list head. Raises ValueError for an unknown pattern, a number below its least value, or
    lists that are not causal without `num_kv_blocks`. Sources: module docstring.
    """
    _check_pattern(pattern, sink_blocks, local_blocks, stride)
    row = tiles.tile_block[:, None]
    if causal:
        last = row
    elif num_kv_blocks is None:
        raise ValueError("num_kv_blocks is needed for lists that are not causal: they end with the request")
    else:
        last = num_kv_blocks[tiles.tile_request.long()].to(torch.int32)[:, None] - 1

    num_blocks = max(tiles.max_kv_blocks, 1)

    def around(step: int, count: int) -> torch.Tensor:
        """Blocks i + step·k for |k| < count, no further than a request can reach; only k <= 0 if causal."""
        reach = min(count - 1, (num_blocks - 1) // step)
        return row + step * torch.arange(-reach, 1 if causal else reach + 1, dtype=torch.int32, device=row.device)

    if pattern == "sink_local":
        sinks = torch.arange(min(sink_blocks, num_blocks), dtype=torch.int32, device=row.device)
        columns = [sinks.expand(row.shape[0], -1), around(1, local_blocks)]
    elif pattern == "strided":
        columns = [around(1, local_blocks), around(stride, num_blocks)]
    elif pattern == "dilated":
        columns = [around(stride, local_blocks)]
    else:
        bits = torch.arange((num_blocks - 1).bit_length(), dtype=torch.int32, device=row.device)
        columns = [row, row ^ (1 << bits).to(torch.int32)]
    return _sorted_lists(torch.cat(columns, dim=1), last)


def _check_pattern(pattern: str, sink_blocks: int, local_blocks: int, stride: int) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r}; the named patterns are {', '.join(PATTERNS)}")
    for name, value, least in (
        ("sink_blocks", sink_blocks, 0),
        ("local_blocks", local_blocks, 1),
        ("stride", stride, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}; it must be at least {least}, so that every query sees its own block")


def _sorted_lists(columns: torch.Tensor, last: torch.Tensor) -> BlockLists:
    """Ascending lists without repeats of the columns in [0, last].

    columns: [num_tiles, width] int32; last: [num_tiles, 1] int32.
    """
    columns = columns.masked_fill((columns < 0) | (columns > last), _NOT_LISTED).sort(dim=1).values
    repeated = torch.zeros_like(columns, dtype=torch.bool)
    repeated[:, 1:] = columns[:, 1:] == columns[:, :-1]
    columns = columns.masked_fill(repeated, _NOT_LISTED).sort(dim=1).values
    counts = (columns != _NOT_LISTED).sum(dim=1, dtype=torch.int32)
    return BlockLists(columns[None].contiguous(), counts[None])


def check_block_mask(mask: torch.Tensor, *, causal: bool = True) -> None:
    """Raise ValueError unless a boolean mask is well formed and lets every query see a block.

    mask: [heads, blocks_q, blocks_k] bool. The last query block is at the position of the last KV block, so that
        blocks_q <= blocks_k.
    causal: every query block must see its own block; otherwise at least one block. Waits for the device.
    """
    if mask.dtype != torch.bool or mask.ndim != 3:
        raise ValueError(f"block mask: {mask.dtype} {list(mask.shape)}; it must be bool [heads, blocks_q, blocks_k]")
    offset = mask.shape[2] - mask.shape[1]
    if offset < 0:
        raise ValueError(f"block mask: {list(mask.shape)} has more query blocks than KV blocks")
    seen = mask.diagonal(offset, 1, 2) if causal else mask.any(dim=2)
    if not bool(seen.all()):
        head, block = (~seen).nonzero()[0].tolist()
        missing = "its own block" if causal else "any block"
        raise ValueError(
            f"block mask: head {head}, query block {block} does not see {missing}; set mask[{head}, {block}, "
            f"{block + offset}] (every query must see at least its own block)"
        )


def mask_rows(mask: torch.Tensor, *, causal: bool = True) -> BlockLists:
    """Turn a boolean mask into one list per mask row, once; `gather_rows` then serves every step.

    mask: [heads, blocks_q, blocks_k] bool, as `check_block_mask` accepts it; if causal, blocks above the diagonal are
        dropped.
    Returns block_ids [heads, blocks_q, longest row] and block_counts [heads, blocks_q]. Waits for the device.
    """
    if causal:
        mask = mask.tril(mask.shape[2] - mask.shape[1])
    counts = mask.sum(dim=2, dtype=torch.int32)
    longest = max(int(counts.max()), 1) if counts.numel() else 1
    # Descending and stable: the listed columns come first, in ascending order.
    ids = mask.to(torch.int8).sort(dim=2, descending=True, stable=True).indices[:, :, :longest]
    return BlockLists(ids.to(torch.int32).contiguous(), counts)


def gather_rows(rows: BlockLists, tiles: PrefillTiles, num_kv_blocks: torch.Tensor | None = None) -> BlockLists:
    """The lists of the tiles of one step, from lists per absolute block.

    rows: block_ids [heads, blocks, width], from `mask_rows` of a square mask, on the device of the tiles.
    num_kv_blocks: [num_reqs] int32 on the device; needed if the rows are not causal, to end them with the request.
    Returns lists with as many list heads as the mask has heads. Raises ValueError if the mask has fewer blocks than the
    longest request.
    """
    blocks = rows.block_ids.shape[1]
    if tiles.max_kv_blocks > blocks:
        raise ValueError(
            f"the block mask covers {blocks} blocks of {tiles.block_size} tokens ({blocks * tiles.block_size} tokens), "
            f"but a request has {tiles.max_kv_blocks} blocks; give a larger mask or lower max_model_len"
        )
    row = tiles.tile_block.long()
    ids, counts = rows.block_ids[:, row], rows.block_counts[:, row]
    lists = BlockLists(ids, counts)
    return lists if num_kv_blocks is None else end_with_request(lists, tiles, num_kv_blocks)


def end_with_request(lists: BlockLists, tiles: PrefillTiles, num_kv_blocks: torch.Tensor) -> BlockLists:
    """Drop the blocks past a request's last one from its lists; num_kv_blocks: [num_reqs] int32 on the device."""
    last = num_kv_blocks[tiles.tile_request.long()][None, :, None]
    listed = torch.arange(lists.block_ids.shape[2], device=last.device) < lists.block_counts[..., None]
    return BlockLists(lists.block_ids, (listed & (lists.block_ids < last)).sum(dim=2, dtype=torch.int32))
