"""Shifted positions on the paged batches of the kernel tests.

`make_batch` draws queries and keys as the cache holds them: already rotated. The oracle needs them unrotated, so they
are rotated back, in float64.
"""

from dataclasses import dataclass

import torch
from farspan.kernels import reference
from farspan.kernels.rotary_turn import Turn, make_string_turn
from farspan.kernels.tiles import BlockLists, PrefillTiles

from tests.kernels.helpers import Inputs


@dataclass(frozen=True)
class Shift(Turn):
    """A turn of STRING that remembers what it was made from."""

    shift: int
    window: int


def make_shift(inv_freq: torch.Tensor, shift: int, window: int, is_neox: bool, device: torch.device) -> Shift:
    """Arguments as in `make_string_turn`."""
    return Shift(**vars(make_string_turn(inv_freq, shift, window, is_neox, device)), shift=shift, window=window)


def inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> torch.Tensor:
    """[rotary_dim / 2] float64 radians per token."""
    return base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def unrotate(heads: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Undo the rotation of [num_tokens, num_heads, head_dim] at `positions` [num_tokens]; returns float64."""
    result = heads.double().clone()
    half = len(inv_freq)
    first = slice(0, half) if is_neox else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if is_neox else slice(1, 2 * half, 2)
    angle = (positions[:, None] * inv_freq)[:, None]
    a, b = heads[..., first].double(), heads[..., second].double()
    result[..., first] = a * angle.cos() + b * angle.sin()
    result[..., second] = b * angle.cos() - a * angle.sin()
    return result


def string_reference(
    batch: Inputs,
    turn: Shift,
    inv_freq: torch.Tensor,
    tiles: PrefillTiles | None = None,
    block_lists: BlockLists | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [num_tokens, num_heads, head_dim] and lse [num_heads, num_tokens] of the oracle, float32, on the CPU."""
    outs, lses = [], []
    starts, query = batch.query_start_loc.tolist(), batch.query.cpu()
    num_heads = query.shape[1]
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        chunk = query[starts[request] : starts[request + 1]]
        key, value = reference.gather_kv(batch.kv_cache.cpu(), batch.block_table[request].cpu(), seq_len, torch.float64)
        kv_pos = torch.arange(seq_len)
        query_pos = kv_pos[seq_len - len(chunk) :]
        mask = None
        if block_lists is not None:
            assert tiles is not None
            mask = reference.listed_keys(tiles, block_lists, request, num_heads, query_pos, kv_pos)
        out, lse = reference.string_attention(
            unrotate(chunk, query_pos, inv_freq, turn.is_neox),
            unrotate(key, kv_pos, inv_freq, turn.is_neox),
            value,
            inv_freq,
            batch.scale,
            shift=turn.shift,
            window=turn.window,
            is_neox=turn.is_neox,
            mask=mask,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs).float(), torch.cat(lses, dim=1).float()
