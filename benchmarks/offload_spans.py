"""Two layers of the 8B shape with buffers for spans of the context, and with all KV in GPU memory, in turns.

As `benchmarks.offload_far`, but with too little GPU memory for buffers that hold a head of the whole context.
"""

from benchmarks import offload_far
from benchmarks.engine import EngineSpec, Request
from benchmarks.offload import GIB, OFF, measure_and_record
from benchmarks.record import Recorder

SPANS = "farspan-offload-spans"
LENGTHS = (409600, 131072)
POOL_BYTES = GIB // 4
"""67 slots of 1 MiB for a step, and half of the rest for the buffers: spans of about 94K tokens."""
DRY_POOL_BYTES = 400 * 1024
"""Seven slots of 32 KiB, and buffers of six pages for a context of 19."""
REPORTED = {OFF: ("prefill", "decode"), SPANS: ("prefill", "decode")}


def cases(dry_run: bool) -> list[Request]:
    """List the requests, the most important first."""
    if dry_run:
        return [Request(300, 3), Request(50, 3, 2)]
    return [Request(LENGTHS[0], 5), Request(LENGTHS[1], 5, 2)]


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by variant."""
    memory = {OFF: 2**27, SPANS: DRY_POOL_BYTES} if dry_run else {OFF: offload_far.POOL_BYTES[OFF], SPANS: POOL_BYTES}
    return offload_far.specs_with(memory, cases(dry_run), dry_run)


def run(recorder: Recorder) -> None:
    label = "tiny-far-fp32" if recorder.dry_run else f"llama8b-{offload_far.LAYERS}layers-bf16"
    results = measure_and_record(recorder, engine_specs(recorder.dry_run), label, REPORTED)
    for name, gib in results[SPANS].timings[-1].memory_parts.items():
        recorder.note(f"{SPANS}: {gib:8.3f} GiB {name}")
