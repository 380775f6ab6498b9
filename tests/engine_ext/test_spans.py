"""Prefill of cold heads over spans of a long context: where they are cut, and that their results are the whole one."""

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext.config import DensePrefill
from farspan.engine_ext.metadata import FarspanMetadataBuilder, span_bounds
from farspan.engine_ext.offload.cache import ColdCache
from farspan.engine_ext.parts import RunningSum, combine
from farspan.engine_ext.runs import ChunkKind, Run
from farspan.kernels.batch import KVView
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.tiles import make_prefill_tiles

from tests.kernels.helpers import assert_attention_close, make_batch, poisoned_like, reference_attention
from tests.kernels.string_helpers import inverse_frequencies, make_shift, string_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 16


@pytest.mark.parametrize("seed", range(4))
def test_bounds(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        most_pages = rng.randint(1, 40)
        num_written = rng.randint(1, most_pages)
        num_pages = rng.randint(num_written, 400)
        bounds = span_bounds(num_pages, num_pages - num_written, most_pages)
        lens = [end - begin for begin, end in pairwise(bounds)]
        assert (bounds[0], bounds[-1]) == (0, num_pages)
        assert all(0 < length <= most_pages for length in lens)
        # The last span has all pages that the chunk writes to; the first is the only one that is shorter than others.
        assert lens[-1] >= num_written
        assert len(set(lens[1:])) <= 1


@pytest.mark.parametrize("num_parts", [2, 3, 6])
def test_a_running_sum_is_the_combination_of_all(num_parts: int) -> None:
    """A token has no keys in some part, another none at all."""
    outs, lses = torch.randn(num_parts, 5, 3, 8), 3 * torch.randn(num_parts, 3, 5)
    lses[1, :, 2] = lses[:, :, 4] = float("-inf")
    lses[0, :, 2] = float("-inf")
    outs[1, 2] = outs[0, 2] = outs[:, 4] = 0
    expected, expected_lse = torch.empty(5, 3, 8), torch.empty(3, 5)
    combine(outs, lses, expected, expected_lse)
    sums, out, lse = RunningSum(outs[0]), torch.full((5, 3, 8), float("nan")), lses[-1]
    sums.put(sums.first.copy_(outs[0]), lses[0])
    for part, part_lse in zip(outs[1:-1], lses[1:-1], strict=True):
        sums.put(part, part_lse)
    sums.finish(outs[-1], lse, out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def spans_of_request(pages: torch.Tensor, kv_len: int, query_len: int, most_pages: int) -> tuple[Any, Any, Any]:
    """`spans_of` one request whose pages are `pages`, [num_pages] int32."""
    entries = SimpleNamespace(entries=pages[None])
    cache: Any = SimpleNamespace(
        staging=SimpleNamespace(num_pages=most_pages),
        sizes=SimpleNamespace(page_size=PAGE),
        stage_spans=lambda *args: ColdCache.stage_spans(entries, *args),  # type: ignore[arg-type]
    )
    run = Run(0, 1, ChunkKind(DensePrefill(), False, True), 0, [0, query_len], [kv_len])
    builder: Any = SimpleNamespace(device=pages.device)
    return FarspanMetadataBuilder.spans_of(builder, cache, run)


@pytest.mark.parametrize(
    ("query_len", "most_pages", "shift"), [(19, 3, None), (19, 3, 1), (19, 3, 50), (40, 6, 50)], ids=str
)
def test_spans_are_the_whole_context(query_len: int, most_pages: int, shift: int | None) -> None:
    """By the portable kernel, whose tiles and turns go by positions within a span."""
    kv_len = 165
    inputs = make_batch([query_len], [kv_len], num_heads=2, num_kv_heads=1, head_dim=32, page_size=PAGE, device=DEVICE)
    turn = None
    if shift is None:
        expected = reference_attention(inputs)
    else:
        inv_freq = inverse_frequencies(32)
        turn = make_shift(inv_freq, shift, 9, True, DEVICE)
        expected = tuple(each.to(DEVICE) for each in string_reference(inputs, turn, inv_freq))  # type: ignore[assignment]
    spans, batches, ends = spans_of_request(inputs.block_table[0], kv_len, query_len, most_pages)
    assert len(spans) == -(-11 // most_pages)
    sums = RunningSum(inputs.query)
    for place, (span, batch, end) in enumerate(zip(spans, batches, ends, strict=True)):
        staged = torch.full((most_pages, *inputs.kv_cache.shape[1:]), float("nan"), device=DEVICE)
        staged[: len(span.entries)] = inputs.kv_cache[span.entries.long()]
        tiles = make_prefill_tiles([0, query_len], [end], 64, DEVICE)
        is_last = place + 1 == len(spans)
        out, lse = paged_prefill(
            inputs.query,
            KVView(staged),
            batch,
            tiles,
            inputs.scale,
            causal=is_last,
            turn=turn,
            out=sums.first if place == 0 else poisoned_like(inputs.query),
        )
        if is_last:
            sums.finish(out, lse, out)
        else:
            sums.put(out, lse)
    assert_attention_close(out, lse, *expected, torch.float32)
