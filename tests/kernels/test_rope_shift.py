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
    shift = make_string_turn(inv_freq, 500, 20, is_neox, CPU)
    assert shift.rotary_dim == rotary_dim
    torch.testing.assert_close(apply_turn(at_p, shift), at_shifted, atol=1e-6, rtol=0)
    assert torch.equal(apply_turn(at_p, shift)[..., rotary_dim:], at_p[..., rotary_dim:])


def test_large_shift_keeps_its_angle() -> None:
    inv_freq = inverse_frequencies(128)
    shift = make_string_turn(inv_freq, 1_000_000, 128, True, CPU)
    angle = inv_freq * (128 - 1_000_000)
    torch.testing.assert_close(shift.cos, angle.cos().float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(shift.sin, angle.sin().float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    query = torch.randn(5, 2, 64)
    shift = make_string_turn(inverse_frequencies(64), 300, 10, True, CPU)
    low = apply_turn(query.to(dtype), shift)
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), apply_turn(query.to(dtype).float(), shift), atol=1e-2, rtol=1e-2)
