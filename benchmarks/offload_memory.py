"""What fits under a cap of GPU memory with cold KV heads in host memory, what it takes, and what vLLM fits there alone.

Each with the GPU to itself, as `plan` and a user would start them:

- the 8B shape under 24 GB, as on a consumer GPU, with host memory for a context of 768K: a request of 100K tokens;
- vLLM's own backend under the same cap: the longest context that it fits by itself;
- two layers of that shape with memory for a few pages, and in turns with it two layers with all KV in GPU memory:
  requests of 10K, 400K and one million tokens;
- the 8B shape with KV in GPU memory, no cap: the request of 100K.

Memory of the GPU is all that is taken of it after the request, as nvidia-smi shows it; of the host, the largest
resident memory of the engine's process, pinned pages included.
"""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.engine import (
    LLAMA_8B,
    TINY_LLAMA,
    EngineResult,
    EngineSpec,
    Request,
    check_first_tokens,
    measure,
    measure_in_turns,
)
from benchmarks.record import Recorder

CAP_BYTES = 24 * 10**9
UTILIZATION = 0.92
"""Of the cap, as vLLM takes of a GPU by default: it leaves the CUDA context out of what it counts."""
CAPPED_CONTEXT = 786432
HOST_GIB = 98
"""What a context of 768K takes with all heads cold is 96; a plan's stubs and rounding come on top."""
LENGTH = 102400
FAR_LENGTHS = (10240, 409600, 1 << 20)
FAR_CONTEXT = FAR_LENGTHS[-1]
GOAL_CONTEXTS = 20
OFF, COLD, STOCK = "farspan", "farspan-offload-cold", "fa3"


def cases(dry_run: bool) -> list[Request]:
    """List the requests: the one of whole models, then those of two layers."""
    if dry_run:
        return [Request(300, 5), Request(50, 3, 2), Request(900, 3)]
    return [Request(LENGTH, 9, 2), *(Request(length, 3, 3 if length < LENGTH else 1) for length in FAR_LENGTHS)]


def shape(layers: int, max_len: int) -> dict[str, Any]:
    return LLAMA_8B | {"num_hidden_layers": layers, "max_position_embeddings": max_len + 4096}


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The engines by what they are for: `capped`, `stock`, `resident`, and of two layers `far` and `far-resident`."""
    request, *far = cases(dry_run)
    if dry_run:
        engine: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 1}
        few, plenty = engine | {"kv_cache_memory_bytes": 3 * 2**19}, {"kv_cache_memory_bytes": 2**27}
        cold = EngineSpec([request], TINY_LLAMA, "CUSTOM", {"offload": {"group_size": 1}}, few)
        return {
            "capped": cold,
            "stock": EngineSpec([request], TINY_LLAMA, None, engine=plenty),
            "resident": EngineSpec([request], TINY_LLAMA, "CUSTOM", {}, plenty),
            "far": replace(cold, requests=far),
            "far-resident": EngineSpec(far, TINY_LLAMA, "CUSTOM", {}, engine | plenty),
        }
    share = UTILIZATION * CAP_BYTES / torch.cuda.get_device_properties(0).total_memory
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
        "far": EngineSpec(
            far,
            shape(2, FAR_CONTEXT),
            "CUSTOM",
            {"offload": {"host_memory": 9}},
            engine | {"kv_cache_memory_bytes": 3 * 2**30},
            warmup_lens=[24576],
        ),
        "far-resident": EngineSpec(
            far, shape(2, FAR_CONTEXT), "CUSTOM", {}, engine | {"kv_cache_memory_bytes": 9 * 2**30}, warmup_lens=[24576]
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


def note_first_tokens(recorder: Recorder, case: str, ours: EngineResult, other: EngineResult) -> None:
    """Raise BenchmarkError where two engines do not agree on the first tokens of the same requests."""
    distance = check_first_tokens(case, ours.timings, other.timings)
    recorder.note(f"{case}: first-token log probabilities differ by {distance:.4f}")


def told(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


def run(recorder: Recorder) -> None:
    dry_run = recorder.dry_run
    specs = engine_specs(dry_run)
    request, *far = cases(dry_run)
    model, few = ("tiny-fp32", "tiny-fp32") if dry_run else ("llama8b-bf16", "llama8b-2layers-bf16")
    case = f"n{request.prompt_len}-b1-{model}"
    cap = f"cap{CAP_BYTES // 10**9}gb"

    def tell_start(engine: str, result: EngineResult) -> None:
        recorder.note(f"{engine}: engine ready after {result.start_s:.0f} s")

    def measured(engine: str) -> EngineResult:
        result = measure(specs[engine], timeout_s=200)
        tell_start(engine, result)
        return result

    capped = measured("capped")
    record_memory(recorder, COLD, capped, f"{case}-{cap}")
    record_times(recorder, COLD, capped, f"{case}-{cap}")
    peak = max(each.device_memory_gib for each in capped.timings)
    limit = CAP_BYTES / 2**30
    recorder.note(f"{cap}: {peak:.2f} GiB of {limit:.2f} taken at most, {told(peak <= limit)}")
    stock = measured("stock")
    contexts = {COLD: capped.timings[0].max_model_len, STOCK: stock.timings[0].max_model_len}
    for name, context in contexts.items():
        recorder.add("offload_memory", f"longest-{model}-{cap}", name, "context", "tokens", [float(context)])
    ratio = contexts[COLD] / contexts[STOCK]
    verdict = told(ratio >= GOAL_CONTEXTS)
    recorder.note(f"{cap}: {ratio:.1f} times the longest context of vLLM alone, goal {GOAL_CONTEXTS} {verdict}")

    pair = measure_in_turns({OFF: specs["far-resident"], COLD: specs["far"]}, timeout_s=300)
    for name, result in pair.items():
        tell_start(f"far, {name}", result)
    for each in far:
        far_case = f"n{each.prompt_len}-b1-{few}"
        of_length = {name: replace(result, timings=result.of(each.prompt_len)) for name, result in pair.items()}
        note_first_tokens(recorder, far_case, of_length[COLD], of_length[OFF])
        for name, result in of_length.items():
            record_times(recorder, name, result, far_case)

    resident = measured("resident")
    note_first_tokens(recorder, case, capped, resident)
    record_memory(recorder, OFF, resident, case)
    record_times(recorder, OFF, resident, f"{case}-{cap}")
