"""What fits under a cap of GPU memory with cold KV heads in host memory, what it takes, and what vLLM fits there alone.

Each engine with the GPU to itself, as `plan` and a user would start it:

- the 8B shape under 24 GB, as on a consumer GPU, with host memory for a context of 768K: a request of 100K tokens;
- vLLM's own backend under the same cap: the longest context that it fits by itself.

`benchmarks.offload_tight` has a smaller cap and a longer context. Memory of the GPU is all that is taken of it after
the request, as nvidia-smi shows it; of the host, the largest resident memory of the engine's process, pinned pages
included.
"""

from typing import Any

import torch

from benchmarks.engine import LLAMA_8B, TINY_LLAMA, EngineResult, EngineSpec, Request, measure
from benchmarks.record import Recorder

CAP_BYTES = 24 * 10**9
UTILIZATION = 0.92
"""Of the cap, as vLLM takes of a GPU by default: it leaves the CUDA context out of what it counts."""
CAPPED_CONTEXT = 786432
HOST_GIB = 98
"""What a context of 768K takes with all heads cold is 96; a plan's stubs and rounding come on top."""
LENGTH = 102400
GOAL_CONTEXTS = 20
COLD, STOCK = "farspan-offload-cold", "fa3"


def cases(dry_run: bool) -> list[Request]:
    """List the requests."""
    return [Request(300, 5)] if dry_run else [Request(LENGTH, 9, 2)]


def shape(max_len: int) -> dict[str, Any]:
    return LLAMA_8B | {"max_position_embeddings": max_len + 4096}


def dry_spec(request: Request) -> EngineSpec:
    """A small engine whose pages are nearly all cold."""
    engine = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 1, "kv_cache_memory_bytes": 3 * 2**19}
    return EngineSpec([request], TINY_LLAMA, "CUSTOM", {"offload": {"group_size": 1}}, engine)


def engine_specs(dry_run: bool) -> tuple[EngineSpec, EngineSpec]:
    """The engine with cold heads, and vLLM's own."""
    (request,) = cases(dry_run)
    if dry_run:
        return dry_spec(request), EngineSpec([request], TINY_LLAMA, None, engine={"kv_cache_memory_bytes": 2**27})
    share = UTILIZATION * CAP_BYTES / torch.cuda.get_device_properties(0).total_memory
    engine = {"max_num_batched_tokens": 8192, "max_num_seqs": 1, "gpu_memory_utilization": share}
    model = shape(CAPPED_CONTEXT)
    capped = EngineSpec(
        [request],
        model,
        "CUSTOM",
        {"offload": {"host_memory": HOST_GIB}},
        engine | {"max_model_len": CAPPED_CONTEXT},
        warmup_lens=[24576],
    )
    # -1: as long as fits.
    return capped, EngineSpec([Request(1024, 1)], model, "FLASH_ATTN", engine=engine | {"max_model_len": -1})


def record_memory(recorder: Recorder, name: str, result: EngineResult, case: str) -> None:
    recorder.add("offload_memory", case, name, "host_memory", "GiB", [each.host_memory_gib for each in result.timings])
    taken = [each.device_memory_gib for each in result.timings]
    if max(taken) > 0:
        recorder.add("offload_memory", case, name, "peak_gpu_memory", "GiB", taken)


def record_times(recorder: Recorder, name: str, result: EngineResult, case: str) -> None:
    steps = [ms for each in result.timings for ms in each.tpot_ms[1:]]
    recorder.add("offload_prefill", f"ttft-{case}", name, "time", "ms", [each.ttft_ms for each in result.timings])
    recorder.add("offload_decode", f"tpot-{case}", name, "time", "ms", steps)


def told(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


def measured(recorder: Recorder, engine: str, spec: EngineSpec) -> EngineResult:
    result = measure(spec, timeout_s=240)
    recorder.note(f"{engine}: engine ready after {result.start_s:.0f} s")
    return result


def record_capped(recorder: Recorder, result: EngineResult, case: str, cap_bytes: int) -> None:
    """Write what an engine under a cap took and did."""
    record_memory(recorder, COLD, result, case)
    record_times(recorder, COLD, result, case)
    most = max(each.device_memory_gib for each in result.timings)
    limit = cap_bytes / 2**30
    for name, gib in result.timings[-1].memory_parts.items():
        recorder.note(f"{case}: {gib:8.3f} GiB {name}")
    recorder.note(f"{case}: {most:.2f} GiB of {limit:.2f} taken at most, {told(most <= limit)}")


def run(recorder: Recorder) -> None:
    capped_spec, stock_spec = engine_specs(recorder.dry_run)
    (request,) = cases(recorder.dry_run)
    model = "tiny-fp32" if recorder.dry_run else "llama8b-bf16"
    cap = f"cap{CAP_BYTES // 10**9}gb"
    capped = measured(recorder, "capped", capped_spec)
    record_capped(recorder, capped, f"n{request.prompt_len}-b1-{model}-{cap}", CAP_BYTES)
    stock = measured(recorder, "stock", stock_spec)
    contexts = {COLD: capped.timings[0].max_model_len, STOCK: stock.timings[0].max_model_len}
    for name, context in contexts.items():
        recorder.add("offload_memory", f"longest-{model}-{cap}", name, "context", "tokens", [float(context)])
    ratio = contexts[COLD] / contexts[STOCK]
    verdict = told(ratio >= GOAL_CONTEXTS)
    recorder.note(f"{cap}: {ratio:.1f} times the longest context of vLLM alone, goal {GOAL_CONTEXTS} {verdict}")
