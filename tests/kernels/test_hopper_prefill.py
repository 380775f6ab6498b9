"""Prefill on Hopper against the float32 reference; a Gluon kernel does not run in the interpreter."""

from dataclasses import replace

import pytest
import torch
from farspan.kernels.hopper.prefill import hopper_prefill, supports
from farspan.kernels.prefill import prefill_attention
from farspan.kernels.rotary_turn import make_string_turn

from tests.kernels.helpers import (
    Inputs,
    assert_attention_close,
    make_batch,
    poisoned_like,
    random_block_lists,
    reference_attention,
)

BF16 = torch.bfloat16


def draw(device: torch.device, query_lens: list[int], seq_lens: list[int], **options: object) -> Inputs:
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 128, "dtype": BF16} | options
    return make_batch(query_lens, seq_lens, device=device, sharpness=2.0, **shape)  # type: ignore[arg-type]


def prefill(batch: Inputs, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel on a batch, into outputs full of NaN."""
    keys, values = batch.kv.split()
    out = poisoned_like(batch.query)
    lse = torch.full((batch.query.shape[1], len(batch.query)), float("nan"), device=batch.query.device)
    arguments = {"block_lists": None, "causal": True, "turn": None} | options
    paged = arguments.pop("paged", batch.paged)
    hopper_prefill(batch.query, keys, values, paged, batch.tiles(128), batch.scale, out=out, lse=lse, **arguments)  # type: ignore[arg-type]
    return out, lse


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("made for compute capability 9.0")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_dense_equals_the_reference(hopper: torch.device, causal: bool, head_dim: int, dtype: torch.dtype) -> None:
    batch = draw(hopper, [1000, 63, 1, 129], [1000, 1063, 500, 129], head_dim=head_dim, dtype=dtype)
    assert_attention_close(*prefill(batch, causal=causal), *reference_attention(batch, causal=causal), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("num_list_heads", [8, 2, 1])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_listed_blocks_equal_the_reference(hopper: torch.device, causal: bool, num_list_heads: int) -> None:
    batch = draw(hopper, [1000, 129], [3000, 129])
    tiles, lens = batch.tiles(128), None if causal else batch.seq_lens
    lists = random_block_lists(tiles, num_list_heads, 0.4, seq_lens=lens, force_first=False)
    expected = reference_attention(batch, causal=causal, tiles=tiles, block_lists=lists)
    assert_attention_close(*prefill(batch, causal=causal, block_lists=lists), *expected, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["lbhnc", "lbnhc"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
def test_every_page_size(hopper: torch.device, page_size: int, layout: str) -> None:
    batch = draw(hopper, [300, 63, 129], [1000, 1063, 129], page_size=page_size, layout=layout)
    assert_attention_close(*prefill(batch), *reference_attention(batch), BF16)
    lists = random_block_lists(batch.tiles(128), 8, 0.4)
    expected = reference_attention(batch, tiles=batch.tiles(128), block_lists=lists)
    assert_attention_close(*prefill(batch, block_lists=lists), *expected, BF16)


@pytest.mark.gpu
def test_an_empty_list_gives_zero(hopper: torch.device) -> None:
    batch = draw(hopper, [200], [200])
    lists = random_block_lists(batch.tiles(128), 1, 1.0)
    lists.block_counts[0, 1] = 0
    out, lse = prefill(batch, block_lists=lists)
    assert not bool(out[128:].any())
    assert bool(torch.isneginf(lse[:, 128:]).all())


@pytest.mark.gpu
def test_chunks_that_are_not_the_last_of_their_keys(hopper: torch.device) -> None:
    batch = draw(hopper, [200, 65], [1200, 300])
    first = torch.tensor([900, 235], dtype=torch.int32, device=hopper)
    paged = replace(batch.paged, first_pos=first)
    tiles = batch.tiles(128)
    keys, values = batch.kv.split()
    expected = prefill_attention(batch.query, keys, values, paged, tiles, batch.scale, causal=False)
    assert_attention_close(*prefill(batch, paged=paged, causal=False), *expected, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [None, 0.4], ids=["dense", "lists"])
@pytest.mark.parametrize("shift", [1, 300, 900, 5000])
def test_turned_queries_equal_the_portable_kernel(hopper: torch.device, shift: int, density: float | None) -> None:
    batch = draw(hopper, [1000, 129], [3000, 129])
    tiles = batch.tiles(128)
    lists = None if density is None else random_block_lists(tiles, 8, density)
    inv_freq = 10_000.0 ** -(torch.arange(64) / 64)
    turn = make_string_turn(inv_freq, shift, 64, True, hopper)
    keys, values = batch.kv.split()
    expected = prefill_attention(
        batch.query, keys, values, batch.paged, tiles, batch.scale, block_lists=lists, turn=turn
    )  # fmt: skip
    assert_attention_close(*prefill(batch, block_lists=lists, turn=turn), *expected, BF16)


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({}, True),
        ({"head_dim": 64, "dtype": torch.float16}, True),
        ({"page_size": 16}, True),
        ({"page_size": 48}, False),
        ({"dtype": torch.float32}, False),
        ({"head_dim": 96}, False),
    ],
    ids=["d128", "d64-float16", "page16", "page48", "float32", "d96"],
)
def test_which_tensors_are_served(options: dict[str, object], served: bool) -> None:
    batch = draw(torch.device("cpu"), [5], [5], **options)
    assert supports(batch.query, *batch.kv.split(), 128) is served
    assert not supports(batch.query, *batch.kv.split(), 64)
