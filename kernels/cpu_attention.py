"""Exact and block-sparse attention on paged KV in vectorised PyTorch: the path of the CPU platform.

Keys and values are gathered from their pages once per request, in float32. Prefill then runs PyTorch's flash attention
for the CPU over the pieces of the causal triangle that need no further mask, and merges the pieces by their LSE. Decode
rows run as padded batches of requests of similar length; a request alone reads its pages in place, in runs of ids that
follow each other, of which a prompt mostly has few.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from farspan.kernels.batch import FP8, FP8_MAX, KVView, PagedBatch
from farspan.kernels.rotary_turn import Turn, apply_turn
from farspan.kernels.tiles import BlockLists, PrefillTiles

# Query rows per tile and keys per block where dense attention has to be cut into tiles.
DENSE_TILE = 256

# Most float32 elements of keys and values that a batch of several decode rows gathers: 16 MiB. The C library's heap
# keeps pieces of that size for the next batch; larger ones go back to the system and fault in again.
MAX_BATCH_ELEMENTS = 4 * 1024 * 1024

# Most runs of adjacent pages that a decode row reads in place: with sixteen it takes 0.4 to 0.9 times as long as with a
# copy of all pages at three shapes of 4K and 12K tokens, with 32 up to 1.25 times. x86, one thread, 2026-11.
MAX_RUNS = 16

# The only public entry to PyTorch's flash attention drops the LSE.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def write_kv_cpu(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write new keys and values into their slots.

    key, value: [num_tokens or more, num_kv_heads, head_dim]; rows past `slot_mapping` are ignored.
    kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], any strides; numbers are cast to its dtype, to
        float8_e4m3fn as the nearest one that it has.
    slot_mapping: [num_tokens] int; slot = page * page_size + offset, -1 for padding (not written).
    key_scale, value_scale: what keys and values are divided by first, above 0; only for float8.
    """
    slots = slot_mapping.long()
    key, value = key[: len(slots)], value[: len(slots)]
    if kv_cache.dtype == FP8:
        divided = torch.cat([key.float() / key_scale, value.float() / value_scale], dim=-1)
        tokens = divided.clamp(-FP8_MAX, FP8_MAX).to(FP8)
    else:
        assert key_scale == value_scale == 1.0
        tokens = torch.cat([key, value], dim=-1).to(kv_cache.dtype)
    if bool((slots < 0).any()):
        tokens, slots = tokens[slots >= 0], slots[slots >= 0]
    page_size = kv_cache.shape[2]
    kv_cache[slots // page_size, :, slots % page_size] = tokens


def read_pages(kv: KVView, entries: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, *entries.shape, page_size, 2 * head_dim]: the pages that int64 entries of a block table name."""
    if kv.host_pages is None:
        return kv.pages.transpose(0, 1)[:, entries]
    pages = kv.pages.transpose(0, 1)[:, entries.clamp_min(0)]
    on_host = entries < 0
    pages[:, on_host] = kv.host_pages.transpose(0, 1)[:, -1 - entries[on_host]]
    return pages


def cpu_attention(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    scale: float,
    *,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    tiles: PrefillTiles | None = None,
    block_lists: BlockLists | None = None,
    causal: bool = True,
    turn: Turn | None = None,
) -> None:
    """Attention of a varlen batch on paged KV, prefill and decode mixed.

    query: [num_tokens or more, num_q_heads, head_dim], float32, bfloat16 or float16; the heads that `kv` serves.
    scale: factor on the logits, that of stored keys included.
    out: [num_tokens or more, num_q_heads, head_dim], written for the tokens of the batch.
    lse: [num_q_heads, num_tokens or more] float32 or None, written likewise; natural log. A token without keys has the
        output 0 and the LSE -inf.
    tiles, block_lists: a request with tiles reads only the blocks listed for each of them; a request without is dense.
    causal: a query at position p sees keys [0, p]; otherwise [0, kv_len).
    turn: keys below its bound meet the turned query.

    All arithmetic is in float32, for every dtype. Sources: FlashAttention-2, arXiv 2307.08691; STRING, 2410.18745.
    """
    lens: list[int] = batch.kv_lens.tolist()
    starts: list[int] = batch.query_start_loc.tolist()
    firsts: list[int] = batch.first_positions().tolist()
    tiles_of: dict[int, list[int]] = {}
    if tiles is not None and block_lists is not None:
        for tile, request in enumerate(tiles.tile_request.tolist()):
            tiles_of.setdefault(request, []).append(tile)
    decodes = []
    for request, kv_len in enumerate(lens):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        if kv_len == 0:
            out[rows] = 0
            if lse is not None:
                lse[:, rows] = float("-inf")
        elif rows.stop - rows.start == 1 and request not in tiles_of:
            decodes.append(request)
        else:
            prompt = _Prompt(query[rows], kv, batch.block_table[request], kv_len, firsts[request], scale, causal, turn)
            if request in tiles_of:
                assert tiles is not None
                assert block_lists is not None
                part = prompt.attend_lists(tiles, block_lists, tiles_of[request])
            else:
                part = prompt.attend()
            out[rows] = (part[0] * kv.value_scale).permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
            if lse is not None:
                lse[:, rows] = part[1].flatten(0, 1)
    visible = [min(lens[request], firsts[request] + 1) if causal else lens[request] for request in range(len(lens))]
    for members in _decode_batches(decodes, visible, kv.num_kv_heads * 2 * kv.head_dim):
        tokens = torch.tensor([starts[request] for request in members])
        counts = torch.tensor([visible[request] for request in members])
        positions = torch.tensor([firsts[request] for request in members])
        pages = batch.block_table[torch.tensor(members)]
        decode = _decode if len(members) > 1 else _decode_one
        part = decode(query[tokens].float(), kv, pages, counts, positions, scale, turn)
        out[tokens] = (part[0] * kv.value_scale).to(out.dtype)
        if lse is not None:
            lse[:, tokens] = part[1]


class _Prompt:
    """One request's chunk of queries, its keys and its values.

    Queries and outputs are [num_kv_heads, group, rows, head_dim], LSE is [num_kv_heads, group, rows], keys and values
    are [num_kv_heads, kv_len, head_dim]; all float32. Row i is at position `first + i`.
    """

    def __init__(
        self,
        query: torch.Tensor,
        kv: KVView,
        pages: torch.Tensor,
        kv_len: int,
        first: int,
        scale: float,
        causal: bool,
        turn: Turn | None,
    ):
        tokens = read_pages(kv, pages[: -(-kv_len // kv.page_size)].long()).flatten(1, 2)
        self.key, self.value = tokens[:, :kv_len].float().chunk(2, dim=-1)
        self.query = query.float().unflatten(1, (kv.num_kv_heads, -1)).permute(1, 2, 0, 3)
        self.first = first
        self.end = first + query.shape[0]
        self.kv_len = kv_len
        self.scale = scale
        self.causal = causal
        self.turn = None if turn is None or not turn.reaches(self.end - 1) else turn
        self.turned = self.query if self.turn is None else apply_turn(self.query, self.turn)

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and LSE of all rows over all keys."""
        if self.turn is None:
            if not self.causal:
                return _flash_piece(self.query, self.key, self.value, self.scale, causal=False)
            if self.end == self.kv_len:
                return _causal(self.query, self.key, self.value, self.scale)
        part = _Partial.empty(self.query.shape)
        blocks = -(-self.kv_len // DENSE_TILE)
        for block in range(self.first // DENSE_TILE, (self.end - 1) // DENSE_TILE + 1):
            num_blocks = min(block + 1, blocks) if self.causal else blocks
            self._add_tile(part, slice(None), slice(None), block, DENSE_TILE, torch.arange(num_blocks))
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
        """Merge into `part` the rows of query block `block`, for some heads, over the KV blocks `ids` (ascending)."""
        begin = max(block * block_size, self.first)
        end = min((block + 1) * block_size, self.end)
        rows = slice(begin - self.first, end - self.first)
        query, turned = self.query[kv_heads, group_heads, rows], self.turned[kv_heads, group_heads, rows]
        key, value = self.key[kv_heads], self.value[kv_heads]
        tile = part.view(kv_heads, group_heads, rows)
        # Keys before `far` are turned for all rows of the tile, those from `near` on for none.
        far, near = (0, 0) if self.turn is None else (self.turn.bound(begin), self.turn.bound(end - 1))
        num_visible = min(end, self.kv_len) if self.causal else self.kv_len
        ids = ids[ids * block_size < num_visible]
        ends = ((ids + 1) * block_size).clamp_max(num_visible)
        is_far, is_near = ends <= far, ids * block_size >= near
        is_whole = ends <= begin + 1 if self.causal else torch.ones_like(is_far)
        for same_turn, rotated in ((is_far & is_whole, turned), (is_near & is_whole, query)):
            if same_turn.any():
                keys = _key_positions(ids[same_turn], block_size, num_visible)
                tile.add(*_flash_piece(rotated, key[:, keys], value[:, keys], self.scale, causal=False))
        rest = ids[~((is_far | is_near) & is_whole)]
        if len(rest) == 0:
            return
        first_own = block * block_size
        if self.causal and rest.tolist() == [block] and num_visible == end and first_own >= near:
            # The rows' own block, without turned keys; its last row sees all of its keys.
            tile.add(*_causal(query, key[:, first_own:end], value[:, first_own:end], self.scale))
        else:
            keys = _key_positions(rest, block_size, num_visible)
            tile.add(*self._masked(query, turned, key[:, keys], value[:, keys], begin, keys))

    def _masked(
        self,
        query: torch.Tensor,
        turned: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        begin: int,
        keys: slice | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention with one mask for visible and one for turned (query, key) pairs; row i has position `begin + i`."""
        key_pos = torch.arange(keys.start, keys.stop) if isinstance(keys, slice) else keys
        position = torch.arange(begin, begin + query.shape[2])[:, None]
        logits = query @ key[:, None].mT
        if self.turn is not None:
            logits = torch.where(key_pos < self.turn.bounds(position), turned @ key[:, None].mT, logits)
        if self.causal:
            logits = logits.masked_fill_(key_pos > position, float("-inf"))
        return _softmax(logits * self.scale, value)


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
    """Every row sees every key; if causal, with as many keys as rows, row i sees keys [0, i]."""
    expand = (-1, query.shape[1], -1, -1)
    return _flash(query, key[:, None].expand(expand), value[:, None].expand(expand), 0.0, causal, scale=scale)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i sees keys [0, i + keys - rows]; at least as many keys as rows.

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
    kv: KVView,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    turn: Turn | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per request, over its first `lens` keys.

    query: [num_reqs, num_q_heads, head_dim] float32; block_table: [num_reqs, max_pages]; lens: [num_reqs], all > 0;
    positions: [num_reqs], of the queries.
    Returns out, shaped as query, and lse [num_q_heads, num_reqs].
    """
    num_kv_heads, page_size = kv.num_kv_heads, kv.page_size
    max_len = int(lens.max())
    num_pages = -(-max_len // page_size)
    used = torch.arange(num_pages) * page_size < lens[:, None]
    pages = block_table[:, :num_pages].long().masked_fill(~used, 0)
    tokens = read_pages(kv, pages).flatten(2, 3)[:, :, :max_len].float()
    key_pos = torch.arange(max_len)
    is_past = key_pos >= lens[:, None]
    # Memory past a request's end may hold NaN, which no zero weight removes. Each end for itself: a mask over all
    # tokens costs more than the attention.
    for request, length in enumerate(lens.tolist()):
        tokens[:, request, length:] = 0.0
    key, value = tokens.chunk(2, dim=-1)
    grouped = query.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    logits = grouped @ key.mT
    if turn is not None and turn.reaches(int(positions.max())):
        is_turned = (key_pos < turn.bounds(positions)[:, None])[:, None]
        logits = torch.where(is_turned, apply_turn(grouped, turn) @ key.mT, logits)
    logits = (logits * scale).masked_fill_(is_past[:, None], float("-inf"))
    lse = logits.logsumexp(dim=-1)
    out = (logits - lse[..., None]).exp_() @ value
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(1, 2).flatten(0, 1)


def _decode_one(
    query: torch.Tensor,
    kv: KVView,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    turn: Turn | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_decode` of a batch of one, page by page: no copy of keys and values where few runs of pages hold them."""
    num_tokens = int(lens)
    pages = block_table[0, : -(-num_tokens // kv.page_size)].long()
    grouped = query[0].unflatten(0, (kv.num_kv_heads, -1))
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    bound = 0 if turn is None else max(0, min(turn.bound(int(positions)), num_tokens))
    if turn is not None and bound > 0:
        parts += _pieces_of_pages(apply_turn(grouped, turn), kv, pages, 0, bound, scale)
    if bound < num_tokens:
        parts += _pieces_of_pages(grouped, kv, pages, bound, num_tokens, scale)
    outs, lses = (torch.cat(each) for each in zip(*parts, strict=True))
    lse = lses.logsumexp(dim=0)
    out = (outs * (lses - lse).exp_()[..., None]).sum(dim=0)
    return out.flatten(0, 1)[None], lse.flatten()[:, None]


def _pieces_of_pages(
    rows: torch.Tensor, kv: KVView, pages: torch.Tensor, first: int, end: int, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Attention of rows [num_kv_heads, group, head_dim] over keys [first, end) of one request, page by page.

    Yields out [num_pages, num_kv_heads, group, head_dim] and lse [num_pages, num_kv_heads, group], of all pages in all.
    """
    size = kv.page_size
    # In the order of their ids: attention asks for none.
    whole, _ = pages[-(-first // size) : end // size].sort()
    yield from (_attend_pages(rows, run, scale) for run in _runs(kv, whole))
    # The last page may hold NaN past the request's end.
    for page in {each // size for each in (first, end) if each % size > 0}:
        tokens = read_pages(kv, pages[page : page + 1]).transpose(0, 1)
        yield _attend_pages(rows, tokens[:, :, max(first - page * size, 0) : end - page * size], scale)


def _attend_pages(rows: torch.Tensor, pages: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = pages.float().chunk(2, dim=-1)
    return _flash(rows.expand(len(pages), -1, -1, -1), key, value, 0.0, False, scale=scale)


def _runs(kv: KVView, ids: torch.Tensor) -> list[torch.Tensor]:
    """The pages of ascending entries of a block table, [pages of a run, num_kv_heads, page_size, 2 * head_dim] each.

    Runs of adjacent pages are views, unless they are many or some pages lie in host memory: then one copy of all.
    """
    if len(ids) == 0:
        return []
    if kv.host_pages is not None:
        return [read_pages(kv, ids).transpose(0, 1)]
    ends = [*(ids.diff() != 1).nonzero()[:, 0].add(1).tolist(), len(ids)]
    if len(ends) > MAX_RUNS:
        return [kv.pages[ids]]
    return [kv.pages[int(ids[first]) : int(ids[end - 1]) + 1] for first, end in zip([0, *ends], ends, strict=False)]
