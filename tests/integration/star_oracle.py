"""The tiny Llama of `string_oracle` under Star Attention's masks, in float64, at true positions throughout."""

from pathlib import Path
from typing import Any

import torch
from farspan.kernels import reference

from tests.integration.string_oracle import Shift, ShiftedLlama


class StarLlama(ShiftedLlama):
    """Greedy tokens of a checkpoint whose context is read in blocks; no pages, no chunks, no hosts."""

    def __init__(
        self, folder: Path, context_len: int, block_len: int, anchor_len: int, rope: dict[str, Any] | None = None
    ) -> None:
        """`context_len` tokens of every prompt are its context; a `block_len` of that length is exact attention."""
        super().__init__(folder, Shift(1, 1), rope)
        self.context_len, self.block_len, self.anchor_len = context_len, block_len, anchor_len

    def attention(self, layer: int, hidden: torch.Tensor, is_prompt: bool) -> torch.Tensor:
        head_dim = self.config["head_dim"]
        query, key, value = (
            self.linear(hidden, f"model.layers.{layer}.self_attn.{name}_proj").unflatten(1, (-1, head_dim))
            for name in "qkv"
        )
        if layer in self.cache:
            key, value = (torch.cat(pair) for pair in zip(self.cache[layer], (key, value), strict=True))
        self.cache[layer] = key, value
        row = torch.arange(len(key) - len(query), len(key))[:, None]
        column = torch.arange(len(key))
        in_block = (row // self.block_len == column // self.block_len) | (column < self.anchor_len)
        out, _ = reference.string_attention(
            query,
            key,
            value,
            self.inv_freq,
            self.magnitude**2 * head_dim**-0.5,
            # Beyond any distance: no position is shifted.
            shift=2**24,
            window=1,
            is_neox=True,
            mask=in_block | (row >= self.context_len),
        )
        return self.linear(out.flatten(1), f"model.layers.{layer}.self_attn.o_proj")
