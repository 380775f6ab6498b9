"""What shifted rotary positions (STRING) cost: prefill and decode at 64K to 128K tokens, with and without the shift.

Four measurements, the first three with our Triton kernels on both sides:

- the prefill call of one layer, interleaved, and that of FlashAttention 3;
- the decode call of one layer, in CUDA graphs;
- two 8B-shape engines on one GPU, with and without the shift, in turns: time to the first token, time between tokens,
  and peak memory of each request;
- the same with the kernels that farspan chooses: FlashAttention 3, and ours for shifted chunks.

The third is figure 9 of the STRING paper (arXiv 2410.18745, appendix A.3), where the shift costs 3.6 to 5.0 % more time
and up to 4.7 GB more memory.
"""

from typing import Any

import torch
from farspan.kernels.rotary_turn import Turn, make_string_turn

from benchmarks import calls, peers
from benchmarks.engine import (
    LLAMA_8B,
    TINY_LLAMA,
    EngineResult,
    EngineSpec,
    Request,
    logprob_distance,
    measure_in_turns,
)
from benchmarks.gate import check_attention
from benchmarks.inputs import LLAMA_8B as LLAMA_8B_LAYER
from benchmarks.inputs import TINY, AttentionShape, make_paged_batch
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.timing import Work, time_graphs, time_interleaved

NAME = "string_e2e"
ON, OFF, FA3 = "farspan-string", "farspan-triton", "fa3"
# With the kernels that farspan chooses.
ON_AUTO, OFF_AUTO = "farspan-string-auto", "farspan"
ROPE_BASE = LLAMA_8B["rope_theta"]
WINDOW = 128
FRACTION = 0.33
OUTPUT_LEN = 17
REPEATS = 6
"""Of a prefill call, which takes a quarter of a second at 128K."""
ENGINE_REPEATS = 2
WARMUP_LEN = 65536
# Both engines share one GPU and have caches of the same size: a larger peak is then one of activations.
ENGINE_ROOM = {"kv_cache_memory_bytes": 18 * 2**30, "gpu_memory_utilization": 0.4}


def prompt_lens(dry_run: bool) -> list[int]:
    """List the lengths of figure 9."""
    return [200, 300] if dry_run else [length * 1024 for length in (64, 80, 96, 112, 128)]


def auto_prompt_lens(dry_run: bool) -> list[int]:
    """List lengths for the kernels that farspan chooses; the first is below the shift."""
    return [90, 200] if dry_run else [length * 1024 for length in (32, 64, 128)]


def shift_of(dry_run: bool) -> int:
    """S in tokens, for kernels and engine alike."""
    return 100 if dry_run else int(FRACTION * 131072)


def make_turn(shape: AttentionShape, dry_run: bool, device: torch.device) -> Turn:
    inv_freq = ROPE_BASE ** -(torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
    return make_string_turn(inv_freq, shift_of(dry_run), WINDOW if not dry_run else 10, True, device)


def run_kernels(recorder: Recorder, shape: AttentionShape, length: int) -> None:
    """Time one layer's calls at one length, after checking both variants' results."""
    case = f"n{length}-b1-{shape.label}"
    batch = make_paged_batch([length], [length], shape)
    turn = make_turn(shape, recorder.dry_run, batch.query.device)
    works: dict[str, Work] = {}
    for name, applied in ((OFF, None), (ON, turn)):
        call = calls.prefill(batch, applied)
        error = check_attention(batch, *call(), name=name, turn=applied)
        works[name] = call
        recorder.note(f"prefill {case} {name}: relative error {error:.1e}")
    if peers.has_module("vllm.vllm_flash_attn"):
        works[FA3] = peers.fa3(batch)
    for name, samples in time_interleaved(works, repeats=REPEATS, warmup=1).items():
        recorder.add(NAME, f"prefill-{case}", name, "time", "ms", samples)

    token = make_paged_batch([1], [length], shape)
    graphs: dict[str, list[Work]] = {}
    for name, applied in ((OFF, None), (ON, turn)):
        call = calls.decode(token, applied)
        check_attention(token, *call(), name=name, turn=applied)
        graphs[name] = [call]
    for name, samples in time_graphs(graphs).items():
        recorder.add(NAME, f"decode-{case}", name, "time", "ms", samples)


def engine_specs(
    dry_run: bool, lengths: list[int], off: str, on: str, kernel: str, model: dict[str, Any] = LLAMA_8B
) -> dict[str, EngineSpec]:
    """An engine without the shift and one with it, decoding in full graphs. model: config.json, but in a dry run."""
    # On the CPU there is no choice of kernels.
    options: dict[str, Any] = {} if dry_run else {"kernel": kernel}
    string = {"shift": shift_of(dry_run), "window": 10 if dry_run else WINDOW}
    requests = [Request(length, OUTPUT_LEN, ENGINE_REPEATS) for length in lengths]

    def spec(options: dict[str, Any]) -> EngineSpec:
        if dry_run:
            return EngineSpec(requests, TINY_LLAMA, "CUSTOM", options)
        return EngineSpec(requests, model, "CUSTOM", options, ENGINE_ROOM, warmup_lens=[WARMUP_LEN])

    return {off: spec(options), on: spec(options | {"string": string})}


def record_engine(recorder: Recorder, name: str, result: EngineResult, length: int, label: str) -> None:
    timings = result.of(length)
    case = f"n{length}-b1-{label}"
    recorder.add(NAME, f"ttft-{case}", name, "time", "ms", [timing.ttft_ms for timing in timings])
    recorder.add(NAME, f"tpot-{case}", name, "time", "ms", [ms for timing in timings for ms in timing.tpot_ms[1:]])
    recorder.add(
        NAME, f"total-{case}", name, "time", "ms", [timing.ttft_ms + sum(timing.tpot_ms) for timing in timings]
    )
    peaks = [timing.peak_gpu_memory_gib for timing in timings]
    if max(peaks) > 0:
        recorder.add(NAME, f"engine-{case}", name, "peak_gpu_memory", "GiB", peaks)


def run_engines(recorder: Recorder, specs: dict[str, EngineSpec], label: str) -> None:
    """Time whole requests. specs: two, the engine without the shift first."""
    lengths = [request.prompt_len for request in next(iter(specs.values())).requests]
    results = measure_in_turns(specs)
    for name, result in results.items():
        recorder.note(f"{name}: engine ready after {result.start_s:.0f} s")
        for length in lengths:
            record_engine(recorder, name, result, length, label)
    off, on = results.values()
    for length in lengths:
        is_shifted = length > shift_of(recorder.dry_run)
        if is_shifted == (logprob_distance(off.of(length)[0], on.of(length)[0]) == 0):
            raise BenchmarkError(f"n{length}: log probabilities {'do not ' if is_shifted else ''}show the shift")


def run(recorder: Recorder) -> None:
    shape, label = (TINY, "tiny-fp32") if recorder.dry_run else (LLAMA_8B_LAYER, "llama8b-bf16")
    lengths = prompt_lens(recorder.dry_run)
    for length in sorted({lengths[0], lengths[-1]}):
        run_kernels(recorder, shape, length)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    dry_run = recorder.dry_run
    run_engines(recorder, engine_specs(dry_run, lengths, OFF, ON, "triton"), label)
    run_engines(recorder, engine_specs(dry_run, auto_prompt_lens(dry_run), OFF_AUTO, ON_AUTO, "auto"), label)
