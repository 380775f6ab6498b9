"""`benchmarks.offload_memory` under 17 GiB, with host memory for a million tokens: a request of 16K.

Steps of 512 tokens, whose pages take few slots, and no graphs. Weights take 15 GiB, so that the buffers for prefill
hold a span of the longest context, not all of it.
"""

import psutil
import torch

from benchmarks.engine import EngineSpec, Request
from benchmarks.offload_memory import COLD, dry_spec, measured, record_capped, shape
from benchmarks.record import BenchmarkError, Recorder

CAP_BYTES = 17 * 2**30
CONTEXT = 1 << 20
HOST_GIB = 129
OUTSIDE_BYTES = int(1.1 * 2**30)
"""What an engine takes beside what vLLM counts: the context of CUDA, and, after vLLM has counted, the tables by which
the GPU finds host memory. H200, 2026-11: 0.95 GiB with 98 GiB of host memory."""


def cases(dry_run: bool) -> list[Request]:
    """List the requests."""
    return [Request(200, 5)] if dry_run else [Request(16384, 5)]


def engine_spec(dry_run: bool) -> EngineSpec:
    (request,) = cases(dry_run)
    if dry_run:
        return dry_spec(request)
    free = psutil.virtual_memory().available
    if free < (HOST_GIB + 8) * 2**30:
        raise BenchmarkError(f"offload_tight needs {HOST_GIB + 8} GiB of host memory, {free / 2**30:.0f} are free.")
    return EngineSpec(
        [request],
        shape(CONTEXT),
        "CUSTOM",
        {"offload": {"host_memory": HOST_GIB, "group_size": 1}},
        {
            "max_num_batched_tokens": 512,
            "max_num_seqs": 1,
            "max_model_len": CONTEXT,
            "gpu_memory_utilization": (CAP_BYTES - OUTSIDE_BYTES) / torch.cuda.get_device_properties(0).total_memory,
            "enforce_eager": True,
        },
        warmup_lens=[4096],
    )


def run(recorder: Recorder) -> None:
    (request,) = cases(recorder.dry_run)
    model = "tiny-fp32" if recorder.dry_run else "llama8b-bf16"
    cap = f"cap{CAP_BYTES // 2**30}gib"
    result = measured(recorder, "tight", engine_spec(recorder.dry_run))
    record_capped(recorder, result, f"n{request.prompt_len}-b1-{model}-{cap}", CAP_BYTES)
    context = float(result.timings[0].max_model_len)
    recorder.add("offload_memory", f"longest-{model}-{cap}", COLD, "context", "tokens", [context])
