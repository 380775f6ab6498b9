"""Which pages in host memory a decode reads: for each KV head the fewest whose weights reach a share of the mass.

Pages are read in the order of their largest share of any query head of the group. The least share that is read is found
by halving an interval, so that a fixed launch serves any number of pages.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from farspan.kernels.tuning import SELECT_RECENT_TOKENS, SELECT_STEPS, SELECT_TILE

TABLE_BLOCK = 1024
LEAST_SHARE = tl.constexpr(-46.0)
"""Natural log: pages with less of every head's mass are left out if any is."""
MOST_SHARE = tl.constexpr(18.0)
ALWAYS = tl.constexpr(1.0e30)
"""The share by which a page is ordered that is read whatever it weighs."""


@dataclass(frozen=True)
class Rule:
    """What a choice must keep."""

    coverage: float
    """Share of the attention mass of every query head, in (0, 1]; 1 reads every page."""
    by_bounds: bool = False
    """Whether the share is certain; else it is that of the estimates."""


@dataclass(frozen=True)
class Choice:
    """The pages in host memory of a step's requests, and which of them its decode reads."""

    host_places: torch.Tensor
    """[num_reqs, max_pages] int32: places in a request's row of the block table, ascending."""
    num_host: torch.Tensor
    """[num_reqs] int32."""
    chosen: torch.Tensor
    """[num_reqs, num_kv_heads, max_pages] int32: blocks, in the order of the block table."""
    num_chosen: torch.Tensor
    """[num_reqs, num_kv_heads] int32."""


@triton.jit(do_not_specialize_on_alignment=INDEX_POINTERS)
def _list_host_pages_kernel(
    block_table_ptr,
    kv_lens_ptr,
    host_places_ptr,
    num_host_ptr,
    stride_block_table,
    stride_host,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one request."""
    request = tl.program_id(0).to(tl.int64)
    num_pages = (tl.load(kv_lens_ptr + request) + PAGE_SIZE - 1) // PAGE_SIZE
    count = 0
    for first in range(0, num_pages, BLOCK):
        place = first + tl.arange(0, BLOCK)
        entry = tl.load(block_table_ptr + request * stride_block_table + place, mask=place < num_pages, other=0)
        on_host = (entry < 0).to(tl.int32)
        index = count + tl.cumsum(on_host, 0) - 1
        tl.store(host_places_ptr + request * stride_host + index, place, mask=on_host > 0)
        count += tl.sum(on_host, 0)
    tl.store(num_host_ptr + request, count)


def list_host_pages(
    block_table: torch.Tensor, kv_lens: torch.Tensor, page_size: int, host_places: torch.Tensor, num_host: torch.Tensor
) -> None:
    """Write which pages of each request lie in host memory; once a step, for all layers.

    block_table: [num_reqs, max_pages] int32, entries as `KVView.host_pages` has them; kv_lens: [num_reqs] int32.
    host_places, num_host: see `Choice`; written for the requests of `kv_lens`.
    """
    _list_host_pages_kernel[(len(kv_lens),)](
        block_table,
        kv_lens,
        host_places,
        num_host,
        block_table.stride(0),
        host_places.stride(0),
        PAGE_SIZE=page_size,
        BLOCK=TABLE_BLOCK,
        num_warps=4,
    )


@triton.jit
def _shares_of(
    estimates_ptr, upper_ptr, places_ptr, first, num_host, recent_place, total, weight_offsets, mask_h,
    BY_BOUNDS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of pages [first, first + BLOCK_P): the most and the least that they hold of each head's total, natural log, and
    the share that orders them.
    """
    index = first + tl.arange(0, BLOCK_P)
    is_page = index < num_host
    mask = mask_h[:, None] & is_page[None, :]
    estimate = tl.load(estimates_ptr + weight_offsets[:, None] + index[None, :], mask=mask, other=float("-inf"))
    most = estimate - total[:, None]
    least = most
    if BY_BOUNDS:
        upper = tl.load(upper_ptr + weight_offsets[:, None] + index[None, :], mask=mask, other=0.0)
        error = tl.where(mask, upper - estimate, 0.0)
        most, least = most + error, least - error
    order = tl.max(most, 0)
    place = tl.load(places_ptr + index, mask=is_page, other=-1)
    order = tl.where(is_page & ((place == 0) | (place >= recent_place)), ALWAYS, order)
    return index, is_page, most, least, order


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _choose_pages_kernel(
    estimates_ptr,
    upper_ptr,
    part_lse_ptr,
    block_table_ptr,
    kv_lens_ptr,
    host_places_ptr,
    num_host_ptr,
    chosen_ptr,
    num_chosen_ptr,
    left_ptr,
    totals_ptr,
    coverage,
    num_parts,
    group_size,
    num_kv_heads,
    stride_weight_req,
    stride_weight_head,
    stride_part_lse,
    stride_part_lse_token,
    stride_part_lse_head,
    stride_block_table,
    stride_host,
    stride_chosen_req,
    stride_chosen_head,
    stride_left_head,
    PAGE_SIZE: tl.constexpr,
    RECENT: tl.constexpr,
    BY_BOUNDS: tl.constexpr,
    READS_ALL: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """One program: one request and KV head."""
    kv_head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_lens_ptr + request)
    # Rows that pad a captured graph have no keys, whatever was listed for them before.
    num_host = tl.load(num_host_ptr + request, mask=kv_len > 0, other=0)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < group_size
    head = (kv_head * group_size + offs_h).to(tl.int64)
    left_ptrs = left_ptr + head * stride_left_head + request
    num_chosen_ptr += request * num_kv_heads + kv_head
    if num_host == 0:
        tl.store(num_chosen_ptr, 0)
        tl.store(left_ptrs, tl.full([BLOCK_H], float("-inf"), tl.float32), mask=mask_h)
        return
    weight_offsets = request * stride_weight_req + head * stride_weight_head
    places_ptr = host_places_ptr + request * stride_host
    recent_place = tl.maximum(kv_len - RECENT, 0) // PAGE_SIZE

    # What is read anyway: the parts over pages in slots.
    offs_s = tl.arange(0, BLOCK_PARTS)
    part_ptrs = part_lse_ptr + request * stride_part_lse_token + (head * stride_part_lse_head)[:, None]
    in_parts = mask_h[:, None] & (offs_s < num_parts)[None, :]
    parts = tl.load(part_ptrs + offs_s[None, :] * stride_part_lse, mask=in_parts, other=float("-inf"))
    largest = tl.maximum(tl.max(parts, 1), -1.0e30)
    mass = tl.sum(tl.exp(parts - largest[:, None]), 1)
    held_lse = tl.where(mass > 0, largest + tl.log(tl.maximum(mass, 1.0e-37)), -1.0e30)
    total, mass = held_lse, tl.full([BLOCK_H], 1.0, tl.float32)
    for first in range(0, num_host, BLOCK_P):
        index = first + tl.arange(0, BLOCK_P)
        mask = mask_h[:, None] & (index < num_host)[None, :]
        estimate = tl.load(estimates_ptr + weight_offsets[:, None] + index[None, :], mask=mask, other=float("-inf"))
        new_total = tl.maximum(total, tl.max(estimate, 1))
        mass = mass * tl.exp(total - new_total) + tl.sum(tl.exp(estimate - new_total[:, None]), 1)
        total = new_total
    total += tl.log(mass)
    held = tl.exp(held_lse - total)

    # All pages with an order of at least `enough` reach the coverage; those of at least `short` do not.
    enough = tl.full((), LEAST_SHARE, tl.float32)
    short = tl.full((), MOST_SHARE, tl.float32)
    if READS_ALL:
        enough -= 1.0e30
    else:
        for _ in range(NUM_STEPS):
            middle = 0.5 * (enough + short)
            unread = tl.zeros([BLOCK_H], tl.float32)
            read = held
            for first in range(0, num_host, BLOCK_P):
                index, is_page, most, least, order = _shares_of(
                    estimates_ptr, upper_ptr, places_ptr, first, num_host, recent_place, total, weight_offsets, mask_h,
                    BY_BOUNDS, BLOCK_P,
                )  # fmt: skip
                is_read = (order >= middle)[None, :]
                unread += tl.sum(tl.where(is_read, 0.0, tl.exp(tl.minimum(most, 80.0))), 1)
                read += tl.sum(tl.where(is_read, tl.exp(tl.minimum(least, 80.0)), 0.0), 1)
            misses = tl.sum((mask_h & (unread * coverage > read * (1.0 - coverage))).to(tl.int32), 0)
            enough = tl.where(misses == 0, middle, enough)
            short = tl.where(misses == 0, short, middle)

    chosen_ptr += request * stride_chosen_req + kv_head * stride_chosen_head
    count = num_host * 0
    left_most = tl.full([BLOCK_H], -1.0e30, tl.float32)
    left_mass = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, num_host, BLOCK_P):
        index, is_page, most, least, order = _shares_of(
            estimates_ptr, upper_ptr, places_ptr, first, num_host, recent_place, total, weight_offsets, mask_h,
            BY_BOUNDS, BLOCK_P,
        )  # fmt: skip
        is_read = (order >= enough) & is_page
        target = count + tl.cumsum(is_read.to(tl.int32), 0) - 1
        place = tl.load(places_ptr + index, mask=is_page, other=0)
        entry = tl.load(block_table_ptr + request * stride_block_table + place, mask=is_page, other=0)
        tl.store(chosen_ptr + target, -1 - entry, mask=is_read)
        count += tl.sum(is_read.to(tl.int32), 0)
        is_left = mask_h[:, None] & (is_page & (order < enough))[None, :]
        upper = tl.load(upper_ptr + weight_offsets[:, None] + index[None, :], mask=is_left, other=float("-inf"))
        new_most = tl.maximum(left_most, tl.max(upper, 1))
        left_mass = left_mass * tl.exp(left_most - new_most) + tl.sum(tl.exp(upper - new_most[:, None]), 1)
        left_most = new_most
    tl.store(num_chosen_ptr, count)
    has_left = left_mass > 0
    left = tl.where(has_left, left_most + tl.log(tl.where(has_left, left_mass, 1.0)), float("-inf"))
    tl.store(left_ptrs, left, mask=mask_h)
    tl.atomic_add(totals_ptr, count.to(tl.int64))
    tl.atomic_add(totals_ptr + 1, num_host.to(tl.int64))


def choose_pages(
    estimates: torch.Tensor,
    upper: torch.Tensor,
    part_lse: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    page_size: int,
    rule: Rule,
    choice: Choice,
    left: torch.Tensor,
    totals: torch.Tensor,
) -> None:
    """Choose the pages in host memory that a decode reads, and bound what the others hold.

    estimates, upper: as `weigh_pages` writes them, of the pages of `choice.host_places`.
    part_lse: [num_parts, num_q_heads, num_reqs] float32, natural log: of keys that are read anyway, in parts.
    block_table, kv_lens: as `list_host_pages` takes them. choice: `chosen` and `num_chosen` are written.
    left: [num_q_heads, num_reqs] float32, rows contiguous: upper bound of the log-sum-exp of the logits of what is not
        read, natural log; -inf where all is.
    totals: [2] int64: the pages read, and those in host memory, are added, once for every KV head.
    """
    num_parts, num_q_heads, num_reqs = part_lse.shape
    num_kv_heads = choice.num_chosen.shape[1]
    assert left.stride(1) == 1
    assert choice.num_chosen.is_contiguous()
    block_h = triton.next_power_of_2(num_q_heads // num_kv_heads)
    _choose_pages_kernel[(num_kv_heads, num_reqs)](
        estimates,
        upper,
        part_lse,
        block_table,
        kv_lens,
        choice.host_places,
        choice.num_host,
        choice.chosen,
        choice.num_chosen,
        left,
        totals,
        rule.coverage,
        num_parts,
        num_q_heads // num_kv_heads,
        num_kv_heads,
        estimates.stride(0),
        estimates.stride(1),
        part_lse.stride(0),
        part_lse.stride(2),
        part_lse.stride(1),
        block_table.stride(0),
        choice.host_places.stride(0),
        choice.chosen.stride(0),
        choice.chosen.stride(1),
        left.stride(0),
        PAGE_SIZE=page_size,
        RECENT=SELECT_RECENT_TOKENS,
        BY_BOUNDS=rule.by_bounds,
        READS_ALL=rule.coverage >= 1,
        NUM_STEPS=SELECT_STEPS,
        BLOCK_H=block_h,
        BLOCK_P=min(max(SELECT_TILE // block_h, 16), TABLE_BLOCK),
        BLOCK_PARTS=triton.next_power_of_2(num_parts),
        num_warps=8,
    )
