"""What fits under a cap of GPU memory with cold KV heads in host memory, what it takes, and what vLLM fits there alone.

One engine after another, each with the GPU to itself:

- the 8B shape under 24 GB, as on a consumer GPU, with host memory for a context of 768K: a request of 100K tokens;
- vLLM's own backend under the same cap: the longest context that it fits by itself;
- the 8B shape with KV in GPU memory, no cap: the same request;
- two layers of that shape with memory for a few pages: a request of one million tokens.

Memory of the GPU is all that is taken of it after the request, as nvidia-smi shows it; of the host, the largest
resident memory of the engine's process, pinned pages included.
"""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.engine import LLAMA_8B, TINY_LLAMA, EngineResult, EngineSpec, Request, logprob_distance, measure
from benchmarks.record import BenchmarkError, Recorder

CAP_BYTES = 24 * 10**9
CAPPED_CONTEXT = 786432
HOST_GIB = 98
"""What a context of 768K takes with all heads cold is 96; a plan's stubs and rounding come on top."""
LENGTH, MILLION = 102400, 1 << 20
GOAL_CONTEXTS = 20
LOGPROB_TOLERANCE = 0.25
OFF, COLD, STOCK = "farspan", "farspan-offload-cold", "fa3"


def cases(dry_run: bool) -> list[Request]:
    """List the requests: the one of whole models, and the one of two layers."""
    if dry_run:
        return [Request(300, 5), Request(900, 3)]
    return [Request(LENGTH, 9, 2), Request(MILLION, 3)]


def shape(layers: int, max_len: int) -> dict[str, Any]:
    return LLAMA_8B | {"num_hidden_layers": layers, "max_position_embeddings": max_len + 4096}


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by what they are for: `capped`, `stock`, `resident` and `million`."""
    request, million = cases(dry_run)
    if dry_run:
        engine: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 1}
        few, plenty = engine | {"kv_cache_memory_bytes": 2**20}, {"kv_cache_memory_bytes": 2**27}
        cold = EngineSpec([request], TINY_LLAMA, "CUSTOM", {"offload": {"group_size": 1}}, few)
        return {
            "capped": cold,
            "stock": EngineSpec([request], TINY_LLAMA, None, engine=plenty),
            "resident": EngineSpec([request], TINY_LLAMA, "CUSTOM", {}, plenty),
            "million": replace(cold, requests=[million]),
        }
    share = CAP_BYTES / torch.cuda.get_device_properties(0).total_memory
    engine = {"max_num_batched_tokens": 8192, "max_num_seqs": 1}
    capped = engine | {"gpu_memory_utilization": share}
    model = shape(32, CAPPED_CONTEXT)
    short = Request(1024, 1)
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
        "stock": EngineSpec([short], model, "FLASH_ATTN", engine=capped | {"max_model_len": -1}),
        "resident": EngineSpec(
            [request], model, "CUSTOM", {}, engine | {"gpu_memory_utilization": 0.9}, warmup_lens=[24576]
        ),
        "million": EngineSpec(
            [million],
            shape(2, MILLION),
            "CUSTOM",
            {"offload": {"host_memory": 9}},
            engine | {"kv_cache_memory_bytes": 3 * 2**30},
            warmup_lens=[24576],
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


def run(recorder: Recorder) -> None:
    dry_run = recorder.dry_run
    specs = engine_specs(dry_run)
    request, million = cases(dry_run)
    model, few = ("tiny-fp32", "tiny-fp32") if dry_run else ("llama8b-bf16", "llama8b-2layers-bf16")
    case = f"n{request.prompt_len}-b1-{model}"
    cap = f"cap{CAP_BYTES // 10**9}gb"

    def measured(engine: str) -> EngineResult:
        result = measure(specs[engine], timeout_s=200)
        recorder.note(f"{engine}: engine ready after {result.start_s:.0f} s")
        return result

    capped = measured("capped")
    record_memory(recorder, COLD, capped, f"{case}-{cap}")
    record_times(recorder, COLD, capped, case)
    stock = measured("stock")
    contexts = {COLD: capped.timings[0].max_model_len, STOCK: stock.timings[0].max_model_len}
    for name, context in contexts.items():
        recorder.add("offload_memory", f"longest-{model}-{cap}", name, "context", "tokens", [float(context)])
    ratio = contexts[COLD] / contexts[STOCK]
    verdict = "reached" if ratio >= GOAL_CONTEXTS else "MISSED"
    recorder.note(f"{cap}: {ratio:.1f} times the longest context of vLLM alone, goal {GOAL_CONTEXTS} {verdict}")

    longest = measured("million")
    record_memory(recorder, COLD, longest, f"n{million.prompt_len}-b1-{few}")
    record_times(recorder, COLD, longest, f"n{million.prompt_len}-b1-{few}")

    resident = measured("resident")
    distance = max(logprob_distance(*pair) for pair in zip(capped.timings, resident.timings, strict=True))
    recorder.note(f"n{request.prompt_len}: first-token log probabilities differ by {distance:.4f}")
    if not distance <= LOGPROB_TOLERANCE:
        raise BenchmarkError(f"n{request.prompt_len}: log probabilities off by {distance:.3f}")
    record_memory(recorder, OFF, resident, case)
    record_times(recorder, OFF, resident, case)
