"""Combine attention over disjoint key sets; every (out, LSE) pair in the project is combined here."""

import torch
import triton
import triton.language as tl
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS

BLOCK_T = 16


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _merge_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_tokens,
    stride_a_token,
    stride_a_head,
    stride_b_token,
    stride_b_head,
    stride_out_token,
    stride_out_head,
    stride_lse_a,
    stride_lse_b,
    stride_lse,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: BLOCK_T tokens of one head."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_t = token < num_tokens
    mask = mask_t[:, None] & (offs_d < HEAD_DIM)
    lse_a = tl.load(lse_a_ptr + head * stride_lse_a + token, mask=mask_t, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + head * stride_lse_b + token, mask=mask_t, other=float("-inf"))
    out_a = tl.load(out_a_ptr + (token * stride_a_token + head * stride_a_head)[:, None] + offs_d, mask=mask, other=0.0)
    out_b = tl.load(out_b_ptr + (token * stride_b_token + head * stride_b_head)[:, None] + offs_d, mask=mask, other=0.0)
    # Relative to the larger LSE nothing overflows; where neither side has keys both weights have to be zero.
    largest = tl.maximum(lse_a, lse_b)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a = tl.exp(lse_a - finite)
    weight_b = tl.exp(lse_b - finite)
    total = weight_a + weight_b
    divisor = tl.where(total > 0.0, total, 1.0)
    # A side without keys may hold anything, NaN included.
    out_a = tl.where((weight_a > 0.0)[:, None], out_a.to(tl.float32), 0.0)
    out_b = tl.where((weight_b > 0.0)[:, None], out_b.to(tl.float32), 0.0)
    out = out_a * (weight_a / divisor)[:, None] + out_b * (weight_b / divisor)[:, None]
    out_ptrs = out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + offs_d
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(total > 0.0, finite + tl.log(divisor), float("-inf"))
    tl.store(lse_ptr + head * stride_lse + token, lse, mask=mask_t)


def merge_partials(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two disjoint key sets.

    out_a, out_b: [num_tokens, num_heads, head_dim], any float dtype each, the last axis contiguous.
    lse_a, lse_b: [num_heads, num_tokens] float32, natural log, rows contiguous; -inf means "no keys", and that side's
        output is then not looked at.
    out, lse: buffers to write into, which may be those of either side; new ones when None, `out` in the dtype of out_a.
    Returns the same shapes; a token with no keys on either side yields zeros and -inf.
    Source: FlashInfer, arXiv 2501.01005, section 2.2.
    """
    num_tokens, num_heads, head_dim = out_a.shape
    if out is None:
        out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    if lse is None:
        lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    assert out_a.shape == out_b.shape == out.shape
    assert lse_a.shape == lse_b.shape == lse.shape == (num_heads, num_tokens)
    assert lse_a.dtype == lse_b.dtype == lse.dtype == torch.float32
    assert out_a.stride(-1) == out_b.stride(-1) == out.stride(-1) == 1
    assert lse_a.stride(-1) == lse_b.stride(-1) == lse.stride(-1) == 1
    if num_tokens == 0:
        return out, lse
    _merge_kernel[(triton.cdiv(num_tokens, BLOCK_T), num_heads)](
        out_a,
        lse_a,
        out_b,
        lse_b,
        out,
        lse,
        num_tokens,
        out_a.stride(0),
        out_a.stride(1),
        out_b.stride(0),
        out_b.stride(1),
        out.stride(0),
        out.stride(1),
        lse_a.stride(0),
        lse_b.stride(0),
        lse.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )
    return out, lse
