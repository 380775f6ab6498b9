"""Contiguous tensors as rows of tokens, the form in which the tensor copy engine of Hopper reads and writes them."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


def have_token_rows(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can take tensors [batch, length, heads, head_dim] as [batch * length, heads * head_dim].

    It needs one stride of rows through the whole batch, the heads of a row adjacent, a head_dim that is a power of two,
    16-byte alignment, and row numbers in 32 bits.
    """
    for tensor in tensors:
        batch, length, heads, head_dim = tensor.shape
        stride_batch, stride_token, stride_head, _ = tensor.stride()
        if (batch > 1 and stride_batch != length * stride_token) or (heads > 1 and stride_head != head_dim):
            return False
        if stride_token < heads * head_dim or head_dim & (head_dim - 1) or batch * length >= 2**31:
            return False
        if tensor.data_ptr() % 16 or stride_token * tensor.element_size() % 16:
            return False
    return True


def token_rows(tensor: torch.Tensor, block_rows: int) -> TensorDescriptor:
    """The copy engine's view of [batch, length, heads, head_dim]: boxes of `block_rows` tokens of one head."""
    batch, length, heads, head_dim = tensor.shape
    return TensorDescriptor(
        tensor,
        shape=[batch * length, heads * head_dim],
        strides=[tensor.stride(1), 1],
        block_shape=[block_rows, head_dim],
    )
