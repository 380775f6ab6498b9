"""Decode that reads all pages on the device and a choice of those in host memory, each KV head its own.

Five launches, whatever the step's pages are: parts over the pages in slots, the weights of the others by their bounds,
the choice, parts over the chosen pages, and the combination. Lengths and numbers of pages are read on the device only,
so a captured graph replays for any of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.combine import combine_partials
from farspan.kernels.decode import LN_2, LOG2_E, decode_parts, host_distance
from farspan.kernels.decode_workspace import DecodeWorkspace, make_decode_workspace
from farspan.kernels.page_bounds import PageBounds, weigh_pages
from farspan.kernels.page_choice import Choice, Rule, choose_pages
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS
from farspan.kernels.tuning import SCORE_PROGRAMS_PER_SM, decode_config


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _decode_chosen_kernel(
    query_ptr,
    kv_cache_ptr,
    out_ptr,
    lse_ptr,
    block_table_ptr,
    kv_lens_ptr,
    chosen_ptr,
    num_chosen_ptr,
    scale_log2,
    num_splits,
    group_size,
    num_kv_heads,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    stride_block_table,
    stride_chosen_req,
    stride_chosen_head,
    stride_token,
    host_offset,
    stride_host_page,
    stride_host_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program: one split of the chosen pages of a request and KV head; layout of the parts as in decode."""
    STEPS: tl.constexpr = PAGE_SIZE // BLOCK_N
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    num_chosen = tl.load(num_chosen_ptr + request * num_kv_heads + kv_head)
    split_pages = (num_chosen + num_splits - 1) // num_splits
    begin = split * split_pages
    end = tl.minimum(begin + split_pages, num_chosen)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_h = offs_h < group_size
    mask_d = offs_d < HEAD_DIM
    mask_q = mask_h[:, None] & mask_d[None, :]
    head = (kv_head * group_size + offs_h).to(tl.int64)
    lse_ptrs = lse_ptr + request * stride_lse_token + head * stride_lse_head + split
    if begin >= end:
        tl.store(lse_ptrs, float("-inf"), mask=mask_h)
        return
    kv_len = tl.load(kv_lens_ptr + request)
    query_ptrs = query_ptr + request * stride_query_token + (head * stride_query_head)[:, None] + offs_d[None, :]
    query = tl.load(query_ptrs, mask=mask_q, other=0.0)
    host_ptr = kv_cache_ptr + host_offset + kv_head.to(tl.int64) * stride_host_head
    table_row_ptr = block_table_ptr + request * stride_block_table
    chosen_ptr += request * stride_chosen_req + kv_head * stride_chosen_head
    row_max = tl.full([BLOCK_H], -1.0e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    # The last page of a request, which is always read where it is in host memory, may not be full.
    num_full = num_chosen
    if tl.load(table_row_ptr + (kv_len - 1) // PAGE_SIZE) < 0:
        num_full -= 1
    last_tokens = (kv_len - 1) % PAGE_SIZE + 1
    next_block = tl.load(chosen_ptr + begin)
    for step in tl.range(begin * STEPS, end * STEPS, num_stages=NUM_STAGES):
        page = next_block.to(tl.int64)
        offset = step % STEPS * BLOCK_N + offs_n
        key_ptrs = host_ptr + page * stride_host_page + offset[:, None] * stride_token + offs_d[None, :]
        next_block = tl.load(chosen_ptr + tl.minimum((step + 1) // STEPS, end - 1))
        in_reach = offset < tl.where(step // STEPS < num_full, PAGE_SIZE, last_tokens)
        mask_kv = in_reach[:, None] & mask_d[None, :]
        key = tl.load(key_ptrs, mask=mask_kv, other=0.0)
        value = tl.load(key_ptrs + HEAD_DIM, mask=mask_kv, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        logits = tl.where(in_reach[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    has_keys = row_sum > 0
    divisor = tl.where(has_keys, row_sum, 1.0)
    out = acc / divisor[:, None]
    lse = tl.where(has_keys, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    out_ptrs = out_ptr + request * stride_out_token + (head * stride_out_head)[:, None] + split * HEAD_DIM
    tl.store(out_ptrs + offs_d[None, :], out, mask=mask_q)
    tl.store(lse_ptrs, lse, mask=mask_h)


def decode_chosen(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    scale: float,
    choice: Choice,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """Attention of one query token per request over the chosen pages in host memory, in parts.

    part_out, part_lse: as `decode_parts` takes them, of a workspace.
    """
    num_splits, num_reqs, num_q_heads, head_dim = part_out.shape
    assert kv.host_pages is not None
    assert part_out.stride(0) == head_dim
    assert part_lse.stride(0) == 1
    group_size = num_q_heads // kv.num_kv_heads
    block_h = max(16, triton.next_power_of_2(group_size))
    config = decode_config(head_dim, query.dtype, is_fp8=kv.is_fp8, num_rows=block_h)
    _decode_chosen_kernel[(num_splits, kv.num_kv_heads, num_reqs)](
        query,
        kv.pages,
        part_out,
        part_lse,
        batch.block_table,
        batch.kv_lens,
        choice.chosen,
        choice.num_chosen,
        scale * LOG2_E,
        num_splits,
        group_size,
        kv.num_kv_heads,
        query.stride(0),
        query.stride(1),
        part_out.stride(1),
        part_out.stride(2),
        part_lse.stride(2),
        part_lse.stride(1),
        batch.block_table.stride(0),
        choice.chosen.stride(0),
        choice.chosen.stride(1),
        kv.host_pages.stride(2),
        host_distance(kv),
        kv.host_pages.stride(0),
        kv.host_pages.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_H=block_h,
        BLOCK_N=min(config.keys_per_step, kv.page_size),
        PAGE_SIZE=kv.page_size,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


@dataclass(frozen=True)
class SelectionBuffers:
    """What the layers of a step share, the same memory in every step, as captured graphs need."""

    choice: Choice
    estimates: torch.Tensor
    """[max_num_reqs, num_q_heads, max_pages] float32: see `weigh_pages`."""
    upper: torch.Tensor
    """As `estimates`."""
    totals: torch.Tensor
    """[2] int64: see `choose_pages`; never reset."""

    @property
    def num_bytes(self) -> int:
        choice = self.choice
        tensors = (self.estimates, self.upper, choice.host_places, choice.chosen)
        return sum(each.numel() * each.element_size() for each in tensors)


def make_selection_buffers(
    max_num_reqs: int, num_kv_heads: int, num_q_heads: int, max_pages: int, device: torch.device
) -> SelectionBuffers:
    """Buffers for layers with at most so many cold KV heads and query heads of them."""
    choice = Choice(
        host_places=torch.zeros(max_num_reqs, max_pages, dtype=torch.int32, device=device),
        num_host=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        chosen=torch.zeros(max_num_reqs, num_kv_heads, max_pages, dtype=torch.int32, device=device),
        num_chosen=torch.zeros(max_num_reqs, num_kv_heads, dtype=torch.int32, device=device),
    )
    weights = torch.zeros(2, max_num_reqs, num_q_heads, max_pages, dtype=torch.float32, device=device)
    return SelectionBuffers(choice, weights[0], weights[1], torch.zeros(2, dtype=torch.int64, device=device))


def buffers_of(buffers: SelectionBuffers, num_reqs: int, num_kv_heads: int, num_q_heads: int) -> SelectionBuffers:
    """The part of the buffers that some requests and a layer with so many heads use."""
    choice = buffers.choice
    # Numbers of pages are adjacent for the heads that a layer has, as many as they are.
    num_chosen = choice.num_chosen.flatten()[: num_reqs * num_kv_heads].view(num_reqs, num_kv_heads)
    return SelectionBuffers(
        Choice(choice.host_places[:num_reqs], choice.num_host[:num_reqs], choice.chosen[:num_reqs], num_chosen),
        buffers.estimates[:num_reqs, :num_q_heads],
        buffers.upper[:num_reqs, :num_q_heads],
        buffers.totals,
    )


def selected_decode(
    query: torch.Tensor,
    kv: KVView,
    bounds: PageBounds,
    batch: PagedBatch,
    scale: float,
    rule: Rule,
    buffers: SelectionBuffers,
    *,
    num_splits: int,
    min_split_keys: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    left: torch.Tensor,
    workspace: DecodeWorkspace | None = None,
    num_sms: int = 1,
) -> None:
    """Attention of one query token per request over its pages on the device and those chosen by the rule.

    query, batch, scale, min_split_keys, out, lse: as in `paged_decode`; `buffers.choice` lists the host pages of the
        batch already. num_splits: of either kind of pages.
    kv: pages on the device and in host memory; bounds: of the latter.
    left: [num_q_heads, num_reqs] float32, rows contiguous: an upper bound of the LSE of what was not read, natural log;
        -inf where all was. The share that was kept is at least 1 / (1 + exp(left - lse)).
    workspace: for num_reqs * num_q_heads * 2 * num_splits partial outputs; allocated when None.
    num_sms: multiprocessors of the device.
    """
    num_reqs, num_q_heads, head_dim = query.shape
    if num_reqs == 0:
        return
    num_kv_heads = kv.num_kv_heads
    used = buffers_of(buffers, num_reqs, num_kv_heads, num_q_heads)
    if workspace is None:
        workspace = make_decode_workspace(num_reqs * num_q_heads * 2 * num_splits, head_dim, query.device)
    part_out, part_lse = workspace.parts(num_reqs, num_q_heads, 2 * num_splits, head_dim)
    on_device, of_host = slice(0, num_splits), slice(num_splits, 2 * num_splits)
    decode_parts(
        query,
        kv,
        batch,
        scale,
        part_out[on_device],
        part_lse[on_device],
        min_split_keys=min_split_keys,
        skips_host=True,
    )
    weigh_pages(
        query,
        bounds,
        batch.block_table,
        batch.kv_lens,
        used.choice.host_places,
        used.choice.num_host,
        scale,
        used.estimates,
        used.upper,
        num_programs=max(SCORE_PROGRAMS_PER_SM * num_sms // (num_kv_heads * num_reqs), 1),
    )
    choose_pages(
        used.estimates,
        used.upper,
        part_lse[on_device],
        batch.block_table,
        batch.kv_lens,
        kv.page_size,
        rule,
        used.choice,
        left,
        used.totals,
    )
    decode_chosen(query, kv, batch, scale, used.choice, part_out[of_host], part_lse[of_host])
    combine_partials(part_out, part_lse, out=out, lse=lse)
