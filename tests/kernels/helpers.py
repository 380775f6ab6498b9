"""Helpers of the kernel tests: paged batches with hostile memory, random block lists, and the allowed error.

Pages are in random order. Every page that no request owns, and every slot past a request's last token, holds NaN; the
block table holds invalid page ids past each request's pages. A kernel that reads them returns NaN or faults.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from farspan.kernels import reference
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.decode import paged_decode
from farspan.kernels.decode_workspace import DecodeWorkspace
from farspan.kernels.tiles import BlockLists, PrefillTiles, make_prefill_tiles
from farspan.kernels.tuning import DECODE_MIN_SPLIT_KEYS

# A page id that no test cache has: reading it walks off the cache.
GARBAGE_PAGE = 2**30


@dataclass(frozen=True)
class Inputs:
    """One layer's inputs for a varlen batch; shapes as `reference.paged_attention` takes them."""

    query: torch.Tensor
    key: torch.Tensor
    """[num_tokens, num_kv_heads, head_dim]: keys of the chunk tokens (already in the cache)."""
    value: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    """[num_tokens] int64: slots of the chunk tokens in the cache."""
    scale: float

    @property
    def kv(self) -> KVView:
        return KVView(self.kv_cache)

    @property
    def paged(self) -> PagedBatch:
        """The batch as the launchers take it."""
        return PagedBatch(
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            max_query_len=max(self.query_lens, default=0),
            max_kv_len=self.block_table.shape[1] * self.kv_cache.shape[2],
        )

    @property
    def query_lens(self) -> list[int]:
        return self.query_start_loc.diff().tolist()

    def tiles(self, block_size: int, requests: list[int] | None = None) -> PrefillTiles:
        """The query tiles of the batch, or of some of its requests."""
        tiles = make_prefill_tiles(self.query_start_loc.tolist(), self.seq_lens.tolist(), block_size, self.query.device)
        if requests is None:
            return tiles
        kept = torch.isin(tiles.tile_request, torch.tensor(requests, device=self.query.device))
        return PrefillTiles(block_size, tiles.tile_request[kept], tiles.tile_block[kept], tiles.max_kv_blocks)


def make_batch(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "lbhnc",
    sharpness: float = 1.0,
) -> Inputs:
    """Draw a batch: request r has `seq_lens[r]` tokens, the last `query_lens[r]` of them in this step's chunk.

    layout: `lbhnc` keeps one head's page contiguous; `lbnhc` keeps one token's heads contiguous.
    sharpness: factor on the queries; larger makes attention pick fewer keys.
    """
    num_reqs = len(seq_lens)
    pages_of = [-(-length // page_size) for length in seq_lens]
    num_pages = sum(pages_of) + 3
    order = torch.randperm(num_pages)
    # One column more than the longest request needs, as vLLM's tables have.
    block_table = torch.full((num_reqs, max(pages_of, default=0) + 1), GARBAGE_PAGE, dtype=torch.int32)
    if layout == "lbhnc":
        kv_cache = torch.full((num_pages, num_kv_heads, page_size, 2 * head_dim), float("nan"), dtype=dtype)
    else:
        assert layout == "lbnhc"
        kv_cache = torch.full((num_pages, page_size, num_kv_heads, 2 * head_dim), float("nan"), dtype=dtype)
        kv_cache = kv_cache.transpose(1, 2)
    slots, keys, values = [], [], []
    first_page = 0
    for request, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        assert query_len <= seq_len
        pages = order[first_page : first_page + pages_of[request]]
        first_page += pages_of[request]
        block_table[request, : len(pages)] = pages.int()
        position = torch.arange(seq_len)
        page, offset = pages[position // page_size], position % page_size
        key_value = torch.randn(seq_len, num_kv_heads, 2 * head_dim).to(dtype)
        kv_cache[page, :, offset] = key_value
        slots.append((page * page_size + offset)[seq_len - query_len :])
        keys.append(key_value[seq_len - query_len :, :, :head_dim])
        values.append(key_value[seq_len - query_len :, :, head_dim:])
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    query = (sharpness * torch.randn(int(starts[-1]), num_heads, head_dim)).to(dtype)
    return Inputs(
        query=query.to(device),
        key=torch.cat(keys).to(device),
        value=torch.cat(values).to(device),
        # `.to` keeps dense strides, so the layout survives.
        kv_cache=kv_cache.to(device),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(list(seq_lens), dtype=torch.int32, device=device),
        query_start_loc=starts.to(device),
        slot_mapping=torch.cat(slots).long().to(device),
        scale=head_dim**-0.5,
    )


def random_block_lists(
    tiles: PrefillTiles,
    num_list_heads: int,
    density: float,
    *,
    seq_lens: torch.Tensor | None = None,
    force_first: bool = True,
) -> BlockLists:
    """Draw a block list per list head and tile: each block with probability `density`, the diagonal one always.

    Causal lists hold blocks up to the diagonal one. seq_lens: if given, the lists are not causal and reach to the end
    of the request. force_first: always keep block 0. Entries past the count are invalid ids.
    """
    max_blocks = tiles.max_kv_blocks
    block_ids = torch.full((num_list_heads, tiles.num_tiles, max_blocks), 2**30, dtype=torch.int32)
    counts = torch.zeros(num_list_heads, tiles.num_tiles, dtype=torch.int32)
    for tile in range(tiles.num_tiles):
        diagonal = int(tiles.tile_block[tile])
        last = diagonal
        if seq_lens is not None:
            last = (int(seq_lens[tiles.tile_request[tile]]) - 1) // tiles.block_size
        for head in range(num_list_heads):
            kept = torch.rand(last + 1) < density
            kept[diagonal] = True
            kept[0] |= force_first
            ids = kept.nonzero()[:, 0]
            block_ids[head, tile, : len(ids)] = ids.int()
            counts[head, tile] = len(ids)
    device = tiles.tile_block.device
    return BlockLists(block_ids.to(device), counts.to(device))


def poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    """An output buffer full of NaN, so that elements that a kernel does not write are seen."""
    return torch.full_like(tensor, float("nan"))


def assert_attention_close(
    out: torch.Tensor,
    lse: torch.Tensor,
    expected_out: torch.Tensor,
    expected_lse: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Compare with the float32 reference, allowing twice what plain PyTorch loses at `dtype`.

    PyTorch loses what rounding the weights and the output to `dtype` costs, relative to the largest output. The LSE is
    float32 in every kernel and may differ by the rounding of the products that enter it.
    """
    assert out.shape == expected_out.shape
    assert lse.shape == expected_lse.shape
    assert lse.dtype == torch.float32
    assert torch.equal(torch.isneginf(lse), torch.isneginf(expected_lse))
    assert bool(torch.isfinite(out).all())
    epsilon = torch.finfo(dtype).eps
    size = max(float(expected_out.abs().max()), 1e-3) if expected_out.numel() else 1.0
    difference = (out.float() - expected_out.float()).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    # In float32 the order of summation and exp2 instead of exp decide.
    assert worst <= max(2 * epsilon, 1e-5) * size, f"output differs by {worst:.2e}, largest value {size:.2e}"
    finite = ~torch.isneginf(expected_lse)
    if bool(finite.any()):
        lse_error = float((lse - expected_lse)[finite].abs().max())
        # A GPU computes float32 products in tf32 only when asked; none of ours asks.
        assert lse_error <= 1e-4, f"lse differs by {lse_error:.2e}"


def reference_attention(
    inputs: Inputs,
    *,
    causal: bool = True,
    tiles: PrefillTiles | None = None,
    block_lists: BlockLists | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.paged_attention` of a batch, in float32 on the batch's device."""
    return reference.paged_attention(
        inputs.query, inputs.kv, inputs.paged, inputs.scale, causal=causal, tiles=tiles, block_lists=block_lists
    )


def poisoned_decode(
    batch: Inputs, num_splits: int, query_len: int = 1, *, turn: Any = None, num_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_decode` on outputs and a workspace of exactly the needed size, all full of NaN.

    query_len: the most tokens of a request. num_rows: of the query, with padding after the batch's own.
    """
    num_tokens, num_heads, head_dim = batch.query.shape
    num_rows = num_tokens if num_rows is None else num_rows
    nan = {"fill_value": float("nan"), "device": batch.query.device}
    query = torch.full((num_rows, num_heads, head_dim), dtype=batch.query.dtype, **nan)
    query[:num_tokens] = batch.query
    parts = num_rows * num_heads * num_splits
    return paged_decode(
        query,
        batch.kv,
        batch.paged,
        batch.scale,
        num_splits=num_splits,
        min_split_keys=DECODE_MIN_SPLIT_KEYS,
        query_len=query_len,
        turn=turn,
        out=poisoned_like(query),
        lse=torch.full((num_heads, num_rows), **nan),
        workspace=DecodeWorkspace(torch.full((parts * head_dim,), **nan), torch.full((parts,), **nan)),
    )
