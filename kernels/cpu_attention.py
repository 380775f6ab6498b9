"""Exact, block-sparse and shifted attention on paged KV in vectorised PyTorch: the path of the CPU platform.

Keys and values are gathered from their pages once a request, in float32; prefill then runs PyTorch's own flash
attention for the CPU over the pieces of the causal triangle that need no mask of their own, and merges the pieces by
their LSE. Decode rows run as padded batches of requests of similar length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from farspan.kernels.rotary_turn import RotaryShift, apply_shift
from farspan.kernels.tiles import BlockLists, PrefillTiles

# Query rows of a tile, and keys of a block, where shifted positions cut a dense prompt into tiles.
SHIFT_TILE = 256

# Float32 elements of keys and values that a batch of several decode rows gathers: 16 MiB, which the C library's heap
# keeps for the next batch; larger pieces go back to the system and fault in anew.
MAX_BATCH_ELEMENTS = 4 * 1024 * 1024

# The only public entry to PyTorch's flash attention drops the LSE.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def write_kv_cpu(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write new keys and values into their slots.

    key, value: [num_tokens or more, num_kv_heads, head_dim]; rows past `slot_mapping` are ignored.
    kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], any strides; written in its own dtype.
    slot_mapping: [num_tokens] int; slot = page * page_size + offset, -1 for padding (not written).
    """
    slots = slot_mapping.long()
    tokens = torch.cat([key[: len(slots)], value[: len(slots)]], dim=-1).to(kv_cache.dtype)
    if bool((slots < 0).any()):
        tokens, slots = tokens[slots >= 0], slots[slots >= 0]
    page_size = kv_cache.shape[2]
    kv_cache[slots // page_size, :, slots % page_size] = tokens


def cpu_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: list[int] | torch.Tensor,
    query_start_loc: list[int] | torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    tiles: PrefillTiles | None = None,
    block_lists: BlockLists | None = None,
    head_mask: torch.Tensor | None = None,
    string: RotaryShift | None = None,
) -> None:
    """Causal attention of a varlen batch on paged KV, prefill and decode mixed.

    query: [num_tokens or more, num_q_heads, head_dim], float32, bfloat16 or float16. A request's chunk is its last
        `query_len` tokens: its first token has position `seq_len - query_len`.
    kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], any strides, last dimension contiguous.
    block_table: [num_reqs, max_pages] int32, garbage allowed past a request's last page.
    seq_lens: [num_reqs]; query_start_loc: [num_reqs + 1]; lists or tensors on the CPU.
    scale: factor on the logits.
    out: [num_tokens or more, num_q_heads, head_dim], written for the tokens of the batch.
    lse: [num_q_heads, num_tokens or more] float32 or None, written likewise; natural log. A token of a request with
        `seq_len` 0 has no keys: its output is 0 and its LSE -inf.
    tiles, block_lists: requests that have tiles read only the blocks listed for each of them; the others are dense.
    head_mask: [num_q_heads, num_reqs] bool, the heads of each request to compute, densely; `out` and `lse` of the
        others stay as they are. All when None.
    string: shifted positions; None for ordinary ones.

    All arithmetic is in float32 whatever the dtype. Sources: FlashAttention-2, arXiv 2307.08691; STRING, 2410.18745.
    """
    lens: list[int] = seq_lens.tolist() if isinstance(seq_lens, torch.Tensor) else seq_lens
    starts: list[int] = query_start_loc.tolist() if isinstance(query_start_loc, torch.Tensor) else query_start_loc
    if head_mask is not None:
        assert block_lists is None
        _attend_heads(query, kv_cache, block_table, lens, starts, scale, head_mask, out, lse, string)
        return
    tiles_of: dict[int, list[int]] = {}
    if tiles is not None and block_lists is not None:
        for tile, request in enumerate(tiles.tile_request.tolist()):
            tiles_of.setdefault(request, []).append(tile)
    decodes = []
    for request, seq_len in enumerate(lens):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        if seq_len == 0:
            out[rows] = 0
            if lse is not None:
                lse[:, rows] = float("-inf")
        elif rows.stop - rows.start == 1 and request not in tiles_of:
            decodes.append(request)
        else:
            prompt = _Prompt(query[rows], kv_cache, block_table[request], seq_len, scale, string)
            if request in tiles_of:
                assert tiles is not None
                assert block_lists is not None
                part = prompt.attend_lists(tiles, block_lists, tiles_of[request])
            else:
                part = prompt.attend()
            out[rows] = part[0].permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
            if lse is not None:
                lse[:, rows] = part[1].flatten(0, 1)
    for batch in _decode_batches(decodes, lens, kv_cache.shape[1] * kv_cache.shape[3]):
        tokens = torch.tensor([starts[request] for request in batch])
        batch_lens = torch.tensor([lens[request] for request in batch])
        pages = block_table[torch.tensor(batch)]
        part = _decode(query[tokens].float(), kv_cache, pages, batch_lens, scale, string)
        out[tokens] = part[0].to(out.dtype)
        if lse is not None:
            lse[:, tokens] = part[1]


def _attend_heads(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lens: list[int],
    starts: list[int],
    scale: float,
    head_mask: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    string: RotaryShift | None,
) -> None:
    """Dense attention of some heads of some requests; arguments as in `cpu_attention`."""
    group = query.shape[1] // kv_cache.shape[1]
    for kv_head, of_group in enumerate(head_mask.unflatten(0, (-1, group))):
        for request in of_group.any(0).nonzero()[:, 0].tolist():
            rows = slice(starts[request], starts[request + 1])
            heads = kv_head * group + of_group[:, request].nonzero()[:, 0]
            part = query[rows, heads]
            part_out, part_lse = torch.empty_like(part), torch.empty(len(heads), len(part))
            cpu_attention(
                part,
                kv_cache[:, kv_head : kv_head + 1],
                block_table[request : request + 1],
                [lens[request]],
                [0, len(part)],
                scale,
                out=part_out,
                lse=part_lse,
                string=string,
            )
            out[rows, heads] = part_out
            if lse is not None:
                lse[heads, rows] = part_lse


class _Prompt:
    """One request's chunk of queries, its keys and its values.

    Queries and outputs are [num_kv_heads, group, rows, head_dim], LSE is [num_kv_heads, group, rows], keys and values
    are [num_kv_heads, seq_len, head_dim]; all float32.
    """

    def __init__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        pages: torch.Tensor,
        seq_len: int,
        scale: float,
        string: RotaryShift | None,
    ):
        num_kv_heads, page_size = kv_cache.shape[1:3]
        tokens = kv_cache.transpose(0, 1)[:, pages[: -(-seq_len // page_size)].long()].flatten(1, 2)
        self.key, self.value = tokens[:, :seq_len].float().chunk(2, dim=-1)
        self.query = query.float().unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        self.first = seq_len - query.shape[0]
        self.scale = scale
        self.string = None if string is None or seq_len <= string.shift else string
        self.shifted = self.query if self.string is None else apply_shift(self.query, self.string)

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and LSE of all rows over all keys."""
        if self.string is None:
            return _causal(self.query, self.key, self.value, self.scale)
        part = _Partial.empty(self.query.shape)
        rows = self.query.shape[2]
        for block in range(self.first // SHIFT_TILE, (self.first + rows - 1) // SHIFT_TILE + 1):
            self._add_tile(part, slice(None), slice(None), block, SHIFT_TILE, torch.arange(block + 1))
        return part.out, part.lse

    def attend_lists(
        self, tiles: PrefillTiles, block_lists: BlockLists, own_tiles: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and LSE of all rows, each over the blocks listed for its tile and head."""
        part = _Partial.empty(self.query.shape)
        num_kv_heads, group = self.query.shape[:2]
        num_lists = block_lists.block_ids.shape[0]
        heads_per_list = num_kv_heads * group // num_lists
        for tile in own_tiles:
            for head, count in enumerate(block_lists.block_counts[:, tile].tolist()):
                kv_head, in_group = divmod(head * heads_per_list, group)
                kv_heads = slice(kv_head, kv_head + max(heads_per_list // group, 1))
                group_heads = slice(in_group, in_group + min(heads_per_list, group))
                ids = block_lists.block_ids[head, tile, :count].long()
                self._add_tile(part, kv_heads, group_heads, int(tiles.tile_block[tile]), tiles.block_size, ids)
        return part.out, part.lse

    def _add_tile(
        self, part: "_Partial", kv_heads: slice, group_heads: slice, block: int, block_size: int, ids: torch.Tensor
    ) -> None:
        """Merge into `part` the rows of query block `block`, for some heads, over the KV blocks `ids`."""
        begin = max(block * block_size, self.first)
        end = min((block + 1) * block_size, self.key.shape[1])
        rows = slice(begin - self.first, end - self.first)
        query, shifted = self.query[kv_heads, group_heads, rows], self.shifted[kv_heads, group_heads, rows]
        key, value = self.key[kv_heads], self.value[kv_heads]
        tile = part.view(kv_heads, group_heads, rows)
        # Keys before `far` are shifted for all rows of the tile, those from `near` on for none.
        far, near = (0, 0) if self.string is None else (begin - self.string.shift + 1, end - self.string.shift)
        ids = ids[ids <= block]
        is_far, is_near = (ids + 1) * block_size <= far, ids * block_size >= near
        for mask in (is_far, is_near, ~(is_far | is_near)):
            chosen = ids[mask]
            if len(chosen) == 0:
                continue
            keys = _key_positions(chosen, block_size, end)
            piece = key[:, keys], value[:, keys]
            if mask is is_far:
                tile.add(*_flash_piece(shifted, *piece, self.scale, causal=False))
            elif mask is not is_near:
                tile.add(*self._straddling(query, shifted, *piece, begin, keys))
            elif int(chosen[-1]) == block:
                tile.add(*_causal(query, *piece, self.scale))
            else:
                tile.add(*_flash_piece(query, *piece, self.scale, causal=False))

    def _straddling(
        self,
        query: torch.Tensor,
        shifted: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        begin: int,
        keys: slice | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention where some pairs are shifted and some are not; row i has position `begin + i`."""
        assert self.string is not None
        key_pos = torch.arange(keys.start, keys.stop) if isinstance(keys, slice) else keys
        distance = torch.arange(begin, begin + query.shape[2])[:, None] - key_pos
        logits = torch.where(distance >= self.string.shift, shifted @ key[:, None].mT, query @ key[:, None].mT)
        return _softmax((logits * self.scale).masked_fill_(distance < 0, float("-inf")), value)


@dataclass
class _Partial:
    """Attention over the keys seen so far: out [..., rows, head_dim] and lse [..., rows], changed in place."""

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def empty(cls, shape: torch.Size) -> "_Partial":
        return cls(torch.zeros(shape), torch.full(shape[:-1], float("-inf")))

    def view(self, *index: slice) -> "_Partial":
        return _Partial(self.out[index], self.lse[index])

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the attention of the same rows over further keys."""
        total = torch.logaddexp(self.lse, lse)
        finite = torch.where(total.isinf(), 0.0, total)
        self.out.mul_((self.lse - finite).exp_()[..., None])
        self.out.addcmul_(out, (lse - finite).exp_()[..., None])
        self.lse.copy_(total)


def _key_positions(ids: torch.Tensor, block_size: int, end: int) -> slice | torch.Tensor:
    """The positions below `end` of the blocks `ids` (ascending): a slice where they are adjacent."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first + 1 == len(ids):
        return slice(first * block_size, min((last + 1) * block_size, end))
    positions = (ids[:, None] * block_size + torch.arange(block_size)).flatten()
    return positions[: len(positions) - max((last + 1) * block_size - end, 0)]


def _flash_piece(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys for all rows, or (causal, as many keys as rows) key j for the rows from j on."""
    expand = (-1, query.shape[1], -1, -1)
    return _flash(query, key[:, None].expand(expand), value[:, None].expand(expand), 0.0, causal, scale=scale)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last row sees all keys, the row before it all but the last, and so on; at least as many keys as rows.

    query: [kv heads, group, rows, head_dim]; key, value: [kv heads, keys, head_dim].
    Returns out, shaped as query, and lse [kv heads, group, rows].
    """
    context = key.shape[1] - query.shape[2]
    own = _Partial(*_flash_piece(query, key[:, context:], value[:, context:], scale, causal=True))
    if context > 0:
        own.add(*_flash_piece(query, key[:, :context], value[:, :context], scale, causal=False))
    return own.out, own.lse


def _softmax(logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from logits [kv heads, group, rows, keys]; rows whose logits are all -inf give 0 and -inf."""
    lse = logits.logsumexp(dim=-1)
    weights = (logits - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp_()
    return weights @ value[:, None], lse


def _decode_batches(requests: list[int], lens: list[int], token_elements: int) -> Iterator[list[int]]:
    """Group single-token requests of similar length: at most twice as long as the shortest, within the size bound."""
    batch: list[int] = []
    for request in sorted(requests, key=lambda request: -lens[request]):
        longest = lens[batch[0]] if batch else 0
        if batch and (2 * lens[request] < longest or (len(batch) + 1) * longest * token_elements > MAX_BATCH_ELEMENTS):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    scale: float,
    string: RotaryShift | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a request, at position `lens - 1`.

    query: [num_reqs, num_q_heads, head_dim] float32; block_table: [num_reqs, max_pages]; lens: [num_reqs], all > 0.
    Returns out, shaped as query, and lse [num_q_heads, num_reqs].
    """
    num_kv_heads, page_size = kv_cache.shape[1:3]
    max_len = int(lens.max())
    num_pages = -(-max_len // page_size)
    used = torch.arange(num_pages) * page_size < lens[:, None]
    pages = block_table[:, :num_pages].long().masked_fill(~used, 0)
    tokens = kv_cache.transpose(0, 1)[:, pages].flatten(2, 3)[:, :, :max_len].float()
    distance = lens[:, None] - 1 - torch.arange(max_len)
    # Memory past a request's end may hold NaN, which no zero weight removes.
    tokens = tokens.masked_fill((distance < 0)[..., None], 0.0)
    key, value = tokens.chunk(2, dim=-1)
    grouped = query.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    logits = grouped @ key.mT
    if string is not None and max_len > string.shift:
        far = (distance >= string.shift)[:, None]
        logits = torch.where(far, apply_shift(grouped, string) @ key.mT, logits)
    logits = (logits * scale).masked_fill_((distance < 0)[:, None], float("-inf"))
    lse = logits.logsumexp(dim=-1)
    out = (logits - lse[..., None]).exp_() @ value
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(1, 2).flatten(0, 1)
