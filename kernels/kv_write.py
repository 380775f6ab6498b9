"""Write the keys and values of a step's new tokens into the pages of the KV cache."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from farspan.kernels.batch import FP8, FP8_MAX
from farspan.kernels.repeated_launch import RepeatedLaunch
from farspan.kernels.specialization import INDEX_POINTERS


@triton.jit(do_not_specialize_on_alignment=INDEX_POINTERS)
def _write_kv_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slot_mapping_ptr,
    key_divisor,
    value_divisor,
    page_size,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_page,
    stride_head,
    stride_token,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    """One program: all heads of one token. FP8_MAX: 0 where the cache is not float8, and nothing is divided."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot < 0:
        return
    offs_h = tl.arange(0, BLOCK_H)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_h < NUM_KV_HEADS) & (offs_d < HEAD_DIM)
    key = tl.load(key_ptr + token * stride_key_token + offs_h * stride_key_head + offs_d, mask=mask, other=0.0)
    value = tl.load(value_ptr + token * stride_value_token + offs_h * stride_value_head + offs_d, mask=mask, other=0.0)
    if FP8_MAX > 0:
        # float8 has no infinity: what is larger would become NaN.
        key = tl.minimum(tl.maximum(key.to(tl.float32) / key_divisor, -FP8_MAX), FP8_MAX)
        value = tl.minimum(tl.maximum(value.to(tl.float32) / value_divisor, -FP8_MAX), FP8_MAX)
    base = cache_ptr + slot // page_size * stride_page + slot % page_size * stride_token
    pointers = base + offs_h.to(tl.int64) * stride_head + offs_d
    tl.store(pointers, key.to(cache_ptr.dtype.element_ty), mask=mask)
    tl.store(pointers + HEAD_DIM, value.to(cache_ptr.dtype.element_ty), mask=mask)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write new keys and values into their slots; the rest of the cache stays as it is.

    key, value: [num_tokens or more, num_kv_heads, head_dim], any strides with a contiguous last axis; rows past
        `slot_mapping` are ignored.
    kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], a token's key and value side by side; any strides
        with a contiguous last axis. Numbers are cast to its dtype; to float8_e4m3fn as the nearest one that it has.
    slot_mapping: [num_tokens] int32 or int64: page * page_size + offset of each token; a negative slot is skipped.
    key_scale, value_scale: what keys and values are divided by first, above 0; only for float8.
    """
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    assert key.shape[0] >= num_tokens
    assert slot_mapping.is_contiguous()
    forms = tuple((each.shape[1:], each.stride(), each.dtype) for each in (key, value, kv_cache))
    assert key_scale == value_scale == 1.0 or kv_cache.dtype == FP8
    launch = _launch(num_tokens, *forms, slot_mapping.dtype, key.device)
    divisors = (key_scale, value_scale) if kv_cache.dtype == FP8 else (None, None)
    launch(key, value, kv_cache, slot_mapping, *divisors)


Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""A tensor's sizes but the first, its strides and its dtype."""


# The layers of a step, and decode steps one after the other, write alike.
@lru_cache(maxsize=64)
def _launch(
    num_tokens: int, key: Form, value: Form, cache: Form, slot_dtype: torch.dtype, device: torch.device
) -> RepeatedLaunch:
    num_kv_heads, head_dim = key[0]
    assert key[0] == value[0]
    assert cache[0][0] == num_kv_heads
    assert cache[0][2] == 2 * head_dim
    assert key[1][-1] == value[1][-1] == cache[1][-1] == 1
    return RepeatedLaunch(
        _write_kv_kernel,
        (num_tokens,),
        ("key_ptr", "value_ptr", "cache_ptr", "slot_mapping_ptr", "key_divisor", "value_divisor"),
        {
            "page_size": cache[0][1],
            "stride_key_token": key[1][0],
            "stride_key_head": key[1][1],
            "stride_value_token": value[1][0],
            "stride_value_head": value[1][1],
            "stride_page": cache[1][0],
            "stride_head": cache[1][1],
            "stride_token": cache[1][2],
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_H": triton.next_power_of_2(num_kv_heads),
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "FP8_MAX": FP8_MAX if cache[2] == FP8 else 0.0,
        },
        num_warps=4,
    )
