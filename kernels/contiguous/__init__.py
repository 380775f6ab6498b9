"""Attention on contiguous tensors, exact or block-sparse, with a kernel of its own for short block lists."""
