"""Every kernel on float8 pages, against the float32 reference on the numbers that they stand for."""

from dataclasses import replace

import pytest
import torch
from farspan.kernels.batch import FP8, FP8_MAX, KVView
from farspan.kernels.cpu_attention import cpu_attention, write_kv_cpu
from farspan.kernels.decode import paged_decode
from farspan.kernels.flex import select, tile_rows, tile_rows_reference
from farspan.kernels.flex.spans import SpanRule, make_spans
from farspan.kernels.flex.types import NO_LIMIT, Budget
from farspan.kernels.kv_write import write_kv
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.tuning import DECODE_MIN_SPLIT_KEYS

from tests.kernels.helpers import (
    Inputs,
    assert_attention_close,
    make_batch,
    poisoned_like,
    random_block_lists,
    reference_attention,
)
from tests.kernels.string_helpers import inverse_frequencies, make_shift, string_reference

KEY_SCALE, VALUE_SCALE = 0.75, 3.0
SHAPES = [((4, 2), 64, 16), ((7, 1), 96, 32), ((8, 2), 128, 128)]
IDS = ["gqa2-d64-page16", "gqa7-d96-page32", "gqa4-d128-page128"]


def quantized(batch: Inputs) -> tuple[KVView, Inputs]:
    """The pages as float8, NaN in memory that nobody may read included, and the batch with what they stand for."""
    view = KVView(batch.kv_cache.to(FP8), key_scale=KEY_SCALE, value_scale=VALUE_SCALE)
    scales = torch.tensor([KEY_SCALE, VALUE_SCALE], device=batch.query.device)
    scales = scales.repeat_interleave(view.head_dim)
    return view, replace(batch, kv_cache=view.pages.float() * scales)


def decode(
    batch: Inputs, view: KVView, query_len: int, num_splits: int, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_decode(
        batch.query,
        view,
        batch.paged,
        batch.scale * view.key_scale,
        num_splits=num_splits,
        min_split_keys=DECODE_MIN_SPLIT_KEYS,
        query_len=query_len,
        out=poisoned_like(batch.query),
        **options,
    )


@pytest.mark.parametrize(("heads", "head_dim", "page_size"), SHAPES, ids=IDS)
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decode(
    heads: tuple[int, int], head_dim: int, page_size: int, query_len: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch(
        [query_len] * 3,
        [140, query_len, page_size],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        device=device,
    )
    view, stored = quantized(batch)
    expected = reference_attention(stored)
    for num_splits, is_alone in ((1, False), (3, True)):
        assert_attention_close(*decode(batch, view, query_len, num_splits, is_alone=is_alone), *expected, dtype)


def test_decode_of_queries_that_float16_does_not_hold(device: torch.device) -> None:
    """Decode narrows bfloat16 queries to float16, whose largest number is 65504 and smallest 6e-8."""
    batch = make_batch([1] * 3, [100, 64, 7], dtype=torch.bfloat16, device=device)
    view, stored = quantized(batch)
    size = torch.tensor([1e6, 1e-8, 0.0], device=device)[:, None, None]
    batch, stored = (replace(each, query=(batch.query * size).bfloat16()) for each in (batch, stored))
    out, lse = decode(batch, view, 1, 2)
    expected, expected_lse = reference_attention(stored)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-4)
    assert_attention_close(out, expected_lse, expected, expected_lse, torch.bfloat16)


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "is_alone"),
    [(torch.float32, False), (torch.float16, False), (torch.float16, True)],
    ids=["float32", "float16", "float16-alone"],
)
def test_decode_with_a_turn(query_len: int, dtype: torch.dtype, is_alone: bool, device: torch.device) -> None:
    shift = 100
    batch = make_batch([query_len] * 3, [shift + 1, 260, 40], dtype=dtype, device=device)
    view, stored = quantized(batch)
    inv_freq = inverse_frequencies(64)
    turn = make_shift(inv_freq, shift, 9, True, device)
    expected = (tensor.to(device) for tensor in string_reference(stored, turn, inv_freq))
    assert_attention_close(*decode(batch, view, query_len, 2, turn=turn, is_alone=is_alone), *expected, dtype)


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize(("page_size", "is_alone"), [(16, True), (128, False), (128, True)])
def test_decode_from_both_pools(query_len: int, page_size: int, is_alone: bool, device: torch.device) -> None:
    """Every third page is in host memory, and NaN on the device."""
    batch = make_batch([query_len] * 3, [140, 260, 40], page_size=page_size, dtype=torch.float16, device=device)
    view, stored = quantized(batch)
    expected = reference_attention(stored)
    on_host = batch.block_table % 3 == 0
    host_pages = view.pages.cpu().pin_memory() if device.type == "cuda" else view.pages.clone()
    pages = view.pages.view(torch.uint8).clone()
    pages[::3] = 0x7F
    split = replace(view, pages=pages.view(FP8), host_pages=host_pages)
    batch = replace(batch, block_table=torch.where(on_host, -1 - batch.block_table, batch.block_table))
    assert_attention_close(*decode(batch, split, query_len, 2, is_alone=is_alone), *expected, torch.float16)


@pytest.mark.parametrize(("heads", "head_dim", "page_size"), SHAPES[1:], ids=IDS[1:])
@pytest.mark.parametrize("has_lists", [False, True], ids=["dense", "lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_prefill(
    heads: tuple[int, int], head_dim: int, page_size: int, has_lists: bool, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch(
        [70, 3],
        [150, 65],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        device=device,
    )
    view, stored = quantized(batch)
    tiles = batch.tiles(64)
    lists = random_block_lists(tiles, heads[0], 0.5) if has_lists else None
    expected = reference_attention(stored, tiles=tiles if has_lists else None, block_lists=lists)
    scale = batch.scale * view.key_scale
    ours = paged_prefill(batch.query, view, batch.paged, tiles, scale, block_lists=lists)
    assert_attention_close(*ours, *expected, dtype)
    if device.type == "cpu":
        out, lse = poisoned_like(batch.query), torch.empty_like(ours[1])
        cpu_attention(batch.query, view, batch.paged, scale, out=out, lse=lse, tiles=tiles, block_lists=lists)
        assert_attention_close(out, lse, *expected, dtype)


def test_layers_of_a_step_have_scales_of_their_own(device: torch.device) -> None:
    """Layers share one launch, which keeps no scales."""
    batch = make_batch([70], [150], device=device)
    tiles, paged, pages = batch.tiles(64), batch.paged, batch.kv_cache.to(FP8)
    first, _ = paged_prefill(batch.query, KVView(pages), paged, tiles, batch.scale)
    for factor in (1.0, 4.0):
        out, lse = paged_prefill(batch.query, KVView(pages, value_scale=factor), paged, tiles, batch.scale)
        torch.testing.assert_close(out, factor * first)
    sharp, sharp_lse = paged_prefill(batch.query, KVView(pages), paged, tiles, 2 * batch.scale)
    expected = reference_attention(replace(batch, kv_cache=pages.float(), scale=2 * batch.scale))
    assert_attention_close(sharp, sharp_lse, *expected, torch.float32)
    assert not torch.equal(sharp_lse, lse)
    assert len(paged.launches) == 1


def test_selection(device: torch.device) -> None:
    """Blocks are chosen by what the stored keys stand for."""
    batch = make_batch([300], [700], num_heads=4, num_kv_heads=2, page_size=64, device=device, sharpness=4.0)
    view, stored = quantized(batch)
    tiles = batch.tiles(64)
    spans = make_spans([0, 300], [700], tiles, SpanRule(128, 8))
    budget = Budget(0.9, 0.0, 2, NO_LIMIT)
    scale = batch.scale * view.key_scale
    found = tile_rows.tile_row_lists(batch.query, view, batch.paged, tiles, spans, scale, budget)
    on_host = replace(stored, **{name: each.cpu() for name, each in vars(stored).items() if torch.is_tensor(each)})
    on_cpu = (on_host.tiles(64), make_spans([0, 300], [700], on_host.tiles(64), SpanRule(128, 8)))
    expected = tile_rows_reference.tile_row_lists(
        on_host.query, on_host.kv, on_host.paged, *on_cpu, batch.scale, budget
    )
    is_span = on_cpu[1].span_request >= 0
    assert bool(is_span.any())
    torch.testing.assert_close(found.kept.cpu()[:, is_span], expected.kept[:, is_span], atol=1e-3, rtol=0)
    same = found.block_lists.block_counts.cpu() == expected.block_lists.block_counts
    assert float(same.float().mean()) > 0.95
    paper = select.flex_block_lists(batch.query, view, batch.paged, tiles, scale, Budget(0.9, 0.1, 2, NO_LIMIT))
    plain = select.flex_block_lists(
        batch.query, stored.kv, batch.paged, tiles, batch.scale, Budget(0.9, 0.1, 2, NO_LIMIT)
    )
    assert torch.equal(paper.block_lists.block_counts, plain.block_lists.block_counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_writes_are_divided_and_saturate(dtype: torch.dtype, device: torch.device) -> None:
    """Of numbers that float8 has: Triton's interpreter does not round to it as a GPU does."""
    numbers = torch.tensor([0.0, 1.0, -1.75, 14.0, FP8_MAX, -FP8_MAX, 0.25, -104.0]).repeat(8)
    key = (numbers * 0.5)[None, None].repeat(3, 2, 1).to(device, dtype)
    value = (numbers.flip(0) * 2)[None, None].repeat(3, 2, 1).to(device, dtype)
    key[0, 0, 0], value[1, 1, 3] = 60000.0, -60000.0
    slots = torch.tensor([18, -1, 5], device=device)
    write = [write_kv, write_kv_cpu] if device.type == "cpu" else [write_kv]
    for each in write:
        cache = torch.zeros(2, 2, 16, 128, device=device).to(FP8)
        each(key, value, cache, slots, key_scale=0.5, value_scale=2.0)
        expected = torch.zeros(2, 2, 16, 128, device=device)
        for slot in (18, 5):
            expected[slot // 16, :, slot % 16, :64], expected[slot // 16, :, slot % 16, 64:] = (
                numbers.to(device),
                numbers.flip(0).to(device),
            )
        expected[1, 0, 2, 0] = FP8_MAX
        assert torch.equal(cache.float(), expected)


@pytest.mark.gpu
def test_writes_round_as_pytorch_does(device: torch.device) -> None:
    key, value = (100 * torch.randn(500, 8, 128, device=device).bfloat16() for _ in range(2))
    cache = torch.zeros(4, 8, 128, 256, device=device).to(FP8)
    write_kv(key, value, cache, torch.arange(500, device=device), key_scale=1.5, value_scale=0.5)
    found = cache.transpose(1, 2).flatten(0, 1)[:500]
    for ours, given, scale in ((found[..., :128], key, 1.5), (found[..., 128:], value, 0.5)):
        expected = (given.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        # The device may divide by a reciprocal.
        assert float((ours.float() != expected.float()).float().mean()) < 1e-3
        torch.testing.assert_close(ours.float(), expected.float(), rtol=0.13, atol=2**-9)
