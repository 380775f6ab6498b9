"""What `kv_gather` does, in vectorised PyTorch: the path of the CPU platform, and the reference of the kernels."""

import torch
from farspan.kernels.kv_gather import PagePools


def move_pages_cpu(pools: PagePools, blocks: torch.Tensor, slots: torch.Tensor, *, to_host: bool) -> None:
    """See `kv_gather.move_pages`."""
    first = 0
    for host in pools.host:
        rows = pools.slots[first : first + len(host)]
        if to_host:
            host[:, blocks.long()] = rows[:, slots.long()]
        else:
            rows[:, slots.long()] = host[:, blocks.long()]
        first += len(host)


def stage_pages_cpu(
    pools: PagePools, entries: torch.Tensor, rows: slice, staging: torch.Tensor, *, from_host: bool
) -> None:
    """See `kv_gather.stage_pages`."""
    chosen = (entries < 0) if from_host else (entries >= 0)
    places = chosen.nonzero()[:, 0]
    named = entries[places].long()
    for place, row in enumerate(range(rows.start, rows.stop)):
        source = host_row(pools, row)[-1 - named] if from_host else pools.slots[row, named]
        staging[place, places] = source


def host_row(pools: PagePools, row: int) -> torch.Tensor:
    """[num_blocks, page_size, 2 * head_dim]: one row's pages in host memory."""
    for host in pools.host:
        if row < len(host):
            return host[row]
        row -= len(host)
    raise IndexError(row)


def map_step_cpu(
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    slot_of: torch.Tensor,
    page_size: int,
    max_kv_len: int,
    entries: torch.Tensor,
    mapped: torch.Tensor,
) -> None:
    """See `kv_gather.map_step`."""
    num_pages = min(-(-max_kv_len // page_size), block_table.shape[1])
    used = torch.arange(num_pages) * page_size < kv_lens[:, None]
    blocks = block_table[:, :num_pages][used]
    slots = slot_of[blocks.long()]
    entries[: len(kv_lens), :num_pages][used] = torch.where(slots >= 0, slots, -1 - blocks)
    place = slot_mapping.long()
    slots_of_tokens = slot_of[(place // page_size).clamp_min(0)].long()
    is_token = (place >= 0) & (slots_of_tokens >= 0)
    mapped[: len(place)] = torch.where(is_token, slots_of_tokens * page_size + place % page_size, -1)
