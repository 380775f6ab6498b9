"""Time to the first token and between tokens in vLLM, one request at a time, 8B shape: our backend and vLLM's own.

Weights are random and seeded, with attention biases that give the heads patterns (benchmarks.calibrated_model). Times
of our dense prefill are recorded only if the first token's log probabilities agree with FLASH_ATTN's. Sparse prefill is
approximate: it is recorded with its density and the attention mass that it kept, measured in the timed runs.
"""

from benchmarks.engine import (
    CALIBRATED_8B,
    TINY_LLAMA,
    EngineResult,
    EngineSpec,
    Request,
    check_first_tokens,
    logprob_distance,
    measure,
)
from benchmarks.record import Recorder

BASELINE = "fa3"
GAMMAS = (0.95, 0.9)
WORST_HEADS = 5


def cases(dry_run: bool) -> list[Request]:
    """List prompt lengths, with more repeats of the cheap ones."""
    if dry_run:
        return [Request(50, 4, 2), Request(200, 4, 1)]
    return [Request(1024, 65, 5), Request(32768, 65, 3), Request(131072, 65, 1)]


def check(result: EngineResult, baseline: EngineResult, prompt_len: int, recorder: Recorder) -> None:
    """Raise BenchmarkError unless our first tokens' log probabilities agree with the baseline's."""
    distance = check_first_tokens(f"n{prompt_len}", result.of(prompt_len), baseline.of(prompt_len))
    recorder.note(f"n{prompt_len}: largest difference of first-token log probabilities to {BASELINE}: {distance:.3f}")


def record(recorder: Recorder, name: str, result: EngineResult, prompt_len: int, label: str) -> None:
    timings = result.of(prompt_len)
    case = f"n{prompt_len}-b1-{label}"
    recorder.add("ttft", case, name, "time", "ms", [timing.ttft_ms for timing in timings])
    recorder.add("tpot", case, name, "time", "ms", [ms for timing in timings for ms in timing.tpot_ms[1:]])


def record_selection(recorder: Recorder, name: str, result: EngineResult, prompt_len: int, label: str) -> None:
    """Add density and kept mass per layer and head; nothing where a short prompt was dense."""
    rows = result.selection[str(prompt_len)]
    case = f"n{prompt_len}-b1-{label}"
    densities = [row["density"] for row in rows if row["chunks"]]
    coverages = [row["coverage"] for row in rows if row["coverage"] is not None]
    if densities:
        recorder.add("ttft", case, name, "density", "fraction", densities)
    if coverages:
        recorder.add("ttft", case, name, "coverage", "fraction", coverages)
        worst = [
            f"layer {row['layer']} head {row['head']}: coverage {row['coverage']:.3f}, density {row['density']:.3f}"
            for row in sorted(rows, key=lambda row: row["coverage"])[:WORST_HEADS]
        ]
        recorder.note(f"{name} n{prompt_len}: worst heads: {'; '.join(worst)}")


def run(recorder: Recorder) -> None:
    model, label = (TINY_LLAMA, "tiny-fp32") if recorder.dry_run else (CALIBRATED_8B, "llama8b-bf16")
    requests = cases(recorder.dry_run)

    def measure_dense(name: str, backend: str | None) -> EngineResult:
        result = measure(EngineSpec(requests, model, backend))
        recorder.note(f"{name}: engine ready after {result.start_s:.0f} s")
        return result

    # On the CPU vLLM has only one backend.
    baseline = measure_dense(BASELINE, None if recorder.dry_run else "FLASH_ATTN")
    ours = measure_dense("farspan", "CUSTOM")
    for request in requests:
        record(recorder, BASELINE, baseline, request.prompt_len, label)
        check(ours, baseline, request.prompt_len, recorder)
        record(recorder, "farspan", ours, request.prompt_len, label)
    for gamma in GAMMAS:
        name = f"farspan-g{gamma}"
        prefill = {"method": "flex", "gamma": gamma}
        if recorder.dry_run:
            prefill |= {"min_seq_len": 0, "min_chunk_len": 0, "min_budget": 0}
        spec = EngineSpec(
            requests,
            model,
            "CUSTOM",
            options={"prefill": prefill},
            reads_selection=True,
            warmup_lens=[requests[-1].prompt_len],
        )
        result = measure(spec)
        for request in requests:
            record(recorder, name, result, request.prompt_len, label)
            record_selection(recorder, name, result, request.prompt_len, label)
            distance = logprob_distance(result.of(request.prompt_len)[0], baseline.of(request.prompt_len)[0])
            recorder.note(f"{name} n{request.prompt_len}: first-token log probabilities differ by {distance:.3f}")
    if not recorder.dry_run:
        peer = measure_dense("triton_attn", "TRITON_ATTN")
        for request in requests:
            record(recorder, "triton_attn", peer, request.prompt_len, label)
