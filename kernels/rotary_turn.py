"""Turn already rotated queries by a constant angle: keys below a bound meet the turned query, the others the plain one.

STRING (arXiv 2410.18745) leaves the keys at their positions and gives a query two rotations. A key at distance
`d = query_pos - key_pos` below the shift S meets the query as it is; one at distance `d >= S` meets the query rotated
for position `query_pos - S + W`, so that the pair behaves as if at distance `d - S + W`. The second rotation is the
first one followed by the constant angle `(W - S) * inv_freq`, the same for every token. With slope 0 the bound is the
same for all queries, as Star Attention (arXiv 2411.17116) needs it for an anchor of a given length.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from farspan.kernels.specialization import INDEX_POINTERS, STEP_NUMBERS

HEADS_TURNED = 16
"""Heads of a token that one program of `turn_rows` turns."""


@dataclass(frozen=True)
class Turn:
    """Keys at positions below `slope * query_pos + offset` meet the query rotated by the angle of `cos` and `sin`."""

    cos: torch.Tensor
    """[rotary_dim / 2] float32: cosine of the extra angle of each pair of components; for `apply_turn` and `turn_rows`
    also [num_tokens, rotary_dim / 2], an angle for each token."""
    sin: torch.Tensor
    """Like `cos`: sine of the same angle."""
    is_neox: bool
    """True: component i pairs with i + rotary_dim / 2. False: component 2i pairs with 2i + 1."""
    slope: Literal[0, 1]
    """1: the bound moves with the query; 0: it is the same for all queries."""
    offset: int
    """In tokens."""

    @property
    def rotary_dim(self) -> int:
        """Leading components of a head that rotate; the others pass unchanged."""
        return 2 * self.cos.shape[-1]

    def bound(self, query_pos: int) -> int:
        """Keys at positions below this meet the turned query."""
        return self.slope * query_pos + self.offset

    def bounds(self, query_pos: torch.Tensor) -> torch.Tensor:
        """`bound` for a tensor of positions, of the same shape."""
        return self.slope * query_pos + self.offset

    def reaches(self, last_query_pos: int) -> bool:
        """Whether a query at or before this position meets any key turned."""
        return self.bound(last_query_pos) > 0


def make_turn(
    inv_freq: torch.Tensor,
    distance: int,
    is_neox: bool,
    device: torch.device,
    *,
    slope: Literal[0, 1],
    offset: int,
) -> Turn:
    """A turn by the rotation that `distance` positions make.

    inv_freq: [rotary_dim / 2] radians per token, float32 or float64, any device. Angles, cosines and sines are computed
        in float64: at a distance of 1e5 tokens float32 would be off by 0.004 radians.
    distance: signed, in tokens.
    slope, offset: see `Turn`.
    """
    angle = inv_freq.double().cpu() * distance
    return Turn(angle.cos().float().to(device), angle.sin().float().to(device), is_neox, slope, offset)


def make_string_turn(inv_freq: torch.Tensor, shift: int, window: int, is_neox: bool, device: torch.device) -> Turn:
    """STRING's turn: distances `d >= shift` behave as `d - shift + window`.

    inv_freq: as in `make_turn`; shift: S >= 1 tokens; window: W >= 0 tokens.
    """
    assert shift >= 1, shift
    assert window >= 0, window
    return make_turn(inv_freq, window - shift, is_neox, device, slope=1, offset=1 - shift)


def apply_turn(query: torch.Tensor, turn: Turn) -> torch.Tensor:
    """Rotate queries by the angle of `turn`.

    query: [..., head_dim], or [num_tokens, num_heads, head_dim] with an angle for each token; any float dtype. Computed
        in float32 (float64 for float64), returned in the query's dtype.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    rotary, rest = query.split([turn.rotary_dim, query.shape[-1] - turn.rotary_dim], dim=-1)
    rotary = rotary.to(dtype)
    cos, sin = turn.cos.to(dtype), turn.sin.to(dtype)
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    first, second = rotary.chunk(2, dim=-1) if turn.is_neox else (rotary[..., 0::2], rotary[..., 1::2])
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat(pair, dim=-1) if turn.is_neox else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat([turned.to(query.dtype), rest], dim=-1)


@triton.jit
def rotate_tile(
    query, query_ptrs, cos_ptr, sin_ptr, mask, HALF_ROTARY: tl.constexpr, IS_NEOX: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rotate a [rows, BLOCK_D] query tile, loaded from `query_ptrs` under `mask`, by a turn's angle.

    cos_ptr, sin_ptr: [HALF_ROTARY] float32. Components at and past 2 * HALF_ROTARY stay as they are. Computed in
    float32, returned in the tile's dtype.
    """
    offs_d = tl.arange(0, BLOCK_D)
    is_rotated = offs_d < 2 * HALF_ROTARY
    if IS_NEOX:
        is_first = offs_d < HALF_ROTARY
        pair = offs_d % HALF_ROTARY
        to_partner = tl.where(is_first, HALF_ROTARY, -HALF_ROTARY)
    else:
        is_first = offs_d % 2 == 0
        pair = offs_d // 2
        to_partner = tl.where(is_first, 1, -1)
    cos = tl.load(cos_ptr + pair, mask=is_rotated, other=1.0)
    sin = tl.load(sin_ptr + pair, mask=is_rotated, other=0.0)
    signed_sin = tl.where(is_first, -sin, sin)
    partner = tl.load(query_ptrs + tl.where(is_rotated, to_partner, 0)[None, :], mask=mask, other=0.0)
    rotated = query.to(tl.float32) * cos[None, :] + partner.to(tl.float32) * signed_sin[None, :]
    return rotated.to(query.dtype)


@triton.jit(do_not_specialize=STEP_NUMBERS, do_not_specialize_on_alignment=INDEX_POINTERS)
def _turn_rows_kernel(
    heads_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    num_heads,
    stride_token,
    stride_head,
    stride_out_token,
    stride_out_head,
    stride_angle,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_H heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (head < num_heads)[:, None] & (offs_d < HEAD_DIM)[None, :]
    pointers = heads_ptr + token * stride_token + (head * stride_head)[:, None] + offs_d[None, :]
    tile = tl.load(pointers, mask=mask, other=0.0)
    angle = token * stride_angle
    turned = rotate_tile(tile, pointers, cos_ptr + angle, sin_ptr + angle, mask, HALF_ROTARY, IS_NEOX, BLOCK_D)
    out = out_ptr + token * stride_out_token + (head * stride_out_head)[:, None] + offs_d[None, :]
    tl.store(out, turned, mask=mask)


def turn_rows(heads: torch.Tensor, turn: Turn, *, out: torch.Tensor) -> None:
    """Write `apply_turn(heads, turn)` into `out`.

    heads, out: [num_tokens, num_heads, head_dim], the last axis contiguous; they share no memory.
    """
    num_tokens, num_heads, head_dim = heads.shape
    assert heads.shape == out.shape
    assert heads.stride(-1) == out.stride(-1) == turn.cos.stride(-1) == turn.sin.stride(-1) == 1
    if num_tokens == 0:
        return
    _turn_rows_kernel[(num_tokens, triton.cdiv(num_heads, HEADS_TURNED))](
        heads,
        out,
        turn.cos,
        turn.sin,
        num_heads,
        heads.stride(0),
        heads.stride(1),
        out.stride(0),
        out.stride(1),
        turn.cos.stride(0) if turn.cos.dim() == 2 else 0,
        HEAD_DIM=head_dim,
        BLOCK_H=HEADS_TURNED,
        HALF_ROTARY=turn.rotary_dim // 2,
        IS_NEOX=turn.is_neox,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
