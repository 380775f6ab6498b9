"""Pages of KV heads on their ways between slots in GPU memory, host memory and staging; tables that say where they are.

A row here is one KV head of one layer: all its pages of one pool lie in a row, page after page. The device reads and
writes host memory directly, in pieces large enough for the full rate of the bus.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from farspan.kernels.repeated_launch import RepeatedLaunch
from farspan.kernels.specialization import INDEX_POINTERS
from farspan.kernels.tuning import COPY_BLOCK_WORDS, COPY_PROGRAMS_PER_SM, COPY_WARPS, STAGING_PROGRAMS

WORD_BYTES = 4
"""Pages are copied as 32-bit words, whatever their dtype."""
TABLE_BLOCK = 1024


@dataclass(frozen=True)
class PagePools:
    """The pages of all cold heads of a rank, on the device and in host memory."""

    slots: torch.Tensor
    """[num_rows, num_slots, page_size, 2 * head_dim] on the device, contiguous."""
    host: tuple[torch.Tensor, ...]
    """Per layer with cold heads: [num_rows of the layer, num_blocks, page_size, 2 * head_dim] in host memory that the
    device can address, contiguous; the layers' rows follow each other in `slots`."""
    host_offsets: torch.Tensor
    """[num_rows] int64 on the device: words from the start of `slots` to the row's first page in host memory."""

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]

    @property
    def page_words(self) -> int:
        return self.slots.shape[2] * self.slots.shape[3] * self.slots.element_size() // WORD_BYTES


def host_offsets(slots: torch.Tensor, host: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`PagePools.host_offsets` of two pools, on the device of the slots."""
    places = [row.data_ptr() for layer in host for row in layer]
    base = slots.data_ptr()
    assert all((place - base) % WORD_BYTES == 0 for place in places)
    return torch.tensor([(place - base) // WORD_BYTES for place in places], dtype=torch.int64).to(slots.device)


@triton.jit
def _copy_page(source_ptr, target_ptr, PAGE_WORDS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for start in tl.static_range(0, PAGE_WORDS, BLOCK):
        mask = start + offs < PAGE_WORDS
        words = tl.load(source_ptr + start + offs, mask=mask, other=0)
        tl.store(target_ptr + start + offs, words, mask=mask)


@triton.jit(do_not_specialize=["num_moves"], do_not_specialize_on_alignment=["blocks_ptr", "slots_of_moves_ptr"])
def _move_pages_kernel(
    slots_ptr,
    host_offsets_ptr,
    blocks_ptr,
    slots_of_moves_ptr,
    num_moves,
    num_rows,
    num_slots,
    TO_HOST: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs share all pages of all rows; one at a time."""
    for item in range(tl.program_id(0), num_moves * num_rows, tl.num_programs(0)):
        row = (item // num_moves).to(tl.int64)
        move = item % num_moves
        block = tl.load(blocks_ptr + move).to(tl.int64)
        slot = tl.load(slots_of_moves_ptr + move).to(tl.int64)
        slot_ptr = slots_ptr + (row * num_slots + slot) * PAGE_WORDS
        host_ptr = slots_ptr + tl.load(host_offsets_ptr + row) + block * PAGE_WORDS
        if TO_HOST:
            _copy_page(slot_ptr, host_ptr, PAGE_WORDS, BLOCK)
        else:
            _copy_page(host_ptr, slot_ptr, PAGE_WORDS, BLOCK)


@triton.jit(do_not_specialize=["num_entries", "first_row", "num_rows"], do_not_specialize_on_alignment=["entries_ptr"])
def _stage_pages_kernel(
    slots_ptr,
    host_offsets_ptr,
    entries_ptr,
    staging_ptr,
    num_entries,
    first_row,
    num_rows,
    num_slots,
    stride_staging_row,
    FROM_HOST: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs share the pages of one of the two pools; entries of the other pool are left out."""
    for item in range(tl.program_id(0), num_entries * num_rows, tl.num_programs(0)):
        row = (item // num_entries).to(tl.int64)
        place = (item % num_entries).to(tl.int64)
        entry = tl.load(entries_ptr + place).to(tl.int64)
        staging_page_ptr = staging_ptr + row * stride_staging_row + place * PAGE_WORDS
        if FROM_HOST:
            if entry < 0:
                host_ptr = slots_ptr + tl.load(host_offsets_ptr + first_row + row) + (-1 - entry) * PAGE_WORDS
                _copy_page(host_ptr, staging_page_ptr, PAGE_WORDS, BLOCK)
        else:
            if entry >= 0:
                slot_ptr = slots_ptr + ((first_row + row) * num_slots + entry) * PAGE_WORDS
                _copy_page(slot_ptr, staging_page_ptr, PAGE_WORDS, BLOCK)


@triton.jit(
    do_not_specialize=["num_table_programs", "page_blocks", "num_tokens"],
    do_not_specialize_on_alignment=INDEX_POINTERS,
)
def _map_step_kernel(
    block_table_ptr,
    kv_lens_ptr,
    slot_mapping_ptr,
    slot_of_ptr,
    entries_ptr,
    mapped_ptr,
    num_table_programs,
    page_blocks,
    num_tokens,
    stride_block_table,
    stride_entries,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pages of one request, or BLOCK tokens."""
    program = tl.program_id(0)
    if program < num_table_programs:
        request = (program // page_blocks).to(tl.int64)
        offs = program % page_blocks * BLOCK + tl.arange(0, BLOCK)
        used = offs * PAGE_SIZE < tl.load(kv_lens_ptr + request)
        block = tl.load(block_table_ptr + request * stride_block_table + offs, mask=used, other=0)
        slot = tl.load(slot_of_ptr + block, mask=used, other=0)
        tl.store(entries_ptr + request * stride_entries + offs, tl.where(slot >= 0, slot, -1 - block), mask=used)
    else:
        token = (program - num_table_programs) * BLOCK + tl.arange(0, BLOCK)
        is_in_step = token < num_tokens
        place = tl.load(slot_mapping_ptr + token, mask=is_in_step, other=-1).to(tl.int64)
        is_token = place >= 0
        slot_of_token = tl.load(slot_of_ptr + place // PAGE_SIZE, mask=is_token, other=-1).to(tl.int64)
        mapped = tl.where(slot_of_token >= 0, slot_of_token * PAGE_SIZE + place % PAGE_SIZE, -1)
        tl.store(mapped_ptr + token, mapped, mask=is_in_step)


def move_pages(
    pools: PagePools, blocks: torch.Tensor, slots: torch.Tensor, *, to_host: bool, is_alone: bool = True
) -> None:
    """Copy pages of all rows between their slots and their places in host memory.

    blocks, slots: [num_moves] int32 on the device: each page's block, and its slot. is_alone: whether nothing else runs
    on the device meanwhile; otherwise few programs copy.
    """
    num_moves = len(blocks)
    if num_moves == 0:
        return
    words = pools.slots.view(torch.int32)
    num_pages = num_moves * pools.num_rows
    num_programs = num_copy_programs(pools.slots, num_pages) if is_alone else min(STAGING_PROGRAMS, num_pages)
    _move_pages_kernel[(num_programs,)](
        words,
        pools.host_offsets,
        blocks,
        slots,
        num_moves,
        pools.num_rows,
        pools.slots.shape[1],
        TO_HOST=to_host,
        PAGE_WORDS=pools.page_words,
        BLOCK=min(COPY_BLOCK_WORDS, triton.next_power_of_2(pools.page_words)),
        num_warps=COPY_WARPS,
    )


def stage_pages(
    pools: PagePools, entries: torch.Tensor, rows: slice, staging: torch.Tensor, *, from_host: bool
) -> None:
    """Copy the pages that entries name from one of the two pools to their places in `staging`.

    entries: [num_pages] int32 on the device: a slot, or -1 - block for a page in host memory; those of the other pool
        are left out.
    rows: of the pools. staging: [at least len(rows), at least num_pages, page_size, 2 * head_dim] on the device, pages
        of a row contiguous.
    """
    num_rows = rows.stop - rows.start
    assert staging.shape[0] >= num_rows
    assert staging.shape[1] >= len(entries)
    words = staging.view(torch.int32)
    limit = STAGING_PROGRAMS if from_host else num_copy_programs(staging, num_rows * len(entries))
    _stage_pages_kernel[(max(min(limit, num_rows * len(entries)), 1),)](
        pools.slots.view(torch.int32),
        pools.host_offsets,
        entries,
        words,
        len(entries),
        rows.start,
        num_rows,
        pools.slots.shape[1],
        words.stride(0),
        FROM_HOST=from_host,
        PAGE_WORDS=pools.page_words,
        BLOCK=min(COPY_BLOCK_WORDS, triton.next_power_of_2(pools.page_words)),
        num_warps=COPY_WARPS,
    )


def map_step(
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    slot_of: torch.Tensor,
    page_size: int,
    max_kv_len: int,
    entries: torch.Tensor,
    mapped: torch.Tensor,
) -> None:
    """Write where the pages of each request of a step lie, and where each of its tokens goes among the slots.

    block_table: [num_reqs, max_pages] int32, rows contiguous; kv_lens: [num_reqs] int32; slot_mapping: [num_tokens]
        int, block * page_size + offset or negative; slot_of: [num_blocks] int32, the slot of each block or -1.
    max_kv_len: upper bound of `kv_lens`, known on the host.
    entries: [at least num_reqs, at least max_pages] int32, rows contiguous: a slot, or -1 - block; what lies past a
        request's last page stays as it is.
    mapped: [at least num_tokens] int64: slot * page_size + offset, or -1 where a token is not to be written.
    """
    num_pages = min(-(-max_kv_len // page_size), block_table.shape[1])
    page_blocks = triton.cdiv(num_pages, TABLE_BLOCK)
    assert block_table.stride(1) == entries.stride(1) == 1
    strides = block_table.stride(0), entries.stride(0)
    dtypes = tuple(each.dtype for each in (block_table, kv_lens, slot_mapping))
    launch = _map_launch(len(kv_lens), page_blocks, len(slot_mapping), page_size, strides, dtypes, entries.device)
    launch(block_table, kv_lens, slot_mapping, slot_of, entries, mapped)


# Decode steps one after the other are alike, and every step waits for its tables.
@lru_cache(maxsize=64)
def _map_launch(
    num_reqs: int,
    page_blocks: int,
    num_tokens: int,
    page_size: int,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> RepeatedLaunch:
    """strides: of rows of the block table and of entries. dtypes, device: what Triton compiles for besides."""
    num_table_programs = num_reqs * page_blocks
    return RepeatedLaunch(
        _map_step_kernel,
        (num_table_programs + triton.cdiv(num_tokens, TABLE_BLOCK),),
        ("block_table_ptr", "kv_lens_ptr", "slot_mapping_ptr", "slot_of_ptr", "entries_ptr", "mapped_ptr"),
        {
            "num_table_programs": num_table_programs,
            "page_blocks": page_blocks,
            "num_tokens": num_tokens,
            "stride_block_table": strides[0],
            "stride_entries": strides[1],
            "PAGE_SIZE": page_size,
            "BLOCK": TABLE_BLOCK,
        },
    )


def num_copy_programs(tensor: torch.Tensor, num_pages: int) -> int:
    """Programs of a copy that runs alone on the device."""
    num_sms = 1
    if tensor.device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return max(min(num_pages, COPY_PROGRAMS_PER_SM * num_sms), 1)
