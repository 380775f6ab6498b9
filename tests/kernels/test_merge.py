import itertools

import pytest
import torch
from farspan.kernels import reference
from farspan.kernels.merge import merge_partials

from tests.kernels.helpers import assert_attention_close

Partial = tuple[torch.Tensor, torch.Tensor]


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
    assert_attention_close(*merge_partials(*a, *b), *reference.merge_partials(*a, *b), torch.float32)


def test_order_does_not_matter(device: torch.device) -> None:
    a, b = (draw_partial(33, 2, 64, device) for _ in range(2))
    # Not bit for bit: a compiler fuses one of the two products into the sum.
    assert_attention_close(*merge_partials(*a, *b), *merge_partials(*b, *a), torch.float32)


def test_grouping_does_not_matter(device: torch.device) -> None:
    a, b, c = (draw_partial(33, 2, 64, device) for _ in range(3))
    left = merge_partials(*merge_partials(*a, *b), *c)
    right = merge_partials(*a, *merge_partials(*b, *c))
    assert_attention_close(*left, *right, torch.float32)


def test_a_side_without_keys_changes_nothing(device: torch.device) -> None:
    out, lse = draw_partial(20, 2, 64, device)
    nothing = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    for merged in (merge_partials(out, lse, *nothing), merge_partials(*nothing, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)


def test_two_sides_without_keys_give_zero(device: torch.device) -> None:
    nothing = torch.full((4, 2, 64), float("nan"), device=device), torch.full((2, 4), float("-inf"), device=device)
    out, lse = merge_partials(*nothing, *nothing)
    assert not bool(out.any())
    assert bool(torch.isneginf(lse).all())


@pytest.mark.parametrize("cuts", [(1,), (64,), (30, 31, 150)], ids=str)
def test_any_split_of_the_keys_equals_the_whole(device: torch.device, cuts: tuple[int, ...]) -> None:
    num_tokens, num_heads, head_dim, kv_len = 5, 4, 64, 200
    query = torch.randn(num_tokens, num_heads, head_dim, device=device)
    key, value = torch.randn(2, kv_len, 2, head_dim, device=device)
    # The first query sees one key only, so that most pieces have none for it.
    mask = torch.rand(num_tokens, kv_len, device=device) < 0.7
    mask[0] = False
    mask[0, 63] = True

    def piece(first: int, end: int) -> Partial:
        return reference.attend(query, key[first:end], value[first:end], head_dim**-0.5, mask[:, first:end])

    bounds = [0, *cuts, kv_len]
    merged = piece(bounds[0], bounds[1])
    for first, end in itertools.pairwise(bounds[1:]):
        merged = merge_partials(*merged, *piece(first, end))
    assert_attention_close(*merged, *piece(0, kv_len), torch.float32)


def test_merges_in_place_and_across_dtypes(device: torch.device) -> None:
    a, b = (draw_partial(9, 2, 64, device) for _ in range(2))
    expected = reference.merge_partials(*a, *b)
    target = torch.empty(9, 2, 64, dtype=torch.float16, device=device)
    merge_partials(*a, *b, out=target, lse=a[1])
    assert_attention_close(target, a[1], *expected, torch.float16)
