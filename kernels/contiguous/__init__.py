"""Attention on contiguous tensors, exact or block-sparse, with a separate kernel for short block lists."""
