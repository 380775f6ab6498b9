"""What fits under a cap of GPU memory with cold KV heads in host memory, what it takes, and what vLLM fits there alone.

Each engine with the GPU to itself, as `plan` and a user would start it:

- the 8B shape under 24 GB, as on a consumer GPU, with host memory for a context of 768K: a request of 100K tokens;
- vLLM's own backend under the same cap: the longest context that it fits by itself;
- the 8B shape under 17 GiB with host memory for a million tokens, in steps of 512 without graphs: a request of 16K.
  Where the host has not so much memory it is left out.

Memory of the GPU is all that is taken of it after the request, as nvidia-smi shows it; of the host, the largest
resident memory of the engine's process, pinned pages included.
"""

from dataclasses import replace
from typing import Any

import psutil
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
TIGHT_BYTES = 17 * 2**30
TIGHT_CONTEXT = 1 << 20
TIGHT_HOST_GIB = 129
TIGHT_LENGTH = 16384
OUTSIDE_BYTES = int(0.97 * 2**30)
"""What an engine takes beside what vLLM counts: the context of CUDA, and the tables by which the GPU finds host memory.
H200, 2026-11: 0.95 GiB with 98 GiB of host memory."""
GOAL_CONTEXTS = 20
COLD, STOCK = "farspan-offload-cold", "fa3"


def cases(dry_run: bool) -> list[Request]:
    """List the requests: under the larger cap, and under the tight one."""
    if dry_run:
        return [Request(300, 5), Request(200, 5)]
    return [Request(LENGTH, 9, 2), Request(TIGHT_LENGTH, 5)]


def shape(layers: int, max_len: int) -> dict[str, Any]:
    return LLAMA_8B | {"num_hidden_layers": layers, "max_position_embeddings": max_len + 4096}


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by what they are for: `capped`, `stock` and `tight`."""
    request, tight = cases(dry_run)
    if dry_run:
        engine: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 1}
        few, plenty = engine | {"kv_cache_memory_bytes": 3 * 2**19}, {"kv_cache_memory_bytes": 2**27}
        cold = EngineSpec([request], TINY_LLAMA, "CUSTOM", {"offload": {"group_size": 1}}, few)
        return {
            "capped": cold,
            "stock": EngineSpec([request], TINY_LLAMA, None, engine=plenty),
            "tight": replace(cold, requests=[tight]),
        }
    total = torch.cuda.get_device_properties(0).total_memory
    engine = {"max_num_batched_tokens": 8192, "max_num_seqs": 1}
    capped = engine | {"gpu_memory_utilization": UTILIZATION * CAP_BYTES / total}
    model = shape(32, CAPPED_CONTEXT)
    tight_engine: dict[str, Any] = {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 1,
        "max_model_len": TIGHT_CONTEXT,
        "gpu_memory_utilization": (TIGHT_BYTES - OUTSIDE_BYTES) / total,
        "enforce_eager": True,
    }
    return {
        "capped": EngineSpec(
            [request],
            model,
            "CUSTOM",
            {"offload": {"host_memory": HOST_GIB}},
            capped | {"max_model_len": CAPPED_CONTEXT},
            warmup_lens=[24576],
        ),
        # -1: as long as fits.
        "stock": EngineSpec([Request(1024, 1)], model, "FLASH_ATTN", engine=capped | {"max_model_len": -1}),
        "tight": EngineSpec(
            [tight],
            shape(32, TIGHT_CONTEXT),
            "CUSTOM",
            {"offload": {"host_memory": TIGHT_HOST_GIB, "group_size": 1}},
            tight_engine,
            warmup_lens=[4096],
        ),
    }


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
    recorder.note(f"{case}: {most:.2f} GiB of {limit:.2f} taken at most, {told(most <= limit)}")


def run(recorder: Recorder) -> None:
    dry_run = recorder.dry_run
    specs = engine_specs(dry_run)
    request, tight = cases(dry_run)
    model = "tiny-fp32" if dry_run else "llama8b-bf16"
    cap = f"cap{CAP_BYTES // 10**9}gb"
    capped = measured(recorder, "capped", specs["capped"])
    record_capped(recorder, capped, f"n{request.prompt_len}-b1-{model}-{cap}", CAP_BYTES)
    stock = measured(recorder, "stock", specs["stock"])
    contexts = {COLD: capped.timings[0].max_model_len, STOCK: stock.timings[0].max_model_len}
    for name, context in contexts.items():
        recorder.add("offload_memory", f"longest-{model}-{cap}", name, "context", "tokens", [float(context)])
    ratio = contexts[COLD] / contexts[STOCK]
    verdict = told(ratio >= GOAL_CONTEXTS)
    recorder.note(f"{cap}: {ratio:.1f} times the longest context of vLLM alone, goal {GOAL_CONTEXTS} {verdict}")

    if not dry_run and psutil.virtual_memory().available < (TIGHT_HOST_GIB + 8) * 2**30:
        recorder.note(f"the host has not {TIGHT_HOST_GIB} GiB free: no engine for a million tokens")
        return
    result = measured(recorder, "tight", specs["tight"])
    cap = f"cap{TIGHT_BYTES // 2**30}gib"
    record_capped(recorder, result, f"n{tight.prompt_len}-b1-{model}-{cap}", TIGHT_BYTES)
    longest = float(result.timings[0].max_model_len)
    recorder.add("offload_memory", f"longest-{model}-{cap}", COLD, "context", "tokens", [longest])
