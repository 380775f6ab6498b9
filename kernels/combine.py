"""Combine attention over disjoint key sets on a GPU: the splits of flash-decoding, and partial passes.

The CPU combines passes by `reference.combine_partials`, and within a pass adds up the pieces of `cpu_attention` one by
one. Source: FlashInfer, arXiv 2501.01005, section 2.2.
"""

import torch
import triton
import triton.language as tl
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS

# Parts that a program reads at a time.
PARTS_PER_STEP = 16
# Tokens of a head that a program adds up.
ADDED_TOKENS = 16


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _combine_kernel(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    num_parts,
    num_heads,
    stride_part_out,
    stride_part_out_token,
    stride_part_out_head,
    stride_part_lse,
    stride_part_lse_token,
    stride_part_lse_head,
    stride_out_token,
    stride_out_head,
    stride_lse_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: one head of one token, over all its parts (at most BLOCK_P), STEP of them at a time."""
    # On one axis, as the others end at 65,535.
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    part_lse_ptr += token * stride_part_lse_token + head * stride_part_lse_head
    part_out_ptr += token * stride_part_out_token + head * stride_part_out_head
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    part_lse = tl.load(part_lse_ptr + offs_p * stride_part_lse, mask=offs_p < num_parts, other=float("-inf"))
    largest = tl.max(part_lse, 0)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(part_lse - finite), 0)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, num_parts, STEP):
        step = (start + tl.arange(0, STEP)).to(tl.int64)
        step_lse = tl.load(part_lse_ptr + step * stride_part_lse, mask=step < num_parts, other=float("-inf"))
        weights = tl.exp(step_lse - finite)
        mask = (step < num_parts)[:, None] & (offs_d[None, :] < HEAD_DIM)
        partial = tl.load(part_out_ptr + (step * stride_part_out)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        # A part without keys may have written no output, so its memory may hold NaN, which no zero weight removes.
        # Masked after the load, so that the load need not wait for the LSE.
        partial = tl.where((step_lse > float("-inf"))[:, None], partial.to(tl.float32), 0.0)
        acc += tl.sum(weights[:, None] * partial, 0)
    divisor = tl.where(total > 0, total, 1.0)
    out_ptrs = out_ptr + token * stride_out_token + head * stride_out_head + offs_d
    tl.store(out_ptrs, (acc / divisor).to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    lse = tl.where(total > 0, largest + tl.log(divisor), float("-inf"))
    tl.store(lse_ptr + head * stride_lse_head + token, lse)


def combine_partials(
    part_out: torch.Tensor, part_lse: torch.Tensor, *, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention of the same queries over any number of disjoint key sets.

    part_out: [num_parts, num_tokens, num_heads, head_dim], any float dtype, any strides with a contiguous last axis.
    part_lse: [num_parts, num_heads, num_tokens] float32, natural log, any strides; -inf means "no keys", and that
        part's output is then ignored.
    out: [num_tokens, num_heads, head_dim], any float dtype, last axis contiguous; lse: [num_heads, num_tokens] float32,
        natural log, rows contiguous; neither may share memory with the parts.
    Returns out and lse; a token with no keys in any part has zeros and -inf. Source: module docstring.
    """
    num_parts, num_tokens, num_heads, head_dim = part_out.shape
    assert num_parts >= 1
    assert out.shape == part_out.shape[1:]
    assert part_lse.shape == (num_parts, num_heads, num_tokens)
    assert lse.shape == (num_heads, num_tokens)
    assert part_lse.dtype == lse.dtype == torch.float32
    assert part_out.stride(-1) == out.stride(-1) == lse.stride(-1) == 1
    if num_tokens == 0:
        return out, lse
    padded = triton.next_power_of_2(num_parts)
    _combine_kernel[(num_heads * num_tokens,)](
        part_out,
        part_lse,
        out,
        lse,
        num_parts,
        num_heads,
        part_out.stride(0),
        part_out.stride(1),
        part_out.stride(2),
        part_lse.stride(0),
        part_lse.stride(2),
        part_lse.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_P=padded,
        STEP=min(PARTS_PER_STEP, padded),
        num_warps=4,
    )
    return out, lse


@triton.jit(
    do_not_specialize=["num_tokens", "stride_sum_lse_head", "stride_part_lse_head"],
    do_not_specialize_on_alignment=["sum_lse_ptr", "part_lse_ptr"],
)
def _add_kernel(
    sum_out_ptr,
    sum_lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    num_tokens,
    num_heads,
    stride_sum_token,
    stride_sum_head,
    stride_sum_lse_head,
    stride_part_token,
    stride_part_head,
    stride_part_lse_head,
    stride_out_token,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N tokens of one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    token = (tl.program_id(0) // num_heads).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    is_token = token < num_tokens
    mask = is_token[:, None] & (offs_d[None, :] < HEAD_DIM)
    sum_lse = tl.load(sum_lse_ptr + head * stride_sum_lse_head + token, mask=is_token, other=float("-inf"))
    part_lse_ptrs = part_lse_ptr + head * stride_part_lse_head + token
    part_lse = tl.load(part_lse_ptrs, mask=is_token, other=float("-inf"))
    sum_out_ptrs = sum_out_ptr + head * stride_sum_head + token[:, None] * stride_sum_token + offs_d[None, :]
    part_out_ptrs = part_out_ptr + head * stride_part_head + token[:, None] * stride_part_token + offs_d[None, :]
    sum_out = tl.load(sum_out_ptrs, mask=mask, other=0.0).to(tl.float32)
    part_out = tl.load(part_out_ptrs, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(sum_lse, part_lse)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    sum_weight, part_weight = tl.exp(sum_lse - finite), tl.exp(part_lse - finite)
    total = sum_weight + part_weight
    divisor = tl.where(total > 0, total, 1.0)
    # What has no keys may have written no output: see `_combine_kernel`.
    sum_out = tl.where((sum_lse > float("-inf"))[:, None], sum_out, 0.0)
    part_out = tl.where((part_lse > float("-inf"))[:, None], part_out, 0.0)
    added = (sum_weight / divisor)[:, None] * sum_out + (part_weight / divisor)[:, None] * part_out
    out_ptrs = out_ptr + head * stride_out_head + token[:, None] * stride_out_token + offs_d[None, :]
    tl.store(out_ptrs, added.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(part_lse_ptrs, tl.where(total > 0, largest + tl.log(divisor), float("-inf")), mask=is_token)


def add_part(
    sum_out: torch.Tensor, sum_lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor, *, out: torch.Tensor
) -> None:
    """Combine attention of the same queries over two disjoint key sets, in one pass over memory.

    sum_out, part_out: [num_tokens, num_heads, head_dim], any float dtypes, last axis contiguous. sum_lse, part_lse:
        [num_heads, num_tokens] float32, natural log, rows contiguous; -inf means "no keys", and that output is then
        ignored.
    out: as they are; may be either of them. The LSE of both goes to `part_lse`. A token with no keys has zeros and
    -inf. Source: module docstring.
    """
    num_tokens, num_heads, head_dim = part_out.shape
    assert sum_out.shape == out.shape == part_out.shape
    assert sum_lse.shape == part_lse.shape == (num_heads, num_tokens)
    assert sum_lse.dtype == part_lse.dtype == torch.float32
    assert all(each.stride(-1) == 1 for each in (sum_out, sum_lse, part_out, part_lse, out))
    if num_tokens == 0:
        return
    _add_kernel[(num_heads * triton.cdiv(num_tokens, ADDED_TOKENS),)](
        sum_out,
        sum_lse,
        part_out,
        part_lse,
        out,
        num_tokens,
        num_heads,
        sum_out.stride(0),
        sum_out.stride(1),
        sum_lse.stride(0),
        part_out.stride(0),
        part_out.stride(1),
        part_lse.stride(0),
        out.stride(0),
        out.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=ADDED_TOKENS,
        num_warps=4,
    )
