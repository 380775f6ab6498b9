import itertools
import math
from typing import Any

import pytest
import torch
from farspan.kernels import reference
from farspan.kernels.combine import add_part, combine_partials

from tests.kernels.helpers import assert_attention_close

Partial = tuple[torch.Tensor, torch.Tensor]


def combined(*parts: Partial) -> Partial:
    part_out, part_lse = (torch.stack(each) for each in zip(*parts, strict=True))
    out, lse = torch.full_like(part_out[0], float("nan")), torch.full_like(part_lse[0], float("nan"))
    return combine_partials(part_out, part_lse, out=out, lse=lse)


def expected_of(*parts: Partial) -> Partial:
    return reference.combine_partials(*(torch.stack(each) for each in zip(*parts, strict=True)))


def draw_partial(num_tokens: int, num_heads: int, head_dim: int, device: torch.device) -> Partial:
    """A partial result with extreme LSEs and some tokens without keys."""
    out = torch.randn(num_tokens, num_heads, head_dim)
    lse = torch.randn(num_heads, num_tokens) * 60
    empty = torch.rand(num_heads, num_tokens) < 0.2
    lse[empty] = float("-inf")
    out[empty.T] = 0.0
    return out.to(device), lse.to(device)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_dim"), [(1, 1, 64), (63, 3, 96), (17, 2, 256)], ids=["t1", "t63", "t17"]
)
def test_matches_the_reference(device: torch.device, num_tokens: int, num_heads: int, head_dim: int) -> None:
    a = draw_partial(num_tokens, num_heads, head_dim, device)
    b = draw_partial(num_tokens, num_heads, head_dim, device)
    assert_attention_close(*combined(a, b), *expected_of(a, b), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_dim"), [(1, 1, 64), (63, 3, 96), (17, 2, 256)], ids=["t1", "t63", "t17"]
)
@pytest.mark.parametrize("target", ["sum", "part", "other"])
def test_a_part_is_added(
    device: torch.device, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, target: str
) -> None:
    """The part is some heads of more, in the model's dtype; what has no keys holds NaN."""
    a = draw_partial(num_tokens, num_heads, head_dim, device)
    b = draw_partial(num_tokens, num_heads + 2, head_dim, device)
    part_out, part_lse = b[0].to(dtype)[:, 1:-1], b[1][1:-1]
    expected_out, expected_lse = expected_of(a, (part_out.float(), part_lse))
    for out, lse in (a, (part_out, part_lse)):
        out[(lse == float("-inf")).T] = float("nan")
    out = {"sum": a[0], "part": part_out, "other": torch.full_like(part_out, float("nan"))}[target]
    add_part(*a, part_out, part_lse, out=out)
    assert_attention_close(out.to(dtype), part_lse, expected_out.to(dtype), expected_lse, dtype)


def test_order_does_not_matter(device: torch.device) -> None:
    a, b = (draw_partial(33, 2, 64, device) for _ in range(2))
    # Not equal bit for bit: the compiler may fuse one of the two products with the sum.
    assert_attention_close(*combined(a, b), *combined(b, a), torch.float32)


def test_grouping_does_not_matter(device: torch.device) -> None:
    a, b, c = (draw_partial(33, 2, 64, device) for _ in range(3))
    whole = combined(a, b, c)
    assert_attention_close(*combined(combined(a, b), c), *whole, torch.float32)
    assert_attention_close(*combined(a, combined(b, c)), *whole, torch.float32)


def test_a_side_without_keys_changes_nothing(device: torch.device) -> None:
    out, lse = draw_partial(20, 2, 64, device)
    nothing = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    for merged in (combined((out, lse), nothing), combined(nothing, (out, lse)), combined((out, lse))):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)


def test_two_sides_without_keys_give_zero(device: torch.device) -> None:
    nothing = torch.full((4, 2, 64), float("nan"), device=device), torch.full((2, 4), float("-inf"), device=device)
    out, lse = combined(nothing, nothing)
    assert not bool(out.any())
    assert bool(torch.isneginf(lse).all())


@pytest.mark.parametrize("cuts", [(1,), (64,), (30, 31, 150)], ids=str)
def test_any_split_of_the_keys_equals_the_whole(device: torch.device, cuts: tuple[int, ...]) -> None:
    num_tokens, num_heads, head_dim, kv_len = 5, 4, 64, 200
    query = torch.randn(num_tokens, num_heads, head_dim, device=device)
    key, value = torch.randn(2, kv_len, 2, head_dim, device=device)
    # The first query sees only one key, so that most parts have none for it.
    mask = torch.rand(num_tokens, kv_len, device=device) < 0.7
    mask[0] = False
    mask[0, 63] = True

    def piece(first: int, end: int) -> Partial:
        return reference.attend(query, key[first:end], value[first:end], head_dim**-0.5, mask[:, first:end])

    bounds = [0, *cuts, kv_len]
    merged = combined(*(piece(first, end) for first, end in itertools.pairwise(bounds)))
    assert_attention_close(*merged, *piece(0, kv_len), torch.float32)


def test_rounds_to_the_dtype_of_the_output(device: torch.device) -> None:
    a, b = (draw_partial(9, 2, 64, device) for _ in range(2))
    target, lse = torch.empty(9, 2, 64, dtype=torch.float16, device=device), torch.empty_like(a[1])
    combine_partials(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]]), out=target, lse=lse)
    assert_attention_close(target, lse, *expected_of(a, b), torch.float16)


@pytest.mark.parametrize("num_parts", [1, 2, 17, 100])
def test_any_number_of_parts(device: torch.device, num_parts: int) -> None:
    parts = [draw_partial(5, 2, 64, device) for _ in range(num_parts)]
    assert_attention_close(*combined(*parts), *expected_of(*parts), torch.float32)


def test_a_grid_holds_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first axis of a grid may have more than 65,535 programs."""
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr("farspan.kernels.combine._combine_kernel", Kernel())
    out, lse = torch.empty(1, 2, 16).expand(70_000, 2, 16), torch.empty(2, 70_000)
    combine_partials(out[None], lse[None], out=out, lse=lse)
    ((programs, *others),) = grids
    assert programs * math.prod(others) == 140_000
    assert all(axis <= 65_535 for axis in others)
