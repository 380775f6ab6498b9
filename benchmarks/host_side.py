"""Host time of a layer's attention in a chunk of 8K tokens behind 8K to 120K, 8B shape; nothing waits for the GPU.

`farspan-layer` writes the keys, selects and attends as a layer of vLLM does; `farspan-flex` is selection and attention
alone, `farspan-first-layer` the same for the first layer of a step, which finds what the others use again.
`farspan-dense` and `fa3` are dense attention. The goal is 0.15 ms for a layer.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import torch
from farspan.engine_ext import launch
from farspan.engine_ext.config import DensePrefill, FarspanConfig, FlexPrefill
from farspan.engine_ext.impl import FarspanImpl
from farspan.engine_ext.passes import LayerContext, Pass, StepMetadata
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.kernels.batch import KVView

from benchmarks.calls import pass_of
from benchmarks.inputs import LLAMA_8B, TINY, PagedBatch, PrefillCase, make_paged_batch
from benchmarks.record import BenchmarkError, Recorder

LAYERS = 32
STEPS = 9
FLEX = FlexPrefill(min_seq_len=0, min_chunk_len=0)


def cases(dry_run: bool) -> list[PrefillCase]:
    if dry_run:
        return [PrefillCase(300, 400, TINY)]
    return [PrefillCase(8192, 8192 + prefix, LLAMA_8B) for prefix in (8192, 32768, 122880)]


def layer_of(batch: PagedBatch) -> FarspanImpl:
    """A layer of a model with the batch's heads, made without one."""
    impl = object.__new__(FarspanImpl)
    shape = batch.shape
    impl.num_heads, impl.num_kv_heads, impl.head_size = shape.num_q_heads, shape.num_kv_heads, shape.head_dim
    impl.scale, impl.config = shape.scale, FarspanConfig(prefill=FLEX)
    return impl


def works(batch: PagedBatch) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """By variant: what one step does first, and what each layer does."""
    out = torch.empty_like(batch.query)
    context = LayerContext(0, None, None, FlexSelector())
    kv, scale, query = KVView(batch.kv_cache), batch.shape.scale, batch.query
    flex = pass_of(batch, FLEX, "triton")
    dense = pass_of(batch, DensePrefill(), "triton")
    key = query[:, : batch.shape.num_kv_heads].contiguous()
    lens = zip(batch.query_lens_cpu, batch.seq_lens_cpu, strict=True)
    positions = torch.cat([torch.arange(seq_len - query_len, seq_len) for query_len, seq_len in lens]).to(query.device)
    page_size = batch.shape.page_size
    slots = batch.block_table[0].long()[positions // page_size] * page_size + positions % page_size
    impl, name = layer_of(batch), cast(torch.nn.Module, SimpleNamespace(layer_name="layer"))
    step = StepMetadata((flex,), {"layer": context})

    def forward() -> None:
        impl.do_kv_cache_update(name, key, key, batch.kv_cache, slots)
        impl.forward(name, query, key, key, batch.kv_cache, step, out)

    def attend(each: Pass) -> Callable[[], object]:
        return lambda: launch.attend(each, query, kv, context, scale, out)

    def forget() -> None:
        flex.batch.launches.clear()

    def first_layer() -> None:
        forget()
        launch.attend(flex, query, kv, context, scale, out)

    found: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "farspan-layer": (forget, forward),
        "farspan-flex": (forget, attend(flex)),
        "farspan-first-layer": (forget, first_layer),
        "farspan-dense": (dense.batch.launches.clear, attend(dense)),
    }
    if query.is_cuda and not launch.fa3_refusal(batch.shape.head_dim, batch.shape.dtype):
        fa3 = pass_of(batch, DensePrefill(), "fa3")
        found["fa3"] = (fa3.batch.launches.clear, attend(fa3))
    return found


def host_ms(start: Callable[[], object], layer: Callable[[], object], layers: int) -> float:
    """Host time per layer of a step whose launches all fit into the device's queue."""
    start()
    begin = time.perf_counter()
    for _ in range(layers):
        layer()
    spent = time.perf_counter() - begin
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return spent / layers * 1e3


def check_other_layers(batch: PagedBatch) -> None:
    """Raise BenchmarkError where a layer that uses its step's launches again computes something else than alone."""
    context = LayerContext(0, None, None, FlexSelector())
    generator = torch.Generator(batch.query.device).manual_seed(1)
    flex = pass_of(batch, FLEX, "triton")
    for layer in range(3):
        cache, query = (
            torch.randn(each.shape, dtype=each.dtype, device=each.device, generator=generator)
            for each in (batch.kv_cache, batch.query)
        )
        outs = []
        for each in (flex, pass_of(batch, FLEX, "triton")):
            outs.append(torch.full_like(query, float("nan")))
            launch.attend(each, query, KVView(cache), context, batch.shape.scale, outs[-1])
        if not torch.equal(*outs):
            raise BenchmarkError(f"layer {layer} of a step differs from the same layer in a step of its own")


def run(recorder: Recorder) -> None:
    for case in cases(recorder.dry_run):
        batch = make_paged_batch([case.query_len], [case.seq_len], case.shape)
        check_other_layers(batch)
        variants, layers = works(batch), 2 if recorder.dry_run else LAYERS
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(1 if recorder.dry_run else STEPS + 1):
            for name, (start, layer) in variants.items():
                spent = host_ms(start, layer, layers)
                if turn > 0 or recorder.dry_run:
                    samples[name].append(spent)
        for name, times in samples.items():
            recorder.add("host_side", case.name, name, "time", "ms", times)
        del batch, variants
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
