"""Bounds of the keys in pages, and what attention to a page weighs by them, without reading the page.

For each channel of a page's keys there are its least and largest value and, for each key, in which of 16 equal cells
between them it lies: an eighth of the bytes of the page in 16 bits. The middle of a cell estimates a key, half a cell
bounds the error. Least and largest value alone (Quest, arXiv 2406.10774) order pages, but bound nothing on real keys:
docs/decisions/cold-decode.md.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from farspan.kernels.kv_gather import PagePools, num_copy_programs
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS

NUM_CELLS = 16
ERROR_PER_CELL = 0.52
"""Of the width of a cell: half of it, and what is lost where query times width is rounded to bfloat16."""
ERROR_PER_MIDDLE = 2.0**-17
"""Of a product with the middle of a channel: what a sum of up to 256 of them in float32 may lose."""
_LAST_CELL = tl.constexpr(NUM_CELLS - 1)
_ERROR_PER_CELL = tl.constexpr(ERROR_PER_CELL)
_ERROR_PER_MIDDLE = tl.constexpr(ERROR_PER_MIDDLE)


@dataclass(frozen=True)
class PageBounds:
    """Bounds of the keys of some KV heads in all pages of host memory; undefined for pages that were never there."""

    ends: torch.Tensor
    """[num_blocks, num_kv_heads, 2, head_dim] of the keys' dtype: least and largest value of each channel; the last two
    axes contiguous."""
    cells: torch.Tensor
    """[num_blocks, num_kv_heads, page_size, head_dim / 2] uint8: of channel d in the low four bits, of channel
    head_dim / 2 + d in the high ones; the last two axes contiguous."""

    def of_heads(self, first: int, last: int) -> "PageBounds":
        """Of the KV heads [first, last) of these."""
        return PageBounds(self.ends[:, first:last], self.cells[:, first:last])

    def of_rows(self, rows: slice) -> "PageBounds":
        """As `of_heads`, of bounds that have a row of a pool for each KV head."""
        return self.of_heads(rows.start, rows.stop)


def make_page_bounds(
    num_rows: int, num_blocks: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> PageBounds:
    """Bounds for the rows of a pool, each row's blocks adjacent."""
    ends = torch.zeros(num_rows, num_blocks, 2, head_dim, dtype=dtype, device=device)
    cells = torch.zeros(num_rows, num_blocks, page_size, head_dim // 2, dtype=torch.uint8, device=device)
    return PageBounds(ends.transpose(0, 1), cells.transpose(0, 1))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether kernels on a device do; Triton's interpreter does not."""
    return device.type != "cpu"


@triton.jit
def _cells_of(page_ptr, ends_ptr, offs_d, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr):
    """Cells of half of the channels, from FIRST on, [PAGE_SIZE, BLOCK_D] int32; writes their ends."""
    offs_n = tl.arange(0, PAGE_SIZE)[:, None]
    mask = offs_d < HEAD_DIM // 2
    key = tl.load(page_ptr + offs_n * (2 * HEAD_DIM) + FIRST + offs_d[None, :], mask=mask[None, :], other=0.0)
    key = key.to(tl.float32)
    least, largest = tl.min(key, 0), tl.max(key, 0)
    tl.store(ends_ptr + FIRST + offs_d, least.to(ends_ptr.dtype.element_ty), mask=mask)
    tl.store(ends_ptr + HEAD_DIM + FIRST + offs_d, largest.to(ends_ptr.dtype.element_ty), mask=mask)
    width = (largest - least) / _LAST_CELL
    place = (key - least[None, :]) / tl.where(width > 0, width, 1.0)[None, :]
    return tl.minimum(tl.maximum(place + 0.5, 0.0), _LAST_CELL).to(tl.int32)


@triton.jit(do_not_specialize=["num_moves"], do_not_specialize_on_alignment=["blocks_ptr", "slots_of_moves_ptr"])
def _bound_pages_kernel(
    slots_ptr,
    ends_ptr,
    cells_ptr,
    blocks_ptr,
    slots_of_moves_ptr,
    num_moves,
    num_rows,
    num_slots,
    stride_ends_block,
    stride_ends_row,
    stride_cells_block,
    stride_cells_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Programs share all pages of all rows; one at a time."""
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_d = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), num_moves * num_rows, tl.num_programs(0)):
        row = (item // num_moves).to(tl.int64)
        move = item % num_moves
        block = tl.load(blocks_ptr + move).to(tl.int64)
        slot = tl.load(slots_of_moves_ptr + move).to(tl.int64)
        page_ptr = slots_ptr + (row * num_slots + slot) * (PAGE_SIZE * 2 * HEAD_DIM)
        page_ends_ptr = ends_ptr + block * stride_ends_block + row * stride_ends_row
        low = _cells_of(page_ptr, page_ends_ptr, offs_d, PAGE_SIZE, HEAD_DIM, 0)
        high = _cells_of(page_ptr, page_ends_ptr, offs_d, PAGE_SIZE, HEAD_DIM, HALF)
        page_cells_ptr = cells_ptr + block * stride_cells_block + row * stride_cells_row
        pointers = page_cells_ptr + tl.arange(0, PAGE_SIZE)[:, None] * HALF + offs_d[None, :]
        tl.store(pointers, (low + high * 16).to(tl.uint8), mask=(offs_d < HALF)[None, :])


def bound_pages(pools: PagePools, bounds: PageBounds, blocks: torch.Tensor, slots: torch.Tensor) -> None:
    """Write the bounds of pages of all rows that lie in slots.

    bounds: of all rows of the pools. blocks, slots: [num_moves] int32 on the device: each page's block, and its slot.
    What a page holds past its request's last token widens its bounds, and nobody reads such a page by them.
    """
    num_moves = len(blocks)
    if num_moves == 0:
        return
    page_size, head_dim = pools.slots.shape[2], pools.slots.shape[3] // 2
    _bound_pages_kernel[(num_copy_programs(pools.slots, num_moves * pools.num_rows),)](
        pools.slots,
        bounds.ends,
        bounds.cells,
        blocks,
        slots,
        num_moves,
        pools.num_rows,
        pools.slots.shape[1],
        bounds.ends.stride(0),
        bounds.ends.stride(1),
        bounds.cells.stride(0),
        bounds.cells.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim // 2),
        PAGE_SIZE=page_size,
        num_warps=4,
    )


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _weigh_pages_kernel(
    query_ptr,
    ends_ptr,
    cells_ptr,
    block_table_ptr,
    kv_lens_ptr,
    host_places_ptr,
    num_host_ptr,
    estimates_ptr,
    bounds_ptr,
    scale,
    group_size,
    stride_query_token,
    stride_query_head,
    stride_ends_block,
    stride_ends_head,
    stride_cells_block,
    stride_cells_head,
    stride_block_table,
    stride_host,
    stride_weight_req,
    stride_weight_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs share the pages of one request and KV head that lie in host memory."""
    HALF: tl.constexpr = HEAD_DIM // 2
    kv_head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens_ptr + request)
    # Rows that pad a captured graph have no keys, whatever was listed for them before.
    num_host = tl.load(num_host_ptr + request, mask=kv_len > 0, other=0)
    if tl.program_id(0) >= num_host:
        return
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, PAGE_SIZE)
    mask_h = offs_h < group_size
    mask_d = offs_d < HALF
    head = (kv_head * group_size + offs_h).to(tl.int64)
    query_ptrs = query_ptr + request * stride_query_token + (head * stride_query_head)[:, None] + offs_d[None, :]
    mask_q = mask_h[:, None] & mask_d[None, :]
    query_low = tl.load(query_ptrs, mask=mask_q, other=0.0).to(tl.float32) * scale
    query_high = tl.load(query_ptrs + HALF, mask=mask_q, other=0.0).to(tl.float32) * scale
    ends_ptr += kv_head.to(tl.int64) * stride_ends_head
    cells_ptr += kv_head.to(tl.int64) * stride_cells_head
    weight_ptrs = request * stride_weight_req + head * stride_weight_head
    for index in range(tl.program_id(0), num_host, tl.num_programs(0)):
        place = tl.load(host_places_ptr + request * stride_host + index)
        block = -1 - tl.load(block_table_ptr + request * stride_block_table + place).to(tl.int64)
        page_ends_ptr = ends_ptr + block * stride_ends_block + offs_d
        least_low = tl.load(page_ends_ptr, mask=mask_d, other=0.0).to(tl.float32)
        least_high = tl.load(page_ends_ptr + HALF, mask=mask_d, other=0.0).to(tl.float32)
        width_low = tl.load(page_ends_ptr + HEAD_DIM, mask=mask_d, other=0.0).to(tl.float32) - least_low
        width_high = tl.load(page_ends_ptr + HEAD_DIM + HALF, mask=mask_d, other=0.0).to(tl.float32) - least_high
        middle_low, middle_high = least_low + 0.5 * width_low, least_high + 0.5 * width_high
        width_low, width_high = width_low / _LAST_CELL, width_high / _LAST_CELL
        step_low, step_high = query_low * width_low[None, :], query_high * width_high[None, :]
        centre_low, centre_high = query_low * middle_low[None, :], query_high * middle_high[None, :]
        error = _ERROR_PER_CELL * tl.sum(tl.abs(step_low) + tl.abs(step_high), 1)
        error += _ERROR_PER_MIDDLE * tl.sum(tl.abs(centre_low) + tl.abs(centre_high), 1)
        cell_ptrs = cells_ptr + block * stride_cells_block + offs_n[:, None] * HALF + offs_d[None, :]
        cells = tl.load(cell_ptrs, mask=mask_d[None, :], other=0).to(tl.int32)
        low = ((cells & 15).to(tl.float32) - 0.5 * _LAST_CELL).to(DOT_TYPE)
        high = ((cells >> 4).to(tl.float32) - 0.5 * _LAST_CELL).to(DOT_TYPE)
        logits = tl.dot(step_low.to(DOT_TYPE), tl.trans(low), input_precision=PRECISION)
        logits = tl.dot(step_high.to(DOT_TYPE), tl.trans(high), logits, input_precision=PRECISION)
        logits = tl.where((place * PAGE_SIZE + offs_n < kv_len)[None, :], logits, float("-inf"))
        largest = tl.max(logits, 1)
        weight = largest + tl.log(tl.sum(tl.exp(logits - largest[:, None]), 1)) + tl.sum(centre_low + centre_high, 1)
        tl.store(estimates_ptr + weight_ptrs + index, weight, mask=mask_h)
        tl.store(bounds_ptr + weight_ptrs + index, weight + error, mask=mask_h)


def weigh_pages(
    query: torch.Tensor,
    bounds: PageBounds,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    host_places: torch.Tensor,
    num_host: torch.Tensor,
    scale: float,
    estimates: torch.Tensor,
    upper: torch.Tensor,
    *,
    num_programs: int,
) -> None:
    """Estimate and bound, per query head, the log-sum-exp of the logits of each page in host memory.

    query: [num_reqs, num_q_heads, head_dim], one token a request. bounds: of the KV heads that they share.
    block_table: [num_reqs, max_pages] int32, entries as `KVView.host_pages` has them; kv_lens: [num_reqs] int32.
    host_places: [num_reqs, max_pages] int32, num_host: [num_reqs] int32: as `list_host_pages` writes them.
    estimates, upper: [num_reqs, num_q_heads, max_pages] float32, natural log: written for the pages of `host_places`,
        in their order. The true value differs from the estimate by at most upper - estimate, either way.
    num_programs: that share the pages of a request and KV head.
    """
    num_reqs, num_q_heads, head_dim = query.shape
    page_size, num_kv_heads = bounds.cells.shape[2], bounds.cells.shape[1]
    is_wide = query.dtype == torch.float32 or not multiplies_bfloat16(query.device)
    _weigh_pages_kernel[(num_programs, num_kv_heads, num_reqs)](
        query,
        bounds.ends,
        bounds.cells,
        block_table,
        kv_lens,
        host_places,
        num_host,
        estimates,
        upper,
        scale,
        num_q_heads // num_kv_heads,
        query.stride(0),
        query.stride(1),
        bounds.ends.stride(0),
        bounds.ends.stride(1),
        bounds.cells.stride(0),
        bounds.cells.stride(1),
        block_table.stride(0),
        host_places.stride(0),
        estimates.stride(0),
        estimates.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim // 2),
        BLOCK_H=max(16, triton.next_power_of_2(num_q_heads // num_kv_heads)),
        PAGE_SIZE=page_size,
        DOT_TYPE=tl.float32 if is_wide else tl.bfloat16,
        PRECISION="tf32x3" if is_wide else "tf32",
        num_warps=4,
    )
