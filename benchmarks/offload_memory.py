"""What fits under a cap of GPU memory with cold KV heads in host memory, what it takes, and what vLLM fits there alone.

Each engine with the GPU to itself, as `plan` and a user would start it:

- `capped`: the 8B shape under 24 GB, as on a consumer GPU, with host memory for a context of a million tokens:
  requests of 100K and 400K tokens;
- `stock`: vLLM's own backend under the same cap: the longest context that it fits by itself.

`--cases capped` leaves out the other. `benchmarks.offload_tight` has a smaller cap. Memory of the GPU is all that is
taken of it after the request, as nvidia-smi shows it; of the host, the largest resident memory of the engine's process,
pinned pages included.
"""

from collections.abc import Callable
from typing import Any

import psutil
import torch

from benchmarks.engine import LLAMA_8B, TINY_LLAMA, EngineResult, EngineSpec, Request, Timing, measure_in_turns
from benchmarks.record import BenchmarkError, Recorder

CHOOSES_CASES = True

GIB = 2**30
CAP_BYTES = 24 * 10**9
UTILIZATION = 0.92
"""Of the cap, as vLLM takes of a GPU by default: it leaves the CUDA context out of what it counts."""
CAPPED_CONTEXT = 1 << 20
HOST_GIB = 129
"""What a context of a million tokens takes with all heads cold is 128; a plan's rounding comes on top."""
GOAL_CONTEXTS = 20
COLD, STOCK = "farspan-offload-cold", "fa3"


def cases(dry_run: bool) -> list[Request]:
    """List the requests."""
    return [Request(300, 5), Request(500, 5)] if dry_run else [Request(102400, 17), Request(409600, 9)]


def shape(max_len: int) -> dict[str, Any]:
    return LLAMA_8B | {"max_position_embeddings": max_len + 4096}


def check_host_memory(name: str) -> None:
    """Raise BenchmarkError where the host has too little for the pool."""
    free = psutil.virtual_memory().available
    if free < (HOST_GIB + 8) * GIB:
        raise BenchmarkError(f"{name} needs {HOST_GIB + 8} GiB of host memory, {free / GIB:.0f} are free.")


def dry_spec(requests: list[Request]) -> EngineSpec:
    """A small engine whose pages are nearly all cold."""
    engine = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 1, "kv_cache_memory_bytes": 3 * 2**19}
    return EngineSpec(requests, TINY_LLAMA, "CUSTOM", {"offload": {"group_size": 1}}, engine)


def capped_spec(dry_run: bool) -> EngineSpec:
    """The engine with cold heads."""
    if dry_run:
        return dry_spec(cases(dry_run))
    check_host_memory("offload_memory")
    return EngineSpec(
        cases(dry_run),
        shape(CAPPED_CONTEXT),
        "CUSTOM",
        {"offload": {"host_memory": HOST_GIB}},
        capped_engine(CAPPED_CONTEXT),
        warmup_lens=[24576],
    )


def stock_spec(dry_run: bool) -> EngineSpec:
    """The engine of vLLM's own backend."""
    if dry_run:
        return EngineSpec([Request(300, 1)], TINY_LLAMA, None, engine={"kv_cache_memory_bytes": 2**27})
    # -1: as long as fits.
    return EngineSpec([Request(1024, 1)], shape(CAPPED_CONTEXT), "FLASH_ATTN", engine=capped_engine(-1))


def capped_engine(max_model_len: int) -> dict[str, Any]:
    share = UTILIZATION * CAP_BYTES / torch.cuda.get_device_properties(0).total_memory
    return {
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 1,
        "gpu_memory_utilization": share,
        "max_model_len": max_model_len,
    }


def record_memory(recorder: Recorder, name: str, timings: list[Timing], case: str) -> None:
    recorder.add("offload_memory", case, name, "host_memory", "GiB", [each.host_memory_gib for each in timings])
    taken = [each.device_memory_gib for each in timings]
    if max(taken) > 0:
        recorder.add("offload_memory", case, name, "peak_gpu_memory", "GiB", taken)


def record_times(recorder: Recorder, name: str, timings: list[Timing], case: str) -> None:
    """Write first tokens, and steps of the second half of each answer.

    Without graphs the host may launch the first steps of an answer as fast as tokens arrive, while the device, which
    takes longer for each, falls behind by less than what the prompt's last step had ahead.
    """
    steps = [ms for each in timings for ms in each.tpot_ms[len(each.tpot_ms) // 2 :]]
    recorder.add("offload_prefill", f"ttft-{case}", name, "time", "ms", [each.ttft_ms for each in timings])
    recorder.add("offload_decode", f"tpot-{case}", name, "time", "ms", steps)
    recorder.note(f"{case}: ms between tokens {[round(ms, 1) for each in timings for ms in each.tpot_ms]}")


def told(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


def measured(
    recorder: Recorder, engine: str, spec: EngineSpec, tell: Callable[[Request, EngineResult], None] | None = None
) -> EngineResult:
    """Run an engine alone; tell: called after each request."""

    def told_one(request: Request, results: dict[str, EngineResult]) -> None:
        if tell is not None:
            tell(request, results[engine])

    result = measure_in_turns({engine: spec}, timeout_s=420, tell=told_one)[engine]
    recorder.note(f"{engine}: engine ready after {result.start_s:.0f} s")
    return result


def record_capped(recorder: Recorder, timings: list[Timing], label: str, cap_bytes: int) -> None:
    """Write what an engine under a cap took and did for one prompt length.

    label: of model and cap.
    """
    case = f"n{timings[-1].prompt_len}-b1-{label}"
    record_memory(recorder, COLD, timings, case)
    record_times(recorder, COLD, timings, case)
    most = max(each.device_memory_gib for each in timings)
    limit = cap_bytes / GIB
    for name, gib in timings[-1].memory_parts.items():
        recorder.note(f"{case}: {gib:8.3f} GiB {name}")
    recorder.note(f"{case}: {most:.2f} GiB of {limit:.2f} taken at most, {told(most <= limit)}")


def record_longest(recorder: Recorder, name: str, result: EngineResult, label: str) -> int:
    """Write the longest context that an engine takes, in tokens."""
    context = result.timings[0].max_model_len
    recorder.add("offload_memory", f"longest-{label}", name, "context", "tokens", [float(context)])
    return context


def run(recorder: Recorder) -> None:
    label = f"{'tiny-fp32' if recorder.dry_run else 'llama8b-bf16'}-cap{CAP_BYTES // 10**9}gb"
    contexts: dict[str, int] = {}
    if recorder.wants("capped"):

        def tell(request: Request, result: EngineResult) -> None:
            record_capped(recorder, result.of(request.prompt_len), label, CAP_BYTES)

        result = measured(recorder, "capped", capped_spec(recorder.dry_run), tell)
        contexts[COLD] = record_longest(recorder, COLD, result, label)
    if recorder.wants("stock"):
        stock = measured(recorder, "stock", stock_spec(recorder.dry_run))
        contexts[STOCK] = record_longest(recorder, STOCK, stock, label)
    if len(contexts) == 2:
        ratio = contexts[COLD] / contexts[STOCK]
        verdict = told(ratio >= GOAL_CONTEXTS)
        recorder.note(f"{label}: {ratio:.1f} times the longest context of vLLM alone, goal {GOAL_CONTEXTS} {verdict}")
