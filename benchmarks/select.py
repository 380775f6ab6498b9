"""Block selection of dynamic sparse prefill on random inputs, beside dense attention, 8K to 1M tokens.

`farspan` selects by tile rows, `farspan-masses` is its pass over the keys, `farspan-portable` selects by the kernel of
all devices, `farspan-16of256` by half as many rows; `farspan-flexprefill` selects by the paper's rule. Selection is to
take at most a tenth of dense attention on the same chunk. None depends on the inputs.
"""

from collections.abc import Callable

import torch
from farspan.engine_ext.config import FlexPrefill
from farspan.engine_ext.selection.methods import TILE_ROWS_RULE, flex_budget
from farspan.kernels.flex import select as flex_select
from farspan.kernels.flex import tile_rows
from farspan.kernels.flex.spans import SpanRule, make_spans
from farspan.kernels.tiles import make_prefill_tiles
from farspan.kernels.tuning import device_capability, tile_rows_config

from benchmarks import calls, peers
from benchmarks.calls import kv_of, paged_of
from benchmarks.inputs import TINY, AttentionShape, PagedBatch, PrefillCase, make_paged_batch
from benchmarks.record import Recorder
from benchmarks.timing import time_interleaved

BLOCK_SIZE = 128
QWEN_05B = AttentionShape(num_q_heads=14, num_kv_heads=2, head_dim=64)


def cases(dry_run: bool) -> list[PrefillCase]:
    """List whole prompts, and chunks of long ones as chunked prefill computes them."""
    if dry_run:
        return [PrefillCase(300, 400, TINY)]
    whole = [PrefillCase(n, n) for n in (8192, 32768)]
    chunks = [PrefillCase(8192, n) for n in (32768, 65536, 131072, 1048576)]
    small = [PrefillCase(8192, n, QWEN_05B) for n in (8192, 32768, 131072)]
    return [*whole, *chunks, PrefillCase(16384, 131072), *small]


def stages(batch: PagedBatch, block_size: int = BLOCK_SIZE) -> dict[str, Callable[[], object]]:
    """Build the calls of the selections and of dense attention."""
    device, shape = batch.query.device, batch.shape
    starts = batch.query_start_loc.tolist()
    tiles = make_prefill_tiles(starts, batch.seq_lens_cpu, block_size, device)
    rule = SpanRule(TILE_ROWS_RULE.span_len * block_size // BLOCK_SIZE, TILE_ROWS_RULE.rows_per_span)
    spans = make_spans(starts, batch.seq_lens_cpu, tiles, rule)
    wide_spans = make_spans(starts, batch.seq_lens_cpu, tiles, SpanRule(2 * block_size, 16))
    kv, paged = kv_of(batch), paged_of(batch)
    inputs = (batch.query, kv, paged, tiles)
    budget = flex_budget(FlexPrefill(), block_size, 1)
    paper = flex_budget(FlexPrefill(selection="flexprefill"), block_size, 1)
    config = tile_rows.log_sums_config(batch.query, kv, rule, block_size, None)
    portable = tile_rows_config(
        shape.head_dim,
        shape.dtype,
        device_capability(device),
        block_size=block_size,
        keys_in_a_row=shape.page_size,
    )
    log_sums = torch.empty(
        shape.num_q_heads * spans.num_spans * rule.rows_per_span * tiles.max_kv_blocks, device=device
    )

    launch = tile_rows.LogSumsLaunch(batch.query, kv.keys, paged, spans, tiles.max_kv_blocks, block_size, None, config)

    works: dict[str, Callable[[], object]] = {
        "farspan": lambda: tile_rows.tile_row_lists(*inputs, spans, shape.scale, budget),
        "farspan-masses": lambda: launch(batch.query, kv.keys, shape.scale, None, log_sums),
        "farspan-portable": lambda: tile_rows.tile_row_lists(*inputs, spans, shape.scale, budget, config=portable),
        "farspan-16of256": lambda: tile_rows.tile_row_lists(*inputs, wide_spans, shape.scale, budget),
        "farspan-flexprefill": lambda: flex_select.flex_block_lists(*inputs, shape.scale, paper),
        "farspan-dense": calls.prefill(batch),
    }
    if peers.has_module("vllm.vllm_flash_attn"):
        works["fa3"] = peers.fa3(batch)
    return works


def run(recorder: Recorder) -> None:
    for case in cases(recorder.dry_run):
        batch = make_paged_batch([case.query_len], [case.seq_len], case.shape)
        works = stages(batch, 64 if recorder.dry_run else BLOCK_SIZE)
        for name, samples in time_interleaved(works, repeats=7).items():
            recorder.add("select", case.name, name, "time", "ms", samples)
        del batch, works
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
