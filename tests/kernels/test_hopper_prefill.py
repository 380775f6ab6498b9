"""Prefill on Hopper against the float32 reference; a Gluon kernel does not run in the interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from farspan.kernels.prefill import prefill_attention
from farspan.kernels.rotary_turn import make_string_turn, make_turn
from farspan.kernels.tuning import HopperPrefillConfig, PrefillConfig, hopper_prefill_config

from tests.kernels.helpers import (
    Inputs,
    assert_attention_close,
    make_batch,
    poisoned_like,
    random_block_lists,
    reference_attention,
)

# By ending the process: a kernel that waits for a barrier for ever returns to no signal handler.
pytestmark = pytest.mark.timeout(120, method="thread")

BF16 = torch.bfloat16
Config = HopperPrefillConfig | PrefillConfig
HOPPER = HopperPrefillConfig(heads_in_a_row=2, num_stages=2)
HALVES = replace(HOPPER, in_halves=True)
PORTABLE = PrefillConfig(128, 1, 64, 8, 3, use_tma=False)


def draw(device: torch.device, query_lens: list[int], seq_lens: list[int], **options: object) -> Inputs:
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 128, "dtype": BF16} | options
    return make_batch(query_lens, seq_lens, device=device, sharpness=2.0, **shape)  # type: ignore[arg-type]


def prefill(batch: Inputs, config: Config = HOPPER, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a kernel on a batch, into outputs full of NaN."""
    keys, values = batch.kv.split()
    lse = torch.full((batch.query.shape[1], len(batch.query)), float("nan"), device=batch.query.device)
    paged = options.pop("paged", batch.paged)
    return prefill_attention(
        batch.query,
        keys,
        values,
        paged,  # type: ignore[arg-type]
        batch.tiles(128),
        batch.scale,
        out=poisoned_like(batch.query),
        lse=lse,
        config=config,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("made for compute capability 9.0")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("causal", "head_dim", "dtype"),
    [(True, 128, BF16), (False, 128, BF16), (True, 128, torch.float16), (True, 64, BF16)],
    ids=["causal", "full", "float16", "d64"],
)
def test_dense_equals_the_reference(hopper: torch.device, causal: bool, head_dim: int, dtype: torch.dtype) -> None:
    batch = draw(hopper, [1000, 63, 1, 129], [1000, 1063, 500, 129], head_dim=head_dim, dtype=dtype)
    assert_attention_close(*prefill(batch, causal=causal), *reference_attention(batch, causal=causal), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("growth", [0.02, 1.0], ids=["slow", "fast"])
def test_maxima_that_grow_from_block_to_block(hopper: torch.device, head_dim: int, growth: float) -> None:
    """What is summed so far is rescaled by as much as a row's maximum grows: here by little, or by much."""
    batch = draw(hopper, [200, 65], [1100, 300], head_dim=head_dim)
    for request, chunk_start in enumerate([900, 235]):
        # Blocks of the chunk are computed first.
        for block in range(chunk_start // 128):
            batch.kv_cache[batch.block_table[request, block], ..., :head_dim] *= 1 + growth * block
    assert_attention_close(*prefill(batch), *reference_attention(batch), BF16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "config"),
    [
        (64, HOPPER),
        (64, replace(HOPPER, num_stages=4)),
        (64, HALVES),
        (64, replace(HALVES, num_stages=3)),
        (128, HOPPER),
        (128, replace(HOPPER, num_stages=3)),
    ],
    ids=str,
)
def test_every_run_gives_the_same(hopper: torch.device, head_dim: int, config: HopperPrefillConfig) -> None:
    """Buffers are refilled while others are read; a missing barrier would show as a difference now and then."""
    batch = draw(hopper, [4000], [9000], num_heads=32, num_kv_heads=8, head_dim=head_dim)
    first = prefill(batch, config)
    for _ in range(30):
        again = prefill(batch, config)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.gpu
@pytest.mark.parametrize(("num_list_heads", "causal"), [(8, True), (2, True), (1, True), (8, False)])
def test_listed_blocks_equal_the_reference(hopper: torch.device, causal: bool, num_list_heads: int) -> None:
    batch = draw(hopper, [1000, 129], [3000, 129])
    tiles, lens = batch.tiles(128), None if causal else batch.seq_lens
    lists = random_block_lists(tiles, num_list_heads, 0.4, seq_lens=lens, force_first=False)
    expected = reference_attention(batch, causal=causal, tiles=tiles, block_lists=lists)
    assert_attention_close(*prefill(batch, causal=causal, block_lists=lists), *expected, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
def test_every_page_size(hopper: torch.device, page_size: int) -> None:
    batch = draw(hopper, [300, 63, 129], [1000, 1063, 129], page_size=page_size)
    lists = random_block_lists(batch.tiles(128), 8, 0.4)
    expected = reference_attention(batch, tiles=batch.tiles(128), block_lists=lists)
    assert_attention_close(*prefill(batch, block_lists=lists), *expected, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("has_lists", [False, True], ids=["dense", "lists"])
@pytest.mark.parametrize("page_size", [128, 16])
def test_steps_of_half_a_block(
    hopper: torch.device, page_size: int, has_lists: bool, causal: bool, dtype: torch.dtype
) -> None:
    batch = draw(hopper, [1000, 63, 1, 129], [1000, 1063, 500, 129], head_dim=64, page_size=page_size, dtype=dtype)
    tiles, lists = batch.tiles(128), None
    if has_lists:
        lists = random_block_lists(tiles, 8, 0.4, seq_lens=None if causal else batch.seq_lens, force_first=False)
        lists.block_counts[0, 1] = 0
    expected = reference_attention(batch, causal=causal, tiles=tiles if has_lists else None, block_lists=lists)
    for config in (HALVES, replace(HALVES, num_stages=3)):
        assert_attention_close(*prefill(batch, config, causal=causal, block_lists=lists), *expected, dtype)


@pytest.mark.gpu
def test_one_page_per_request(hopper: torch.device) -> None:
    batch = draw(hopper, [300, 63, 129], [1000, 1063, 129], page_size=1075)
    paged = replace(batch.paged, block_table=batch.block_table[:, :1])
    assert_attention_close(*prefill(batch, paged=paged), *reference_attention(batch), BF16)


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
    expected = prefill(batch, PORTABLE, paged=paged, causal=False)
    assert_attention_close(*prefill(batch, paged=paged, causal=False), *expected, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("density", [None, 0.4], ids=["dense", "lists"])
def test_turned_queries_equal_the_portable_kernel(hopper: torch.device, density: float | None, head_dim: int) -> None:
    batch = draw(hopper, [1000, 129], [3000, 129], head_dim=head_dim)
    tiles = batch.tiles(128)
    lists = None if density is None else random_block_lists(tiles, 8, density)
    inv_freq = 10_000.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    turns = [make_string_turn(inv_freq, shift, 64, True, hopper) for shift in (1, 300, 900, 5000)]
    # Star's: the same bound for all queries.
    turns.append(make_turn(inv_freq, -200, True, hopper, slope=0, offset=600))
    for turn in turns:
        expected = prefill(batch, PORTABLE, block_lists=lists, turn=turn)
        assert_attention_close(*prefill(batch, block_lists=lists, turn=turn), *expected, BF16)


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({}, True),
        ({"head_dim": 64, "dtype": torch.float16}, True),
        ({"page_size": 16}, True),
        ({"page_size": 0}, True),
        ({"page_size": 48}, False),
        ({"dtype": torch.float32}, False),
        ({"head_dim": 96}, False),
        ({"block_size": 64}, False),
        ({"capability": (8, 0)}, False),
        ({"capability": (10, 0)}, False),
        ({"tokens_per_tile": 5}, False),
    ],
    ids=str,
)
def test_which_calls_are_served(options: dict[str, Any], served: bool) -> None:
    call: dict[str, Any] = {
        "head_dim": 128,
        "dtype": BF16,
        "capability": (9, 0),
        "block_size": 128,
        "page_size": 128,
        "tokens_per_tile": 128,
        "num_heads": 32,
        "num_kv_heads": 8,
        "has_turn": False,
        "has_lists": False,
    }
    config = hopper_prefill_config(**(call | options))
    assert (config is not None) is served
    assert config is None or 32 % config.heads_in_a_row == 0
    # Halves have been timed on all keys without a turn alone.
    assert config is None or config.in_halves == ((call | options)["head_dim"] < 128)
    for other in ("has_turn", "has_lists"):
        config = hopper_prefill_config(**(call | options | {other: True}))
        assert config is None or not config.in_halves
