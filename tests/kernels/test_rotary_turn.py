import pytest
import torch
from farspan.kernels.rotary_turn import apply_turn, make_string_turn

from tests.kernels.string_helpers import inverse_frequencies, unrotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [64, 32], ids=["full", "partial"])
def test_shifts_the_position_of_a_query(is_neox: bool, rotary_dim: int) -> None:
    inv_freq = inverse_frequencies(rotary_dim)
    plain = torch.randn(7, 3, 64, dtype=torch.float64)
    positions = torch.arange(1000, 1007)
    # Undoing a rotation at -p is a rotation at p.
    at_p = unrotate(plain, -positions, inv_freq, is_neox)
    at_shifted = unrotate(plain, -(positions - 500 + 20), inv_freq, is_neox)
    turn = make_string_turn(inv_freq, 500, 20, is_neox, CPU)
    assert turn.rotary_dim == rotary_dim
    torch.testing.assert_close(apply_turn(at_p, turn), at_shifted, atol=1e-6, rtol=0)
    assert torch.equal(apply_turn(at_p, turn)[..., rotary_dim:], at_p[..., rotary_dim:])


def test_large_shift_keeps_its_angle() -> None:
    inv_freq = inverse_frequencies(128)
    turn = make_string_turn(inv_freq, 1_000_000, 128, True, CPU)
    angle = inv_freq * (128 - 1_000_000)
    torch.testing.assert_close(turn.cos, angle.cos().float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(turn.sin, angle.sin().float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    query = torch.randn(5, 2, 64)
    turn = make_string_turn(inverse_frequencies(64), 300, 10, True, CPU)
    low = apply_turn(query.to(dtype), turn)
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), apply_turn(query.to(dtype).float(), turn), atol=1e-2, rtol=1e-2)
