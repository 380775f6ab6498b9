"""Whether flex is ever slower than dense: time to the first token with the default options, in shapes of 0.5B to 8B.

FLASH_ATTN, our dense prefill and flex answer the same whole prompts in turns on one GPU. The goal is 1.02 times the
faster of the dense ones or less, at every length; what misses it is noted.
"""

from typing import Any

from benchmarks.engine import CALIBRATED_8B, TINY_LLAMA, EngineResult, EngineSpec, Request, measure_in_turns
from benchmarks.record import Recorder, quantile

GOAL = 1.02
NAME = "ttft"
FLEX = "farspan-g0.95"
# Half of the layers of 8B: three engines share one GPU, and the layers are all alike.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen0.5b": CALIBRATED_8B
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen1.5b": CALIBRATED_8B
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "llama8b-16layers": CALIBRATED_8B | {"num_hidden_layers": 16},
}
ROOM = {"kv_cache_memory_bytes": 9 * 2**30, "gpu_memory_utilization": 0.3}


def cases(dry_run: bool) -> list[Request]:
    """List prompt lengths; more repeats of the cheap ones."""
    if dry_run:
        return [Request(50, 1, 2), Request(600, 1, 1)]
    lengths = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
    return [Request(length, 1, 5 if length <= 16384 else 3) for length in lengths]


def engines(model: dict[str, Any], requests: list[Request], dry_run: bool) -> dict[str, EngineSpec]:
    """FLASH_ATTN (on the CPU vLLM's own), our dense prefill, and flex as it is by default."""
    options: dict[str, tuple[str | None, dict[str, Any] | None]] = {
        "fa3": (None if dry_run else "FLASH_ATTN", None),
        "farspan": ("CUSTOM", {}),
        FLEX: ("CUSTOM", {"prefill": {"method": "flex"}}),
    }
    engine = {} if dry_run else ROOM | {"enable_prefix_caching": False}
    return {
        name: EngineSpec(requests, model, backend, given, engine, warmup_lens=[requests[-1].prompt_len])
        for name, (backend, given) in options.items()
    }


def ratio(results: dict[str, EngineResult], prompt_len: int) -> float:
    """Median time of flex over that of the faster dense engine."""
    medians = {
        name: quantile([timing.ttft_ms for timing in result.of(prompt_len)], 0.5) for name, result in results.items()
    }
    return medians[FLEX] / min(ms for name, ms in medians.items() if name != FLEX)


def run(recorder: Recorder) -> None:
    shapes = {"tiny": TINY_LLAMA} if recorder.dry_run else SHAPES
    requests = cases(recorder.dry_run)
    for label, model in shapes.items():
        results = measure_in_turns(engines(model, requests, recorder.dry_run), timeout_s=600)
        for request in requests:
            case = f"n{request.prompt_len}-b1-{label}-{'fp32' if recorder.dry_run else 'bf16'}"
            for name, result in results.items():
                recorder.add(NAME, case, name, "time", "ms", [each.ttft_ms for each in result.of(request.prompt_len)])
            found = ratio(results, request.prompt_len)
            verdict = "reached" if found <= GOAL else "MISSED"
            recorder.note(f"{case}: flex takes {found:.3f} of the faster dense prefill, goal {GOAL} {verdict}")
