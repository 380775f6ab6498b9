"""`benchmarks.offload` with all layers of the 8B shape: what the host does for a step does not grow with them.

All pages of a request of 100K tokens in slots, but for a few, or all but a few on the host, staged by few heads at a
time or layer by layer. On a GPU without room for four such engines at once, one without offload and one with few slots.
"""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.engine import LLAMA_8B, TINY_LLAMA, EngineSpec, Request
from benchmarks.offload import COLD, FITS, GIB, OFF, OUTPUT_LEN, REPORTED, engine_specs, measure_and_record
from benchmarks.record import Recorder

LENGTH = 102400
LAYERWISE = "farspan-offload-layer"
ROOM_FOR_FOUR = 120 * GIB
KV_BYTES = {OFF: 14 * GIB, FITS: 14 * GIB, COLD: 3 * GIB, LAYERWISE: 29 * GIB // 8}
"""All pages of the longest request and a few; about 180 of its 801 pages."""
KV_HEADS, DRY_KV_HEADS = 8, 2


def cases(dry_run: bool) -> list[Request]:
    """List the requests."""
    return [Request(310, 5)] if dry_run else [Request(LENGTH, 17, 2), Request(1024, 4 * OUTPUT_LEN, 5)]


def specs_of(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by variant."""
    specs = engine_specs(dry_run)
    group = DRY_KV_HEADS if dry_run else KV_HEADS
    specs[LAYERWISE] = replace(specs[COLD], options={"offload": {"group_size": group}})
    if dry_run:
        return {name: replace(spec, requests=cases(dry_run), model=TINY_LLAMA) for name, spec in specs.items()}
    has_room = torch.cuda.get_device_properties(0).total_memory >= ROOM_FOR_FOUR

    def whole(name: str, spec: EngineSpec) -> EngineSpec:
        memory: dict[str, Any] = {"kv_cache_memory_bytes": KV_BYTES[name]}
        return replace(spec, requests=cases(dry_run), model=LLAMA_8B, engine=spec.engine | memory)

    return {name: whole(name, spec) for name, spec in specs.items() if has_room or name in (OFF, COLD)}


def run(recorder: Recorder) -> None:
    label = "tiny-whole-fp32" if recorder.dry_run else "llama8b-bf16"
    measure_and_record(recorder, specs_of(recorder.dry_run), label, REPORTED | {LAYERWISE: REPORTED[COLD]})
