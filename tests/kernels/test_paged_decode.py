from dataclasses import replace

import pytest
import torch
from farspan.kernels.decode import paged_decode
from farspan.kernels.decode_workspace import make_decode_workspace
from farspan.kernels.tuning import DECODE_MIN_SPLIT_KEYS

from tests.kernels.helpers import (
    Inputs,
    assert_attention_close,
    make_batch,
    poisoned_decode,
    poisoned_like,
    reference_attention,
)
from tests.kernels.string_helpers import inverse_frequencies, make_shift, string_reference

RAGGED = [1, 63, 64, 65, 300, 129, 17]


def decode_batch(lens: list[int], **options) -> Inputs:
    return make_batch([1] * len(lens), lens, **options)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ragged(num_splits: int, dtype: torch.dtype, device: torch.device) -> None:
    batch = decode_batch(RAGGED, dtype=dtype, device=device)
    assert_attention_close(*poisoned_decode(batch, num_splits), *reference_attention(batch), dtype)


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "layout"),
    [
        ((2, 2), 64, 16, "lbhnc"),
        ((7, 1), 96, 32, "lbnhc"),
        ((16, 2), 128, 128, "lbhnc"),
        ((6, 2), 128, 64, "lbnhc"),
        ((4, 2), 256, 64, "lbhnc"),
    ],
    ids=["gqa1-d64-page16", "gqa7-d96-page32-lbnhc", "gqa8-d128-page128", "gqa3-d128-page64-lbnhc", "gqa2-d256-page64"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shapes(
    heads: tuple[int, int], head_dim: int, page_size: int, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch = decode_batch(
        [200, 1, page_size, page_size + 1, page_size - 1],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        layout=layout,
        dtype=dtype,
        device=device,
    )
    expected = reference_attention(batch)
    for num_splits in (1, 3):
        assert_attention_close(*poisoned_decode(batch, num_splits), *expected, dtype)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_rows_touch_nothing(num_splits: int, device: torch.device) -> None:
    batch = decode_batch([40, 70, 100], device=device)
    expected_out, expected_lse = reference_attention(batch)
    batch.seq_lens[1] = 0
    # vLLM does not clear the block table's rows of padding: they may hold any page id.
    batch.block_table[1] = 2**30
    out, lse = poisoned_decode(batch, num_splits)
    expected_out[1], expected_lse[:, 1] = 0, float("-inf")
    assert_attention_close(out, lse, expected_out, expected_lse, torch.float32)
    assert bool((out[1] == 0).all())


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [64, 32], ids=["full", "partial"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_string(num_splits: int, rotary_dim: int, is_neox: bool, device: torch.device) -> None:
    shift = 100
    batch = decode_batch([shift - 1, shift, shift + 1, 1, 260, shift + 64], device=device)
    inv_freq = inverse_frequencies(rotary_dim)
    turn = make_shift(inv_freq, shift, 9, is_neox, device)
    expected = (tensor.to(device) for tensor in string_reference(batch, turn, inv_freq))
    assert_attention_close(*poisoned_decode(batch, num_splits, turn=turn), *expected, torch.float32)


@pytest.mark.parametrize("shift", [1, 64, 128, 10_000])
@pytest.mark.parametrize("page_size", [16, 128])
def test_string_shifts(shift: int, page_size: int, device: torch.device) -> None:
    batch = decode_batch([192, 65, 250], page_size=page_size, device=device)
    inv_freq = inverse_frequencies(64)
    turn = make_shift(inv_freq, shift, 20, True, device)
    expected = tuple(tensor.to(device) for tensor in string_reference(batch, turn, inv_freq))
    for num_splits in (1, 2):
        assert_attention_close(*poisoned_decode(batch, num_splits, turn=turn), *expected, torch.float32)


def test_strided_tensors(device: torch.device) -> None:
    """Queries and outputs may be slices of wider tensors, and the block table a slice of a wider one."""
    batch = decode_batch([77, 130, 5], device=device)
    wide = torch.full((3, 9, 64), float("nan"), device=device)
    wide[:, 2:6] = batch.query
    out = torch.full((5, 4, 64), float("nan"), device=device)
    lse = torch.full((4, 5), float("nan"), device=device)
    for num_splits in (1, 2):
        paged_decode(
            wide[:, 2:6], batch.kv, replace(batch.paged, block_table=batch.block_table[:, :-1]), batch.scale,
            num_splits=num_splits, min_split_keys=DECODE_MIN_SPLIT_KEYS, out=out[1:4], lse=lse[:, 1:4],
        )  # fmt: skip
        assert_attention_close(out[1:4], lse[:, 1:4], *reference_attention(batch), torch.float32)
    assert bool(out[[0, 4]].isnan().all())
    assert bool(lse[:, [0, 4]].isnan().all())


def test_rows_of_one_prompt(device: torch.device) -> None:
    """Any row of a chunk can be a request: its length is its position plus one, its block table that of its request."""
    batch = make_batch([150], [200], device=device)
    rows = torch.tensor([0, 13, 77, 149], device=device)
    out, lse = paged_decode(
        batch.query[rows],
        batch.kv,
        replace(batch.paged, block_table=batch.block_table.expand(4, -1), kv_lens=(rows + 51).int()),
        batch.scale,
        num_splits=2,
        min_split_keys=DECODE_MIN_SPLIT_KEYS,
    )
    expected_out, expected_lse = reference_attention(batch)
    assert_attention_close(out, lse, expected_out[rows], expected_lse[:, rows], torch.float32)


def test_no_requests(device: torch.device) -> None:
    batch = decode_batch([5], device=device)
    out, lse = paged_decode(
        batch.query[:0], batch.kv, batch.paged, batch.scale, num_splits=2, min_split_keys=DECODE_MIN_SPLIT_KEYS
    )
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 8])
@pytest.mark.parametrize("has_turn", [False, True], ids=["plain", "turn"])
def test_captured_graph_follows_lengths(num_splits: int, has_turn: bool, device: torch.device) -> None:
    batch = decode_batch([1000, 2000, 3000], page_size=128, head_dim=128, dtype=torch.bfloat16, device=device)
    inv_freq = inverse_frequencies(128)
    turn = make_shift(inv_freq, 900, 20, True, device) if has_turn else None
    workspace = make_decode_workspace(3 * 4 * num_splits, 128, device)
    out, lse = poisoned_like(batch.query), torch.full((4, 3), float("nan"), device=device)

    paged = batch.paged

    def run() -> None:
        paged_decode(
            batch.query, batch.kv, paged, batch.scale,
            num_splits=num_splits, min_split_keys=DECODE_MIN_SPLIT_KEYS, turn=turn, out=out, lse=lse,
            workspace=workspace,
        )  # fmt: skip

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lens in ([1000, 2000, 3000], [1, 0, 2999], [900, 901, 899]):
        batch.seq_lens.copy_(torch.tensor(lens))
        graph.replay()
        torch.cuda.synchronize()
        expected_out, expected_lse = poisoned_like(out).float(), torch.empty_like(lse)
        for row, length in enumerate(lens):
            if length == 0:
                expected_out[row], expected_lse[:, row] = 0, float("-inf")
                continue
            one = Inputs(
                **{
                    **vars(batch),
                    "query": batch.query[row : row + 1],
                    "block_table": batch.block_table[row : row + 1],
                    "seq_lens": batch.seq_lens[row : row + 1],
                    "query_start_loc": torch.tensor([0, 1], device=device),
                }
            )
            one_out, one_lse = string_reference(one, turn, inv_freq) if turn else reference_attention(one)
            expected_out[row : row + 1], expected_lse[:, row : row + 1] = one_out.to(device), one_lse.to(device)
        if has_turn:
            # Unlike the oracle, the kernel rounds the turned query to bfloat16.
            torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=0)
        measured = expected_lse if has_turn else lse
        assert_attention_close(out, measured, expected_out, expected_lse, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "page_size"), [(64, 16), (64, 128), (96, 32), (128, 16), (128, 64), (128, 128), (256, 32), (256, 128)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shapes_on_the_gpu(dtype: torch.dtype, head_dim: int, page_size: int, device: torch.device) -> None:
    for group in (1, 4, 7, 8):
        batch = decode_batch(
            [1, 63, 1000, 128, 129, 2047],
            num_heads=2 * group,
            num_kv_heads=2,
            head_dim=head_dim,
            page_size=page_size,
            dtype=dtype,
            device=device,
        )
        expected = reference_attention(batch)
        for num_splits in (1, 7, 33):
            assert_attention_close(*poisoned_decode(batch, num_splits), *expected, dtype)
