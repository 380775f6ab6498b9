"""A layer whose KV cache vLLM brings as bytes: float8 numbers with the layer's own scales."""

from types import SimpleNamespace
from typing import Any

import torch
from farspan.engine_ext.config import DensePrefill
from farspan.engine_ext.impl import FarspanImpl
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import LayerContext, StepMetadata
from farspan.kernels import reference
from farspan.kernels.batch import FP8, KVView, PagedBatch

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, SCALE = 4, 2, 64, 16, 0.125
KEY_SCALE, VALUE_SCALE = 0.05, 0.25


def make_impl() -> FarspanImpl:
    """As its constructor makes it, without an engine."""
    impl: Any = object.__new__(FarspanImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size, impl.scale = NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SCALE
    impl.config = SimpleNamespace(star=None, offload=None, prefill=DensePrefill())
    return impl


def test_a_layer_writes_and_reads_float8() -> None:
    """A chunk of 40 tokens after 30, and a request that verifies three drafts."""
    impl, query_lens, kv_lens = make_impl(), [4, 40], [20, 70]
    layer = SimpleNamespace(layer_name="layer", _k_scale_float=KEY_SCALE, _v_scale_float=VALUE_SCALE)
    key, value = (3 * torch.randn(90, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
    query = torch.randn(44, NUM_HEADS, HEAD_DIM)
    cache = torch.zeros(10, NUM_KV_HEADS, PAGE_SIZE, 2 * HEAD_DIM, dtype=torch.uint8)
    table = torch.tensor([[3, 1, 0, 0, 0], [9, 2, 5, 7, 4]], dtype=torch.int32)
    positions = [torch.arange(kv_len) for kv_len in kv_lens]
    slots = [table[row, each // PAGE_SIZE].long() * PAGE_SIZE + each % PAGE_SIZE for row, each in enumerate(positions)]
    impl.do_kv_cache_update(layer, key, value, cache, torch.cat(slots))
    stored = cache.view(FP8).float()
    assert torch.equal(stored[3, :, 0, :HEAD_DIM], (key[0] / KEY_SCALE).clamp(-448, 448).to(FP8).float())

    starts = torch.tensor([0, 4, 44], dtype=torch.int32)
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    maker = PassMaker(NUM_KV_HEADS, "cpu", 1, None, False, torch.device("cpu"))
    drafts = maker.decode(PagedBatch(starts[:2], lens[:1], table[:1], 4, 20), num_rows=4)
    chunk = PagedBatch(starts[1:] - 4, lens[1:], table[1:], 40, 70)
    prefill = maker.prefill(DensePrefill(), chunk, [0, 40], [70], 4, turns=False)
    step = StepMetadata((drafts, prefill), {"layer": LayerContext(0, None, None, None)})
    out = impl.forward(layer, query, key, value, cache, step, torch.empty_like(query))

    scales = torch.tensor([KEY_SCALE, VALUE_SCALE]).repeat_interleave(HEAD_DIM)
    batch = PagedBatch(starts, lens, table, max(query_lens), max(kv_lens))
    expected, _ = reference.paged_attention(query, KVView(stored * scales), batch, SCALE)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
