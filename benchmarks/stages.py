"""Where the time to the first token goes: by stage of the device over a long prompt, and on the host over short ones.

A few layers of the 8B shape prefill 128K tokens, by FLASH_ATTN and by flex at gamma 0.9: time of a layer over the whole
prompt and in its last chunk, as the kernels of each stage take it. All layers of the 0.5B shape prefill 1K and 4K
tokens, where flex is dense: what the host spends in a step, and of it in attention, KV write and metadata.
`--cases` chooses among prompts.
"""

from dataclasses import replace
from typing import Any

from benchmarks.engine import EngineResult, Request, measure_in_turns
from benchmarks.flex_ttft import SHAPES, engines
from benchmarks.record import Recorder, quantile

NAME = "stages"
NEEDS_GPU = True
CHOOSES_CASES = True
LONG, SHORT = "llama8b-4layers", "qwen0.5b"
MODELS: dict[str, dict[str, Any]] = {LONG: SHAPES["llama8b"] | {"num_hidden_layers": 4}, SHORT: SHAPES[SHORT]}
VARIANTS = {LONG: ("fa3", "farspan-g0.9"), SHORT: ("fa3", "farspan", "farspan-g0.95")}
WHOLE_MODEL_LAYERS = 32


def cases(dry_run: bool) -> dict[str, list[Request]]:
    """Requests of each shape, in ascending order of length."""
    if dry_run:
        return {LONG: [Request(600, stages="device")], SHORT: [Request(300, 1, 2, stages="host")]}
    return {
        LONG: [Request(131072, 1, 2, stages="device")],
        SHORT: [Request(length, 1, 20, stages="host") for length in (1024, 4096)],
    }


def run(recorder: Recorder) -> None:
    from benchmarks.engine import TINY_LLAMA

    precision = "fp32" if recorder.dry_run else "bf16"
    for label, all_requests in cases(recorder.dry_run).items():
        requests = [each for each in all_requests if recorder.wants(case_of(each, label, precision))]
        if not requests:
            continue
        model = TINY_LLAMA if recorder.dry_run else MODELS[label]
        specs = {
            name: replace(spec, reads_stages=True)
            for name, spec in engines(model, requests, recorder.dry_run, VARIANTS[label]).items()
        }
        results = measure_in_turns(specs, timeout_s=300)
        for request in requests:
            case = case_of(request, label, precision)
            for name, result in results.items():
                record(recorder, case, name, result, request, model["num_hidden_layers"])


def case_of(request: Request, label: str, precision: str) -> str:
    """What rows call it, before the stage."""
    return f"n{request.prompt_len}-b1-{label}-{precision}"


def record(recorder: Recorder, case: str, name: str, result: EngineResult, request: Request, num_layers: int) -> None:
    """Record the stages of one engine and request, and print them side by side.

    Device times are those of one layer; host times those of one step, all its layers together.
    """
    timings = result.of(request.prompt_len)
    stages = {stage for timing in timings for stage in timing.stages if "calls/" not in stage and stage != "layers"}
    medians = {}
    for stage in sorted(stages):
        # Nothing, as where the device never waits, is no time of a row.
        samples = [timing.stages[stage] for timing in timings if timing.stages.get(stage, 0.0) > 0]
        if not samples:
            continue
        if request.stages == "device":
            samples = [sample / num_layers for sample in samples]
        medians[stage] = quantile(samples, 0.5)
        recorder.add(NAME, f"{case}-{stage.replace('/', '-')}", name, "time", "ms", samples)
    told = ", ".join(f"{stage} {ms:.3f}" for stage, ms in sorted(medians.items(), key=lambda each: -each[1]))
    ttft = quantile([timing.ttft_ms for timing in timings], 0.5)
    unit = f"ms a layer; all layers of 8B are {WHOLE_MODEL_LAYERS}" if request.stages == "device" else "ms a step"
    calls = {stage: count for stage, count in timings[-1].stages.items() if "calls/" in stage or stage == "layers"}
    recorder.note(f"{case} {name}: first token {ttft:.1f} ms; {unit}: {told}; {calls}")
