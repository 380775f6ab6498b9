"""Block selection of dynamic sparse prefill on calibrated inputs, whole and by stages, 8K to 1M tokens."""

from collections.abc import Callable

import torch
from farspan.kernels.flex import estimate as flex_estimate
from farspan.kernels.flex import select as flex_select
from farspan.kernels.flex.types import NO_LIMIT, Budget
from farspan.kernels.tiles import make_prefill_tiles

from benchmarks.calls import kv_of, paged_of
from benchmarks.inputs import TINY, PagedBatch, PrefillCase, make_calibrated_batch
from benchmarks.record import Recorder
from benchmarks.timing import time_interleaved

BLOCK_SIZE = 128
GAMMA = 0.95
TAU = 0.1
MIN_BLOCKS = 8


def cases(dry_run: bool) -> list[PrefillCase]:
    """List whole prompts, and the last 8K chunk of long prompts."""
    if dry_run:
        return [PrefillCase(70, 200, TINY)]
    whole = [PrefillCase(n, n) for n in (8192, 32768, 65536, 131072, 262144)]
    return [*whole, PrefillCase(8192, 131072), PrefillCase(8192, 1048576)]


def stages(batch: PagedBatch, block_size: int = BLOCK_SIZE) -> dict[str, Callable[[], object]]:
    """Build the calls of the whole selection and of its two stages."""
    device, shape = batch.query.device, batch.shape
    tiles = make_prefill_tiles(batch.query_start_loc.tolist(), batch.seq_lens_cpu, block_size, device)
    tensors = (batch.query, kv_of(batch), paged_of(batch))
    group = shape.num_q_heads // shape.num_kv_heads

    def estimate() -> flex_estimate.FlexEstimate:
        return flex_estimate.estimate(*tensors, tiles.max_kv_blocks, block_size, shape.scale)

    found = estimate()

    def select(group: int = 1, found: flex_estimate.FlexEstimate = found) -> object:
        budget = Budget(GAMMA, TAU, MIN_BLOCKS, NO_LIMIT, group)
        return flex_select.select(*tensors, tiles, shape.scale, found, budget)

    return {
        "farspan": lambda: select(found=estimate()),
        "farspan-estimate": estimate,
        "farspan-lists": select,
        "farspan-lists-shared": lambda: select(group),
    }


def run(recorder: Recorder) -> None:
    for case in cases(recorder.dry_run):
        batch = make_calibrated_batch(case.query_len, case.seq_len, case.shape)
        works = stages(batch, 64 if recorder.dry_run else BLOCK_SIZE)
        for name, samples in time_interleaved(works, repeats=10).items():
            recorder.add("select", case.name, name, "time", "ms", samples)
        del batch, works
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
