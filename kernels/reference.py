"""The operations in plain float32 (or float64) PyTorch: slow and simple, what the kernels are tested against.

Shapes and conventions are those of the kernels. LSE is in natural log, `[num_heads, num_tokens]` in the dtype of the
computation, -inf where a query sees no key; such a query's output is zero.
"""

import torch
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.tiles import BlockLists, PrefillTiles


def gather_kv(
    kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one request's keys and values out of its pages.

    kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], a token's key and value side by side.
    block_table: [max_pages] int32, the request's row.
    Returns two [seq_len, num_kv_heads, head_dim] tensors of `dtype`.
    """
    page_size = kv_cache.shape[2]
    pages = kv_cache[block_table[: -(-seq_len // page_size)].long()]
    tokens = pages.transpose(1, 2).flatten(0, 1)[:seq_len].to(dtype)
    key, value = tokens.chunk(2, dim=-1)
    return key, value


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one request.

    query: [query_len, num_heads, head_dim]; key, value: [kv_len, num_kv_heads, head_dim]; all one float dtype.
    mask: [query_len, kv_len] or [num_heads, query_len, kv_len] bool, True where the query sees the key.
    Returns out [query_len, num_heads, head_dim] and lse [num_heads, query_len].
    """
    group = query.shape[1] // key.shape[1]
    logits = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, dim=1)) * scale
    return attend_logits(logits, value, mask)


def attend_logits(logits: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention from scaled logits [num_heads, query_len, kv_len]; value, mask and result as in `attend`."""
    logits = logits.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.where(lse[..., None].isinf(), 0.0, (logits - lse[..., None]).exp())
    group = logits.shape[0] // value.shape[1]
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, dim=1)), lse


def paged_attention(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    scale: float,
    *,
    causal: bool = True,
    tiles: PrefillTiles | None = None,
    block_lists: BlockLists | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a varlen batch on paged KV; prefill and decode alike.

    query: [num_tokens, num_heads, head_dim], the requests' chunks one after the other.
    scale: factor on the logits. causal: a query at position p sees keys [0, p]; otherwise [0, kv_len).
    tiles, block_lists: if given, tile t of head h reads only the blocks in its list.
    Returns out [num_tokens, num_heads, head_dim] and lse [num_heads, num_tokens] in `dtype`.
    """
    num_tokens, num_heads, head_dim = query.shape
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=dtype, device=query.device)
    lse = torch.full((num_heads, num_tokens), float("-inf"), dtype=dtype, device=query.device)
    for request in range(batch.num_reqs):
        start, end = int(batch.query_start_loc[request]), int(batch.query_start_loc[request + 1])
        if start == end:
            continue
        kv_len, first_pos = int(batch.kv_lens[request]), int(batch.first_positions()[request])
        key, value = gather_kv(kv.pages, batch.block_table[request], kv_len, dtype)
        query_pos = torch.arange(first_pos, first_pos + end - start, device=query.device)
        kv_pos = torch.arange(kv_len, device=query.device)
        mask = torch.ones(num_heads, end - start, kv_len, dtype=torch.bool, device=query.device)
        if causal:
            mask &= kv_pos <= query_pos[:, None]
        if block_lists is not None:
            assert tiles is not None
            mask &= listed_keys(tiles, block_lists, request, num_heads, query_pos, kv_pos)
        out[start:end], lse[:, start:end] = attend(query[start:end].to(dtype), key, value, scale, mask)
    return out, lse


def listed_keys(
    tiles: PrefillTiles,
    block_lists: BlockLists,
    request: int,
    num_heads: int,
    query_pos: torch.Tensor,
    kv_pos: torch.Tensor,
) -> torch.Tensor:
    """[num_heads, query_len, kv_len] bool: the keys that the block lists let each query of one request see."""
    num_list_heads = block_lists.block_ids.shape[0]
    mask = torch.zeros(num_list_heads, len(query_pos), len(kv_pos), dtype=torch.bool, device=query_pos.device)
    for tile in (tiles.tile_request == request).nonzero()[:, 0].tolist():
        rows = query_pos // tiles.block_size == tiles.tile_block[tile]
        for head in range(num_list_heads):
            ids = block_lists.block_ids[head, tile, : block_lists.block_counts[head, tile]]
            mask[head] |= rows[:, None] & torch.isin(kv_pos // tiles.block_size, ids)
    return mask.repeat_interleave(num_heads // num_list_heads, dim=0)


def string_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    inv_freq: torch.Tensor,
    scale: float,
    *,
    shift: int,
    window: int,
    is_neox: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one request under shifted positions, in float64, from the whole matrix of distances.

    query: [query_len, num_heads, head_dim], the request's last tokens; key, value: [kv_len, num_kv_heads, head_dim].
        Queries and keys are NOT rotated yet. The first `2 * len(inv_freq)` components of a head rotate.
    inv_freq: [rotary_dim / 2] radians per token.
    shift, window: tokens. A pair at distance d < shift rotates by d, one at d >= shift by d - shift + window.
    is_neox: True if component i pairs with i + rotary_dim / 2, False if component 2i pairs with 2i + 1.
    mask: [query_len, kv_len] or [num_heads, query_len, kv_len] bool, further restricts what a query sees.
    Returns out [query_len, num_heads, head_dim] and lse [num_heads, query_len], float64. Source: STRING, 2410.18745.
    """
    query_len, num_heads = query.shape[:2]
    kv_len = key.shape[0]
    group = num_heads // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(group, dim=1), value.double()
    distance = torch.arange(kv_len - query_len, kv_len)[:, None] - torch.arange(kv_len)
    position = torch.where(distance >= shift, distance - shift + window, distance)
    rotary_dim = 2 * inv_freq.shape[0]

    def as_complex(heads: torch.Tensor) -> torch.Tensor:
        rotary = heads[..., :rotary_dim]
        real, imag = rotary.chunk(2, dim=-1) if is_neox else (rotary[..., 0::2], rotary[..., 1::2])
        return torch.complex(real, imag)

    turn = torch.polar(torch.tensor(1.0).double(), position[..., None] * inv_freq.double())
    logits = torch.einsum("qhr,khr,qkr->hqk", as_complex(query), as_complex(key).conj(), turn).real
    logits = logits + torch.einsum("qhd,khd->hqk", query[..., rotary_dim:], key[..., rotary_dim:])
    causal = distance >= 0
    return attend_logits(logits * scale, value, causal if mask is None else causal & mask)


def combine_partials(part_out: torch.Tensor, part_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over disjoint key sets.

    part_out: [num_parts, num_tokens, num_heads, head_dim]; part_lse: [num_parts, num_heads, num_tokens], natural log.
    Returns out [num_tokens, num_heads, head_dim] and lse [num_heads, num_tokens]. Source: FlashInfer, 2501.01005.
    """
    lse = part_lse.logsumexp(0)
    finite = torch.where(lse.isinf(), 0.0, lse)
    weights = (part_lse - finite).exp().mT[..., None]
    return torch.where(weights > 0, part_out * weights, 0.0).sum(0), lse
