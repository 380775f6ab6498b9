"""Attention on contiguous tensors: exact or block-sparse, causal or not, with padding, and with LSE.

Computed by `prefill_attention` with every sequence as one page, or by the short-list kernel where block lists have at
most `SHORT_LIST_BLOCKS` blocks. Inference only: no dropout, no backward pass.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from farspan.kernels.batch import PagedBatch
from farspan.kernels.block_patterns import check_block_mask, end_with_request, mask_rows
from farspan.kernels.contiguous.short_lists import short_list_attention
from farspan.kernels.prefill import prefill_attention
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import SHORT_LIST_BLOCKS

BLOCK_SIZES = (64, 128)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_mask: torch.Tensor | BlockLists | None = None,
    lengths: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    block_size: int = 128,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention; with `block_mask`, only over the KV blocks that it names.

    q: [batch, query_len, heads, head_dim]; k, v: [batch, kv_len, kv_heads, head_dim] with kv_len >= query_len and heads
        a multiple of kv_heads; float16, bfloat16 or float32, the last axis contiguous. The queries are at positions
        [kv_len - query_len, kv_len).
    block_mask: which KV blocks of `block_size` tokens each query block sees. A bool tensor [blocks_q, blocks_k],
        [heads, blocks_q, blocks_k] or [batch, heads, blocks_q, blocks_k]; its number of heads may also be a divisor of
        heads, and its batch 1. Row i is the i-th block with queries. It is checked and packed in each call, which waits
        for the device. `BlockLists` are used without a check of their entries; they are for the tiles of
        `attention_tiles` of the whole batch, or of one sequence and then serve every sequence.
    lengths: [batch] int32 or int64 on the device, in tokens. Positions at and past a sequence's length are padding:
        no query sees them, and padding queries get a zero output and an LSE of -inf.
    causal: a query at position p sees keys [0, p]; otherwise all.
    scale: factor on the logits, above 0; head_dim ** -0.5 if None.
    block_size: 64 or 128.
    Returns out [batch, query_len, heads, head_dim], and if return_lse also the LSE [batch, heads, query_len] float32
    (natural log; -inf where a query sees no key, with zero output). Further memory: lists and, without `return_lse`,
    the LSE; contiguous copies of k and v where their strides differ.
    Raises ValueError for shapes, dtypes or masks other than these.
    Source: FlashAttention-2, arXiv 2307.08691; block masks after FlashAttention, arXiv 2205.14135, section 3.3.
    """
    _check(q, k, v, lengths, scale, block_size)
    batch, query_len, heads, head_dim = q.shape
    kv_len = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_lse:
        lse = torch.empty(heads, batch * query_len, dtype=torch.float32, device=q.device)
    if out.numel():
        layout = _layout(batch, query_len, kv_len, block_size, q.device)
        lists = _block_lists(block_mask, layout, batch, heads, causal)
        scale = head_dim**-0.5 if scale is None else scale
        key, value = k, v
        if k.stride() != v.stride():
            key, value = k.contiguous(), v.contiguous()
        if lists is not None and _fits_short_list_kernel(lists, q):
            short_list_attention(
                q, key, value, layout.tiles, lists, scale, causal=causal, lengths=lengths, out=out, lse=lse
            )
        else:
            _as_pages(q, key, value, layout, lists, scale, causal=causal, lengths=lengths, out=out, lse=lse)
    if lse is not None:
        return out, lse.view(heads, batch, query_len).transpose(0, 1)
    return out


def _fits_short_list_kernel(lists: BlockLists, q: torch.Tensor) -> bool:
    return lists.block_ids.shape[2] <= SHORT_LIST_BLOCKS and q.element_size() == 2 and q.shape[3] <= 128


def _as_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: "_Layout",
    lists: BlockLists | None,
    scale: float,
    *,
    causal: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Compute with the paged kernel, each sequence being one page; arguments as in `short_list_attention`."""
    query_len, kv_len = q.shape[1], k.shape[1]
    if lse is None:
        lse = torch.empty(q.shape[2], q.shape[0] * query_len, dtype=torch.float32, device=q.device)
    seq_lens, query_start_loc = layout.seq_lens, layout.query_start_loc
    if lengths is not None:
        seq_lens, query_start_loc = _padded_batch(lengths, query_len, kv_len)
        if lists is not None and not causal:
            lists = end_with_request(lists, layout.tiles, -(-seq_lens // layout.tiles.block_size))
    prefill_attention(
        q.flatten(0, 1),
        k.transpose(1, 2),
        v.transpose(1, 2),
        PagedBatch(query_start_loc, seq_lens, layout.block_table, max_query_len=query_len, max_kv_len=kv_len),
        layout.tiles,
        scale,
        block_lists=lists,
        causal=causal,
        out=out.flatten(0, 1),
        lse=lse,
    )
    if lengths is not None:
        _clear_padding(out, lse, query_start_loc)


def attention_tiles(
    batch: int, query_len: int, kv_len: int, block_size: int = 128, *, device: torch.device | str = "cuda"
) -> PrefillTiles:
    """The query tiles of `attention`, to make `BlockLists` for: those of sequence 0, then those of sequence 1, …

    batch, query_len, kv_len, block_size: as in `attention`; device: where the tiles are. Sequence b is request 2·b; the
    odd requests are padding and have no tiles. A tensor with one entry per request, such as `num_kv_blocks` of
    `static_block_lists`, therefore has 2·batch entries.
    """
    return _layout(batch, query_len, kv_len, block_size, torch.device(device)).tiles


@dataclass(frozen=True)
class _Layout:
    """What depends only on shapes. Sequence b is request 2·b, its padding request 2·b + 1, which has no tiles."""

    tiles: PrefillTiles
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    @property
    def tiles_per_sequence(self) -> int:
        return self.tiles.num_tiles // (self.block_table.shape[0] // 2)


# Building a layout takes longer than attention over few tokens; layouts are small and the same for every layer.
@lru_cache(maxsize=32)
def _layout(batch: int, query_len: int, kv_len: int, block_size: int, device: torch.device) -> _Layout:
    requests = torch.arange(2 * batch, dtype=torch.int32, device=device)
    first = (kv_len - query_len) // block_size
    blocks = torch.arange(first, (kv_len - 1) // block_size + 1, dtype=torch.int32, device=device)
    tiles = PrefillTiles(
        block_size=block_size,
        tile_request=requests[::2].repeat_interleave(blocks.shape[0]),
        tile_block=blocks.repeat(batch),
        max_kv_blocks=-(-kv_len // block_size),
    )
    lengths = torch.full((batch,), kv_len, dtype=torch.int32, device=device)
    seq_lens, query_start_loc = _padded_batch(lengths, query_len, kv_len)
    return _Layout(tiles, (requests // 2)[:, None].contiguous(), seq_lens, query_start_loc)


def _padded_batch(lengths: torch.Tensor, query_len: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """seq_lens [2 * batch] and query_start_loc [2 * batch + 1], int32, of sequences of the given lengths."""
    batch = lengths.shape[0]
    lengths = lengths.clamp(0, kv_len).to(torch.int32)
    seq_lens = torch.stack([lengths, torch.zeros_like(lengths)], dim=1).flatten()
    starts = torch.arange(batch + 1, dtype=torch.int32, device=lengths.device) * query_len
    ends = starts[:-1] + (lengths - (kv_len - query_len)).clamp(min=0)
    query_start_loc = torch.cat([torch.stack([starts[:-1], ends], dim=1).flatten(), starts[-1:]])
    return seq_lens, query_start_loc


def _block_lists(
    block_mask: torch.Tensor | BlockLists | None, layout: _Layout, batch: int, heads: int, causal: bool
) -> BlockLists | None:
    """The lists of all tiles, with a number of list heads that divides `heads`."""
    if block_mask is None:
        return None
    num_tiles, rows = layout.tiles.num_tiles, layout.tiles_per_sequence
    if isinstance(block_mask, BlockLists):
        lists = block_mask
        if lists.block_ids.shape[1] == rows != num_tiles:
            lists = BlockLists(lists.block_ids.repeat(1, batch, 1), lists.block_counts.repeat(1, batch))
        if lists.block_ids.shape[1] != num_tiles or heads % lists.block_ids.shape[0]:
            raise ValueError(
                f"block lists for {lists.block_ids.shape[0]} heads and {lists.block_ids.shape[1]} tiles; the heads "
                f"must divide {heads}, and the tiles be {num_tiles}, or {rows} for every sequence alike"
            )
        return lists
    expected = (rows, layout.tiles.max_kv_blocks)
    mask = block_mask
    if mask.ndim not in (2, 3, 4) or tuple(mask.shape[-2:]) != expected or mask.dtype != torch.bool:
        raise ValueError(
            f"block_mask: {mask.dtype} {list(mask.shape)}; it must be bool with {expected[0]} rows and {expected[1]} "
            f"columns of {layout.tiles.block_size} tokens in its last two dimensions, and at most [batch, heads] before"
        )
    mask = mask[(None,) * (4 - mask.ndim)]
    mask_batch, mask_heads = mask.shape[:2]
    if mask_batch not in (1, batch) or heads % mask_heads:
        raise ValueError(
            f"block_mask: {list(block_mask.shape)} is for {mask_batch} sequences and {mask_heads} heads; there are "
            f"{batch} sequences, and the heads must divide {heads}"
        )
    mask = mask.transpose(0, 1).flatten(0, 1)
    check_block_mask(mask, causal=causal)
    packed = mask_rows(mask, causal=causal)
    ids = packed.block_ids.view(mask_heads, mask_batch * rows, -1)
    counts = packed.block_counts.view(mask_heads, mask_batch * rows)
    if mask_batch != batch:
        ids, counts = ids.repeat(1, batch, 1), counts.repeat(1, batch)
    return BlockLists(ids.contiguous(), counts.contiguous())


@triton.jit
def _clear_padding_kernel(
    out_ptr,
    lse_ptr,
    query_start_loc_ptr,
    num_heads,
    row_size,
    stride_lse_head,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: zeros and -inf for BLOCK_M of the padding tokens after one sequence."""
    sequence = tl.program_id(0)
    start = tl.load(query_start_loc_ptr + 2 * sequence + 1)
    end = tl.load(query_start_loc_ptr + 2 * sequence + 2)
    start += tl.program_id(1) * BLOCK_M
    if start >= end:
        return
    token = start + tl.arange(0, BLOCK_M).to(tl.int64)
    mask = token < end
    offs = tl.arange(0, BLOCK_D)
    for first in range(0, row_size, BLOCK_D):
        mask_row = mask[:, None] & (first + offs < row_size)[None, :]
        zeros = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
        tl.store(out_ptr + token[:, None] * row_size + (first + offs)[None, :], zeros, mask=mask_row)
    lse_ptrs = lse_ptr + token
    for _ in range(num_heads):
        tl.store(lse_ptrs, float("-inf"), mask=mask)
        lse_ptrs += stride_lse_head


def _clear_padding(out: torch.Tensor, lse: torch.Tensor, query_start_loc: torch.Tensor) -> None:
    """Give padding queries a zero output and an LSE of -inf; the kernel has left both unwritten."""
    batch, query_len, heads, head_dim = out.shape
    block_m = 64
    _clear_padding_kernel[(batch, triton.cdiv(query_len, block_m))](
        out, lse, query_start_loc, heads, heads * head_dim, lse.stride(0), BLOCK_M=block_m, BLOCK_D=64
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float | None,
    block_size: int,
) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape:
        raise ValueError(f"{shapes}; they must be [batch, length, heads, head_dim], k and v of one shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}; batch and head_dim must agree, and heads be a multiple of kv_heads")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"{shapes}; there must be at least as many keys as queries")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be one of float16, bfloat16 and float32")
    if not q.device == k.device == v.device:
        raise ValueError(f"devices {q.device}, {k.device}, {v.device}; they must be the same")
    # Where Triton interprets, its kernels are no JITFunctions, and compute on the CPU too.
    if q.device.type != "cuda" and isinstance(_clear_padding_kernel, triton.JITFunction):
        raise ValueError(
            f"device {q.device}; these kernels run on CUDA devices. Move q, k and v to one; for small shapes on a CPU, "
            "set TRITON_INTERPRET=1 before triton is imported."
        )
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("the head_dim axis of q, k and v must be contiguous")
    if lengths is not None and (lengths.shape != (q.shape[0],) or lengths.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"lengths: {lengths.dtype} {list(lengths.shape)}; it must be int32 or int64 [{q.shape[0]}]")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale}; it must be above 0")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size}; it must be 64 or 128")
