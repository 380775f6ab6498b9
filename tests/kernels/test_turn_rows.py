"""Turning all heads of some tokens, against `apply_turn`."""

from dataclasses import replace

import pytest
import torch
from farspan.kernels.rotary_turn import apply_turn, make_turn, turn_rows

from tests.kernels.string_helpers import inverse_frequencies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 32), (128, 128)])
@pytest.mark.parametrize("num_heads", [1, 7, 33])
@pytest.mark.parametrize("by_row", [False, True], ids=["one-angle", "angle-a-row"])
def test_turns_every_row(is_neox: bool, head_dim: int, rotary_dim: int, num_heads: int, by_row: bool) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    wide = torch.randn(9, num_heads, head_dim + 32, generator=generator, device=DEVICE)
    heads = wide[2:, :, :head_dim]
    turns = [
        make_turn(inverse_frequencies(rotary_dim), distance, is_neox, DEVICE, slope=0, offset=0)
        for distance in range(-500, 200, 100)
    ]
    turn = turns[0]
    if by_row:
        turn = replace(
            turn, cos=torch.stack([each.cos for each in turns]), sin=torch.stack([each.sin for each in turns])
        )
    out = torch.full_like(heads, torch.nan)
    turn_rows(heads, turn, out=out)
    expected = torch.stack([apply_turn(row, turns[at] if by_row else turn) for at, row in enumerate(heads)])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(apply_turn(heads, turn), expected, atol=1e-6, rtol=1e-6)
