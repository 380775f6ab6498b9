"""Two layers of the 8B shape with buffers for spans of the context or for all of it, and with all KV in GPU memory.

In turns, as `benchmarks.offload_far`, both ways of staging with about as many slots.
"""

from benchmarks import offload_far
from benchmarks.engine import EngineSpec, Request
from benchmarks.offload import COLD, GIB, OFF, measure_and_record
from benchmarks.record import Recorder

SPANS = "farspan-offload-spans"
LENGTHS = (409600, 131072)
POOL_BYTES = {OFF: offload_far.POOL_BYTES[OFF], SPANS: GIB // 4, COLD: 9 * GIB // 16}
"""Of cold heads: 67 slots of 1 MiB for a step, and half of the rest for the buffers, which makes spans of about 94K
tokens; or buffers for the whole context."""
DRY_POOL_BYTES = {OFF: 2**27, SPANS: 400 * 1024, COLD: 3 * 2**18}
"""Spans: seven slots of 32 KiB, and buffers of six pages for a context of 19."""
REPORTED = dict.fromkeys(POOL_BYTES, ("prefill", "decode"))


def cases(dry_run: bool) -> list[Request]:
    """List the requests, the most important first."""
    if dry_run:
        return [Request(300, 3), Request(50, 3, 2)]
    return [Request(LENGTHS[0], 5), Request(LENGTHS[1], 5, 2)]


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by variant."""
    return offload_far.specs_with(DRY_POOL_BYTES if dry_run else POOL_BYTES, cases(dry_run), dry_run)


def run(recorder: Recorder) -> None:
    label = "tiny-far-fp32" if recorder.dry_run else f"llama8b-{offload_far.LAYERS}layers-bf16"
    results = measure_and_record(recorder, engine_specs(recorder.dry_run), label, REPORTED)
    for name in (SPANS, COLD):
        for part, gib in results[name].timings[-1].memory_parts.items():
            recorder.note(f"{name}: {gib:8.3f} GiB {part}")
