"""Two layers of the 8B shape at 400K and a million tokens: with memory for a few pages, and with all KV in GPU memory.

In turns. First tokens and times between tokens; by layers, as a whole model would take minutes.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.engine import LLAMA_8B, TINY_LLAMA, EngineSpec, Request
from benchmarks.offload import COLD, GIB, OFF, measure_and_record
from benchmarks.record import Recorder

LAYERS = 2
LENGTHS = (409600, 1 << 20, 10240)
REPORTED = {OFF: ("prefill", "decode"), COLD: ("prefill", "decode")}
POOL_BYTES = {OFF: 9 * GIB, COLD: 5 * GIB // 4}


def cases(dry_run: bool) -> list[Request]:
    """List the requests, the most important first."""
    if dry_run:
        return [Request(300, 3), Request(50, 3, 2)]
    return [Request(length, 5, 3 if length < 100000 else 1) for length in LENGTHS]


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by variant."""
    memory = {OFF: 2**27, COLD: 3 * 2**19} if dry_run else POOL_BYTES
    return specs_with(memory, cases(dry_run), dry_run)


def specs_with(memory: Mapping[str, int], requests: list[Request], dry_run: bool) -> dict[str, EngineSpec]:
    """Engines by variant; memory: for KV on the GPU, in bytes; all but OFF are with offload."""
    if dry_run:
        engine: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 1}
        model, warmup = TINY_LLAMA, [300]
        offload: dict[str, Any] = {"group_size": 1}
    else:
        engine = {"max_num_batched_tokens": 8192, "max_num_seqs": 1, "gpu_memory_utilization": 0.3}
        warmup = [40960]
        model = LLAMA_8B | {"num_hidden_layers": LAYERS, "max_position_embeddings": max(LENGTHS) + 4096}
        offload = {"host_memory": 9}
    return {
        name: EngineSpec(
            requests,
            model,
            "CUSTOM",
            {} if name == OFF else {"offload": offload},
            engine | {"kv_cache_memory_bytes": memory[name]},
            warmup_lens=warmup,
        )
        for name in memory
    }


def run(recorder: Recorder) -> None:
    label = "tiny-far-fp32" if recorder.dry_run else f"llama8b-{LAYERS}layers-bf16"
    measure_and_record(recorder, engine_specs(recorder.dry_run), label, REPORTED)
