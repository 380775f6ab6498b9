"""Memory for what the splits of flash-decoding leave to be combined."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DecodeWorkspace:
    """Memory for the splits of a step until they are combined; the same in every step, as captured graphs need."""

    out: torch.Tensor
    """[capacity * head_dim] float32."""
    lse: torch.Tensor
    """[capacity] float32."""

    def parts(
        self, num_tokens: int, num_q_heads: int, num_splits: int, head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [num_splits, num_tokens, num_q_heads, head_dim] and [num_splits, num_q_heads, num_tokens] of the start.

        The splits of a head are adjacent in memory, since one program of the combination reads them.
        """
        num_rows = num_tokens * num_q_heads * num_splits
        assert self.lse.numel() >= num_rows, (self.lse.numel(), num_rows)
        assert self.out.numel() >= num_rows * head_dim, (self.out.numel(), num_rows * head_dim)
        out = self.out[: num_rows * head_dim].view(num_tokens, num_q_heads, num_splits, head_dim)
        lse = self.lse[:num_rows].view(num_tokens, num_q_heads, num_splits)
        return out.permute(2, 0, 1, 3), lse.permute(2, 1, 0)


def make_decode_workspace(capacity: int, head_dim: int, device: torch.device) -> DecodeWorkspace:
    """A workspace for `capacity` partial outputs: query tokens times query heads times splits."""
    out = torch.empty(capacity * head_dim, dtype=torch.float32, device=device)
    return DecodeWorkspace(out, torch.empty(capacity, dtype=torch.float32, device=device))
