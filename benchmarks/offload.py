"""Cold KV heads in host memory: what they cost where everything fits, and how fast they are where nothing does.

Engines of the 8B shape with a quarter of its layers, side by side and in turns:

- `offload_fits`: requests that fit, with offload on and off;
- `offload_prefill` and `offload_decode`: the same requests with memory for a few pages only, so that all others lie in
  host memory.

Then `offload_fits` once more with all layers, as what the host does for a step does not grow with them; and the shape
of a 0.5B model in float32 with a prompt of 32K and nearly all pages cold, whose tokens must be those of offload off.

`benchmarks.offload_decode` has the decode call of one layer.
"""

from collections.abc import Mapping
from dataclasses import replace
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
from benchmarks.flex_ttft import SHAPES
from benchmarks.record import BenchmarkError, Recorder

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
    """List prompt lengths of the engines; repeats where they are cheap."""
    if dry_run:
        return [Request(50, 5, 2), Request(300, 5, 1)]
    return [
        Request(1024, 4 * OUTPUT_LEN, 5),
        Request(32768, 2 * OUTPUT_LEN, 3),
        Request(131072, OUTPUT_LEN, 2),
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


def whole_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """All layers of the shape, without offload and with memory for all that they are asked."""
    requests = [Request(310, 5)] if dry_run else [Request(1024, 4 * OUTPUT_LEN, 5), Request(131072, 2 * OUTPUT_LEN)]
    specs = engine_specs(dry_run)
    # The pages of 128K tokens, and a few.
    memory = {} if dry_run else {"kv_cache_memory_bytes": 17 * GIB}
    model = TINY_LLAMA if dry_run else LLAMA_8B
    return {
        name: replace(specs[name], requests=requests, model=model, engine=specs[name].engine | memory)
        for name in (OFF, FITS)
    }


def exact_specs(dry_run: bool) -> dict[str, EngineSpec]:
    """The shape of a 0.5B model in float32, without offload and with memory for the fewest pages."""
    specs = engine_specs(dry_run)
    if dry_run:
        return {name: replace(specs[name], requests=specs[name].requests[1:]) for name in (OFF, COLD)}
    model = SHAPES["qwen0.5b"] | {"torch_dtype": "float32"}
    # A step of 8K writes 64 pages of 3 MiB.
    memory = {OFF: 2 * GIB, COLD: GIB // 4}
    requests = [Request(32704, OUTPUT_LEN)]
    return {
        name: replace(
            specs[name],
            requests=requests,
            model=model,
            engine=specs[name].engine | {"kv_cache_memory_bytes": memory[name], "dtype": "float32"},
        )
        for name in (OFF, COLD)
    }


def check_tokens(recorder: Recorder) -> None:
    """Raise BenchmarkError where an engine with cold pages gives other tokens than one without offload."""
    results = measure_in_turns(exact_specs(recorder.dry_run), timeout_s=240)
    for ours, other in zip(results[COLD].timings, results[OFF].timings, strict=True):
        same = sum(a == b for a, b in zip(ours.token_ids, other.token_ids, strict=True))
        told = f"n{ours.prompt_len}, 0.5B in float32: {same} of {len(ours.token_ids)} tokens are those of offload off"
        recorder.note(told)
        if same < len(ours.token_ids):
            raise BenchmarkError(told)


def record_engines(
    recorder: Recorder, results: Mapping[str, EngineResult], requests: list[Request], label: str
) -> None:
    """Write what the engines did, after checking that they agree on the first token.

    results: by variant; without COLD, for what fits alone.
    """
    for request in requests:
        length = request.prompt_len
        case = f"n{length}-b1-{label}"
        for name in results:
            benchmarks = REPORTED[name] if COLD in results else ("fits",)
            timings = results[name].of(length)
            distance = check_first_tokens(f"{name} n{length}", timings, results[OFF].of(length))
            recorder.note(f"{name} n{length}: first-token log probabilities differ by {distance:.4f}")
            ttft = [timing.ttft_ms for timing in timings]
            tpot = [ms for timing in timings for ms in timing.tpot_ms[1:]]
            for benchmark in benchmarks:
                if benchmark != "decode":
                    recorder.add(f"offload_{benchmark}", f"ttft-{case}", name, "time", "ms", ttft)
                if benchmark != "prefill":
                    recorder.add(f"offload_{benchmark}", f"tpot-{case}", name, "time", "ms", tpot)


def run(recorder: Recorder) -> None:
    dry_run = recorder.dry_run
    label = "tiny-fp32" if dry_run else f"llama8b-{LAYERS}layers-bf16"
    results = measure_in_turns(engine_specs(dry_run), timeout_s=420)
    for name, result in results.items():
        recorder.note(f"{name}: engine ready after {result.start_s:.0f} s")
    record_engines(recorder, results, cases(dry_run), label)
    whole = whole_specs(dry_run)
    results = measure_in_turns(whole, timeout_s=240)
    record_engines(recorder, results, whole[OFF].requests, "tiny-whole-fp32" if dry_run else "llama8b-bf16")
    check_tokens(recorder)
