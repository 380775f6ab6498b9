"""Decode of whole engines whose pages lie on the host: exact, selective, and in GPU memory, in turns.

Eight layers of the 8B shape whose heads have patterns (`benchmarks.calibrated_model`), which are sparser than real
ones: times are those of the pages that were read, whose share is printed. `benchmarks.offload_select` has the calls of
one layer.
"""

from dataclasses import replace
from typing import Any

from benchmarks.engine import CALIBRATED_8B, TINY_LLAMA, EngineSpec, Request
from benchmarks.offload import COLD, GIB, LAYERS, OFF, measure_and_record
from benchmarks.record import Recorder

SELECT = "farspan-offload-select"
LENGTH, OUTPUT_LEN = 131072, 33
KV_GIB = {OFF: 5.0, COLD: 0.625, SELECT: 1.16}
"""Cold: 128 slots of 4 MiB and two buffers of one head; selective decode has bounds of 1,026 blocks, too."""
REPORTED = dict.fromkeys(KV_GIB, ("decode",))


def cases(dry_run: bool) -> list[Request]:
    """List the requests."""
    return [Request(300, 5, 1)] if dry_run else [Request(LENGTH, OUTPUT_LEN, 2)]


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by variant."""
    if dry_run:
        engine: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 1}
        kv_bytes = {OFF: 2**27, COLD: 2**20, SELECT: 2**20}
        model, options = TINY_LLAMA, {"group_size": 1}
    else:
        engine = {"max_num_batched_tokens": 8192, "max_num_seqs": 1, "gpu_memory_utilization": 0.3}
        kv_bytes = {name: int(gib * GIB) for name, gib in KV_GIB.items()}
        model, options = CALIBRATED_8B | {"num_hidden_layers": LAYERS, "max_position_embeddings": 135168}, {}
    off = EngineSpec(
        cases(dry_run),
        model,
        "CUSTOM",
        {},
        engine | {"kv_cache_memory_bytes": kv_bytes[OFF]},
        warmup_lens=[300 if dry_run else 24576],
    )

    def cold(name: str, **more: Any) -> EngineSpec:
        memory = {"kv_cache_memory_bytes": kv_bytes[name]}
        return replace(off, options={"offload": {**options, **more}}, engine=engine | memory)

    return {OFF: off, COLD: cold(COLD), SELECT: cold(SELECT, cold_decode={"method": "select"})}


def run(recorder: Recorder) -> None:
    label = "tiny-select-fp32" if recorder.dry_run else f"llama8b-{LAYERS}layers-calibrated-bf16"
    results = measure_and_record(recorder, engine_specs(recorder.dry_run), label, REPORTED)
    exact, selective = (results[name].timings[-1] for name in (COLD, SELECT))
    same = sum(a == b for a, b in zip(exact.token_ids, selective.token_ids, strict=True))
    recorder.note(f"{SELECT}: {same} of {len(exact.token_ids)} tokens are those of exact decode")
    for name in (COLD, SELECT):
        pages = results[name].timings[-1].selected_pages
        if pages:
            recorder.note(f"{name}: {pages[0] / max(pages[1], 1):.1%} of the pages in host memory were read")
