"""`benchmarks.offload_memory` under 17 GiB, with host memory for a million tokens: a request of 16K.

Steps of 512 tokens, whose pages take few slots, and no graphs: a short answer would tell of the host alone. Weights
take 15 GiB, so that the buffers for prefill hold a span of the longest context, not all of it.
"""

import torch

from benchmarks.engine import EngineSpec, Request
from benchmarks.offload_memory import (
    CAPPED_CONTEXT,
    COLD,
    GIB,
    HOST_GIB,
    check_host_memory,
    dry_spec,
    measured,
    record_capped,
    record_longest,
    shape,
)
from benchmarks.record import Recorder

CAP_BYTES = 17 * GIB
OUTSIDE_BYTES = int(1.1 * GIB)
"""What an engine takes beside what vLLM counts: the context of CUDA, and, after vLLM has counted, the tables by which
the GPU finds host memory. H200, 2026-11: 0.95 GiB with 98 GiB of host memory."""


def cases(dry_run: bool) -> list[Request]:
    """List the requests."""
    return [Request(200, 5)] if dry_run else [Request(16384, 41)]


def engine_spec(dry_run: bool) -> EngineSpec:
    if dry_run:
        return dry_spec(cases(dry_run))
    check_host_memory("offload_tight")
    return EngineSpec(
        cases(dry_run),
        shape(CAPPED_CONTEXT),
        "CUSTOM",
        {"offload": {"host_memory": HOST_GIB, "group_size": 1}},
        {
            "max_num_batched_tokens": 512,
            "max_num_seqs": 1,
            "max_model_len": CAPPED_CONTEXT,
            "gpu_memory_utilization": (CAP_BYTES - OUTSIDE_BYTES) / torch.cuda.get_device_properties(0).total_memory,
            "enforce_eager": True,
        },
        warmup_lens=[4096],
    )


def run(recorder: Recorder) -> None:
    label = f"{'tiny-fp32' if recorder.dry_run else 'llama8b-bf16'}-cap{CAP_BYTES // GIB}gib"
    result = measured(recorder, "tight", engine_spec(recorder.dry_run))
    record_capped(recorder, result.timings, label, CAP_BYTES)
    record_longest(recorder, COLD, result, label)
