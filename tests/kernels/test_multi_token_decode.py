"""Decode of a few tokens per request, as speculative decoding verifies its drafts, against the float32 reference."""

import pytest
import torch
from farspan.kernels.decode import decode_rows

from tests.kernels.helpers import Inputs, assert_attention_close, make_batch, poisoned_decode, reference_attention
from tests.kernels.string_helpers import inverse_frequencies, make_shift, string_reference


@pytest.mark.parametrize("query_len", [2, 3, 5, 8])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_query_lens_and_groups(query_len: int, group: int, device: torch.device) -> None:
    """Drafts of one length; the keys end on, before and behind the bounds of pages and splits."""
    lens = [query_len, 64, 65, 127 + query_len, 300]
    batch = make_batch([query_len] * len(lens), lens, num_heads=group, num_kv_heads=1, device=device)
    expected = reference_attention(batch)
    for num_splits in (1, 3):
        assert_attention_close(*poisoned_decode(batch, num_splits, query_len), *expected, torch.float32)


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "layout"),
    [((6, 2), 96, 32, "lbnhc"), ((8, 2), 128, 128, "lbhnc"), ((16, 2), 256, 64, "lbhnc")],
    ids=["gqa3-d96-page32-lbnhc", "gqa4-d128-page128", "gqa8-d256-page64"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ragged(
    heads: tuple[int, int], head_dim: int, page_size: int, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Requests with drafts of different lengths, one without any, and a whole prompt that is as short as they are."""
    batch = make_batch(
        [8, 1, 3, 4, 8],
        [200, 77, page_size + 1, 4, 2 * page_size],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        layout=layout,
        dtype=dtype,
        device=device,
    )
    expected = reference_attention(batch)
    for num_splits in (1, 4):
        assert_attention_close(*poisoned_decode(batch, num_splits, 8), *expected, dtype)


@pytest.mark.parametrize(("group", "head_dim"), [(16, 64), (8, 256)])
def test_more_rows_than_a_program_holds(group: int, head_dim: int, device: torch.device) -> None:
    assert decode_rows(head_dim, group, 8) < 8 * group
    batch = make_batch([8, 5], [90, 150], num_heads=group, num_kv_heads=1, head_dim=head_dim, device=device)
    assert_attention_close(*poisoned_decode(batch, 2, 8), *reference_attention(batch), torch.float32)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_string_turns_by_token(num_splits: int, device: torch.device) -> None:
    """The tokens of a request have different bounds, below, on and above those of blocks of keys."""
    shift = 100
    query_lens, lens = [4, 4, 3, 1, 2, 4], [shift + 2, shift, shift + 66, 260, shift + 1, 204]
    batch = make_batch(query_lens, lens, device=device)
    inv_freq = inverse_frequencies(64)
    turn = make_shift(inv_freq, shift, 9, True, device)
    expected = (tensor.to(device) for tensor in string_reference(batch, turn, inv_freq))
    assert_attention_close(*poisoned_decode(batch, num_splits, 4, turn=turn), *expected, torch.float32)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_of_a_captured_graph(num_splits: int, device: torch.device) -> None:
    """Requests without tokens come last; the rows that are left are theirs, and get zeros."""
    batch = make_batch([3, 3, 0, 0], [150, 90, 1, 1], device=device)
    batch.seq_lens[2:] = 0
    batch.block_table[2:] = 2**30
    out, lse = poisoned_decode(batch, num_splits, 3, num_rows=12)
    kept = make_batch([3, 3], [150, 90], device=device)
    expected = reference_attention(
        Inputs(
            **{
                **vars(batch),
                "block_table": batch.block_table[:2],
                "seq_lens": batch.seq_lens[:2],
                "query_start_loc": kept.query_start_loc,
            }
        )
    )
    assert_attention_close(out[:6], lse[:, :6], *expected, torch.float32)
    assert bool((out[6:] == 0).all())
    assert bool((lse[:, 6:] == float("-inf")).all())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shapes_on_the_gpu(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    for group in range(1, 9):
        for query_len in range(1, 9):
            lens = [query_len, 63 + query_len, 1000, 128, 129, 2047]
            batch = make_batch(
                [query_len, *(1 + index % query_len for index in range(5))],
                lens,
                num_heads=2 * group,
                num_kv_heads=2,
                head_dim=head_dim,
                page_size=64,
                dtype=dtype,
                device=device,
            )
            expected = reference_attention(batch)
            for num_splits in (1, 7):
                assert_attention_close(*poisoned_decode(batch, num_splits, max(query_len, 2)), *expected, dtype)
