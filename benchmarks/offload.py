"""Cold KV heads in host memory: what they cost where everything fits, and how fast they are where nothing does.

Engines of the 8B shape with a quarter of its layers, side by side and in turns:

- `offload_fits`: requests that fit, with offload on and off;
- `offload_prefill` and `offload_decode`: the same requests with memory for a few pages only, so that all others lie in
  host memory.

`benchmarks.offload_whole` has all layers, `benchmarks.offload_far` two layers and a million tokens,
`benchmarks.offload_decode` the decode call of one layer, `benchmarks.offload_exact` the tokens of trained models.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.engine import (
    LLAMA_8B,
    TINY_LLAMA,
    EngineResult,
    EngineSpec,
    Request,
    check_first_tokens,
    measure_in_turns,
)
from benchmarks.record import Recorder

OFF, FITS, COLD = "farspan", "farspan-offload", "farspan-offload-cold"
GIB = 2**30
LAYERS = 8
QUARTER_8B: dict[str, Any] = LLAMA_8B | {"num_hidden_layers": LAYERS, "max_position_embeddings": 270336}
OUTPUT_LEN = 33
WARMUP_LEN = 24576
COLD_GIB = 0.75
"""For KV of the engine whose pages are cold: two buffers of a head over 256K are a third of it, and about 127 pages
of a prompt lie in slots, of 1025 at 128K."""
REPORTED = {OFF: ("fits", "prefill", "decode"), FITS: ("fits",), COLD: ("prefill", "decode")}
"""Which of the claims an engine's times are for."""


def cases(dry_run: bool) -> list[Request]:
    """List prompt lengths of the engines, the most important first; repeats where they are cheap."""
    if dry_run:
        return [Request(50, 5, 2), Request(300, 5, 1)]
    return [
        Request(131072, OUTPUT_LEN, 2),
        Request(1024, 4 * OUTPUT_LEN, 5),
        Request(32768, 2 * OUTPUT_LEN, 3),
        Request(262144, 9, 1),
    ]


def engine_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """One engine without offload, one with memory for all that it is asked, and one with memory for a few pages."""
    requests = cases(dry_run)
    if dry_run:
        arguments: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 2}
        # 22 slots of 32 KiB, and two buffers of one head.
        cold: dict[str, Any] = {"kv_cache_memory_bytes": 2**20}
        fits: dict[str, Any] = {"kv_cache_memory_bytes": 2**27}
        model, group = TINY_LLAMA, 1
    else:
        arguments = {"gpu_memory_utilization": 0.3, "max_num_batched_tokens": 8192, "max_num_seqs": 1}
        cold, fits = {"kv_cache_memory_bytes": int(COLD_GIB * GIB)}, {"kv_cache_memory_bytes": 10 * GIB}
        model, group = QUARTER_8B, 0
    offload: dict[str, Any] = {"offload": {"group_size": group} if group else {}}

    def spec(options: dict[str, Any], memory: dict[str, Any]) -> EngineSpec:
        # More than the slots of the third engine hold, so that everything has run once.
        return EngineSpec(
            requests,
            model,
            "CUSTOM",
            options,
            arguments | memory,
            warmup_lens=[300 if dry_run else WARMUP_LEN],
        )

    return {OFF: spec({}, fits), FITS: spec(offload, fits), COLD: spec(offload, cold)}


def record_request(
    recorder: Recorder, request: Request, results: Mapping[str, EngineResult], label: str, reported: Mapping[str, Any]
) -> None:
    """Write what the engines did with a request, after checking that they agree on its first token.

    results: by variant; reported: as REPORTED.
    """
    length = request.prompt_len
    case = f"n{length}-b1-{label}"
    for name in results:
        timings = results[name].of(length)
        distance = check_first_tokens(f"{name} n{length}", timings, results[OFF].of(length))
        recorder.note(f"{name} n{length}: first-token log probabilities differ by {distance:.4f}")
        ttft = [timing.ttft_ms for timing in timings]
        tpot = [ms for timing in timings for ms in timing.tpot_ms[1:]]
        for benchmark in reported[name]:
            if benchmark != "decode":
                recorder.add(f"offload_{benchmark}", f"ttft-{case}", name, "time", "ms", ttft)
            if benchmark != "prefill":
                recorder.add(f"offload_{benchmark}", f"tpot-{case}", name, "time", "ms", tpot)


def measure_and_record(
    recorder: Recorder,
    specs: Mapping[str, EngineSpec],
    label: str,
    reported: Mapping[str, Any] = REPORTED,
    timeout_s: float = 300,
) -> dict[str, EngineResult]:
    """Run engines in turns and write the rows of each request as soon as it is done."""

    def tell(request: Request, results: dict[str, EngineResult]) -> None:
        record_request(recorder, request, results, label, reported)

    results = measure_in_turns(specs, timeout_s=timeout_s, tell=tell)
    for name, result in results.items():
        recorder.note(f"{name}: engine ready after {result.start_s:.0f} s")
    return results


def run(recorder: Recorder) -> None:
    label = "tiny-fp32" if recorder.dry_run else f"llama8b-{LAYERS}layers-bf16"
    measure_and_record(recorder, engine_specs(recorder.dry_run), label)
