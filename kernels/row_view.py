"""Caches of keys and values as rows of tokens, the form in which the tensor copy engine reads them."""

from functools import lru_cache
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


def has_row_view(*caches: torch.Tensor) -> bool:
    """Whether the tensor copy engine can read caches [num_pages, num_kv_heads, page_size, head_dim] as rows of tokens.

    It needs strides of pages and heads that are multiples of a row's, 16-byte alignment, and row numbers in 32 bits.
    """
    return all(
        cache.data_ptr() % 16 == 0 and 0 < num_rows(cache.shape, cache.stride(), cache.element_size()) < 2**31
        for cache in caches
    )


@lru_cache
def num_rows(shape: tuple[int, ...], strides: tuple[int, ...], element_size: int) -> int:
    """Rows of a token's stride from the first token of a cache to its last; 0 where it does not lie in such rows."""
    stride_page, stride_head, stride_token, _ = strides
    if stride_token <= 0 or stride_page % stride_token or stride_head % stride_token:
        return 0
    if stride_token * element_size % 16:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(shape[:3], strides[:3], strict=True))
    return last // stride_token + 1


class RowView:
    """Descriptors of caches of one form as [num_rows, head_dim]; reads outside of them give zero.

    Triton checks a descriptor when it is made, which costs as much host time as a launch: here once for all layers.
    """

    def __init__(self, like: Any) -> None:
        """Take a descriptor's class and all of it but its tensor."""
        self.kind, self.fields = type(like), dict(vars(like))
        del self.fields["base"]

    def of(self, cache: torch.Tensor) -> Any:
        """The descriptor of a cache of the same shape, strides and dtype, aligned to 16 bytes."""
        descriptor = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields, base=cache)
        return descriptor


def row_view(like: torch.Tensor, block_n: int, block_d: int) -> RowView:
    """The view in boxes of `block_n` tokens, of caches of the form of one that has a row view."""
    rows = num_rows(like.shape, like.stride(), like.element_size())
    return RowView(TensorDescriptor(like, [rows, like.shape[3]], [like.stride(2), 1], [block_n, block_d]))
