"""What `page_bounds`, `page_choice` and `selected_decode` do, in float32 PyTorch: their reference, and the CPU path."""

import torch
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.cpu_attention import read_pages
from farspan.kernels.kv_gather import PagePools
from farspan.kernels.page_bounds import ERROR_PER_CELL, ERROR_PER_MIDDLE, NUM_CELLS, PageBounds
from farspan.kernels.page_choice import Rule
from farspan.kernels.tuning import SELECT_RECENT_TOKENS


def bound_pages_cpu(pools: PagePools, bounds: PageBounds, blocks: torch.Tensor, slots: torch.Tensor) -> None:
    """See `page_bounds.bound_pages`."""
    pages = pools.slots[:, slots.long()]
    ends, cells = key_bounds(pages[..., : pages.shape[-1] // 2])
    bounds.ends.transpose(0, 1)[:, blocks.long()] = ends
    bounds.cells.transpose(0, 1)[:, blocks.long()] = cells


def key_bounds(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends [..., 2, head_dim] and cells [..., page_size, head_dim / 2] of [..., page_size, head_dim] keys."""
    ends = torch.stack([keys.amin(-2), keys.amax(-2)], -2)
    least, largest = ends.float().unbind(-2)
    width = (largest - least) / (NUM_CELLS - 1)
    places = (keys.float() - least.unsqueeze(-2)) / torch.where(width > 0, width, 1.0).unsqueeze(-2)
    # Where a page is not full it may hold anything; no number of a cell comes of NaN.
    cells = (places + 0.5).nan_to_num(0.0).clamp(0, NUM_CELLS - 1).to(torch.uint8)
    low, high = cells.chunk(2, -1)
    return ends, low + high * 16


def estimated_keys(ends: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """[..., page_size, head_dim] float32: the middles of the cells."""
    least, largest = ends.float().unbind(-2)
    width = (largest - least) / (NUM_CELLS - 1)
    numbers = torch.cat([cells & 15, cells >> 4], -1).float()
    return least.unsqueeze(-2) + numbers * width.unsqueeze(-2)


def weights_of_pages(
    query: torch.Tensor, ends: torch.Tensor, cells: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate and upper bound of the LSE of each full page's logits, natural log, [num_kv_heads, group, num_pages].

    query: [num_kv_heads, group, head_dim] float32. ends: [num_kv_heads, num_pages, 2, head_dim]; cells: [num_kv_heads,
    num_pages, page_size, head_dim / 2].
    """
    query = query * scale
    least, largest = ends.float().unbind(-2)
    error = ERROR_PER_CELL / (NUM_CELLS - 1) * (query.abs() @ (largest - least).mT)
    error += ERROR_PER_MIDDLE * (query.abs() @ (0.5 * (largest + least)).abs().mT)
    estimate = torch.einsum("kgd,kptd->kgpt", query, estimated_keys(ends, cells)).logsumexp(-1)
    return estimate, estimate + error


def choose(
    estimate: torch.Tensor, upper: torch.Tensor, held: torch.Tensor, is_kept: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Which pages each KV head reads: [num_kv_heads, num_pages] bool.

    estimate, upper: [num_kv_heads, group, num_pages] natural log; held: [num_kv_heads, group], the LSE of what is read
    anyway; is_kept: [num_pages] bool, pages that are read whatever they weigh.
    """
    if rule.coverage >= 1:
        return torch.ones(estimate.shape[0], estimate.shape[2], dtype=torch.bool)
    total = torch.cat([estimate, held[..., None]], -1).logsumexp(-1, keepdim=True)
    error = upper - estimate if rule.by_bounds else torch.zeros_like(estimate)
    most, least = estimate + error - total, estimate - error - total
    order = most.amax(1).masked_fill(is_kept, float("inf"))
    places = order.argsort(dim=-1, descending=True, stable=True)
    most, least = (each.double().exp().gather(-1, places[:, None].expand_as(each)) for each in (most, least))
    # Of the first 0, 1, … pages.
    read = torch.nn.functional.pad(least.cumsum(-1), (1, 0)) + (held - total[..., 0]).double().exp()[..., None]
    unread = torch.nn.functional.pad(most.flip(-1).cumsum(-1).flip(-1), (0, 1))
    suffices = (unread * rule.coverage <= read * (1 - rule.coverage)).all(1)
    needed = torch.maximum(suffices.int().argmax(-1), is_kept.sum())
    return places.argsort(dim=-1) < needed[:, None]


def selected_decode_cpu(
    query: torch.Tensor,
    kv: KVView,
    bounds: PageBounds,
    batch: PagedBatch,
    scale: float,
    rule: Rule,
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
    left: torch.Tensor,
    totals: torch.Tensor,
) -> None:
    """See `selected_decode.selected_decode`."""
    for request, kv_len in enumerate(batch.kv_lens.tolist()):
        if kv_len == 0:
            out[request] = 0
            lse[:, request] = left[:, request] = float("-inf")
            continue
        entries = batch.block_table[request, : -(-kv_len // kv.page_size)].long()
        heads = query[request].float().unflatten(0, (kv.num_kv_heads, -1))
        keys, values = read_pages(kv, entries).flatten(1, 2)[:, :kv_len].float().chunk(2, -1)
        logits = heads @ keys.mT * scale
        on_host = entries < 0
        page_of = torch.arange(kv_len) // kv.page_size
        bound = torch.full_like(logits[..., 0], float("-inf"))
        if on_host.any():
            places = on_host.nonzero()[:, 0]
            blocks = -1 - entries[places]
            ends, cells = (each.transpose(0, 1)[:, blocks] for each in (bounds.ends, bounds.cells))
            estimate, upper = weights_of_pages(heads, ends, cells, scale)
            held = logits.masked_fill(on_host[page_of], float("-inf")).logsumexp(-1)
            recent = max(kv_len - SELECT_RECENT_TOKENS, 0) // kv.page_size
            is_read = choose(estimate, upper, held, (places == 0) | (places >= recent), rule)
            bound = upper.masked_fill(is_read[:, None], float("-inf")).logsumexp(-1)
            is_unread = torch.zeros(kv.num_kv_heads, len(entries), dtype=torch.bool)
            is_unread[:, places] = ~is_read
            logits = logits.masked_fill(is_unread[:, None, page_of], float("-inf"))
            totals += torch.stack([is_read.sum(), torch.tensor(is_read.numel())])
        lse[:, request] = logits.logsumexp(-1).flatten()
        left[:, request] = bound.flatten()
        out[request] = (logits.softmax(-1) @ values).flatten(0, 1).to(out.dtype)
