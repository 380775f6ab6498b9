"""Whether flex is ever slower than dense: time to the first token with the default options, in shapes of 0.5B to 8B.

FLASH_ATTN, our dense prefill and flex answer the same whole prompts in turns on one GPU. The goal is 1.02 times the
faster of the dense ones or less, at every length; what misses it is noted. `--shapes`, `--lengths` and `--variants`
choose among them; all layers of the 8B shape, gamma 0.9 and `fa3-again` run where they are named. The last is a second
engine of FLASH_ATTN: what it differs by from the first tells how much of a ratio is the host's noise. With `--model`,
`--text` and `--label` a checkpoint reads texts instead; with `--turns` short turns follow a cached prefix of each
length.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.engine import CALIBRATED_8B, TINY_LLAMA, EngineResult, EngineSpec, Request, measure_in_turns
from benchmarks.record import BenchmarkError, Recorder, quantile

GOAL = 1.02
NAME = "ttft"
FLEX = "farspan-g0.95"
CONTROL = "fa3-again"
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
    "llama8b": CALIBRATED_8B,
}
USUAL_SHAPES = ("qwen0.5b", "qwen1.5b", "llama8b-16layers")
LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
OPTIONS: dict[str, dict[str, Any] | None] = {
    "fa3": None,
    CONTROL: None,
    "farspan": {},
    FLEX: {"prefill": {"method": "flex"}},
    "farspan-g0.9": {"prefill": {"method": "flex", "gamma": 0.9}},
}
"""Of the engines; None is FLASH_ATTN, on the CPU vLLM's own backend."""
USUAL_VARIANTS = ("fa3", "farspan", FLEX)
KV_BLOCKS_MORE = 64
"""Blocks of 128 tokens of KV cache besides those of the longest prompt."""


@dataclass(frozen=True)
class Checkpoint:
    """Trained weights, and what they read."""

    folder: Path
    """With config.json and tokenizer."""
    texts: tuple[Path, ...]
    label: str


def cases(dry_run: bool) -> list[Request]:
    """List prompt lengths; more repeats of the cheap ones, whose times vary more."""
    return requests_of(LENGTHS, dry_run)


def requests_of(
    lengths: Sequence[int], dry_run: bool, repeats: int | None = None, turns: Sequence[int] = ()
) -> list[Request]:
    """Requests of each length, in ascending order. repeats: as many as fit the length if None.

    turns: tokens that are asked behind a cached prefix of each length, instead of whole prompts. Raises BenchmarkError
    where two of these have as many tokens in all, by which results are told apart.
    """
    if dry_run and not turns:
        return [Request(50, 1, 2), Request(600, 1, 1)]
    if turns:
        behind = [512] if dry_run else sorted(lengths)
        asked = [Request(length + turn, 1, repeats or 10, None, length) for length in behind for turn in sorted(turns)]
        if len({request.prompt_len for request in asked}) < len(asked):
            raise BenchmarkError(
                f"lengths {behind} with turns {sorted(turns)}: two prompts have the same length; run them apart"
            )
        return asked
    usual = {length: 20 if length <= 4096 else 5 if length <= 16384 else 3 for length in sorted(lengths)}
    return [Request(length, 1, repeats or count) for length, count in usual.items()]


def engines(
    model: dict[str, Any], requests: list[Request], dry_run: bool, variants: Sequence[str] = USUAL_VARIANTS
) -> dict[str, EngineSpec]:
    """The engines of some variants."""
    engine: dict[str, Any] = {}
    if not dry_run:
        token_bytes = 2 * 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"]
        blocks = -(-requests[-1].prompt_len // 128) + KV_BLOCKS_MORE
        engine = {"kv_cache_memory_bytes": blocks * 128 * token_bytes, "gpu_memory_utilization": 0.3}
    engine["enable_prefix_caching"] = any(request.cached_len > 0 for request in requests)
    return {
        name: EngineSpec(
            requests,
            model,
            "CUSTOM" if OPTIONS[name] is not None else None if dry_run else "FLASH_ATTN",
            OPTIONS[name],
            engine,
            warmup_lens=[requests[-1].prompt_len],
        )
        for name in variants
    }


def ratio(results: dict[str, EngineResult], prompt_len: int, flex: str, fraction: float = 0.5) -> float:
    """Time of flex over that of the faster dense engine, the control left out; medians, or another quantile."""
    times = {
        name: quantile([timing.ttft_ms for timing in result.of(prompt_len)], fraction)
        for name, result in results.items()
    }
    return times[flex] / min(ms for name, ms in times.items() if not is_flex(name) and name != CONTROL)


def is_flex(variant: str) -> bool:
    return "prefill" in (OPTIONS[variant] or {})


def run(
    recorder: Recorder,
    shapes: Sequence[str] = (),
    lengths: Sequence[int] = (),
    variants: Sequence[str] = (),
    repeats: int | None = None,
    checkpoint: Checkpoint | None = None,
    engine_args: dict[str, Any] | None = None,
    turns: Sequence[int] = (),
) -> None:
    """Run what is named, the usual where nothing is. Raises BenchmarkError for unknown names, or no dense variant.

    checkpoint: runs instead of the shapes. engine_args: further arguments of `vllm.LLM`; with `compilation_config`
    cases are named `-compiled`. turns: see `requests_of`.
    """
    shapes, lengths, variants = shapes or USUAL_SHAPES, lengths or LENGTHS, variants or USUAL_VARIANTS
    for name, chosen, known in (("shapes", shapes, SHAPES), ("variants", variants, OPTIONS)):
        if unknown := set(chosen) - set(known):
            raise BenchmarkError(f"{name} {sorted(unknown)}; known are {', '.join(known)}")
    if all(is_flex(name) or name == CONTROL for name in variants):
        raise BenchmarkError(f"variants {list(variants)}; flex is held against a dense one, fa3 or farspan")
    models = {"tiny": TINY_LLAMA} if recorder.dry_run else {label: SHAPES[label] for label in shapes}
    if checkpoint is not None:
        models = {checkpoint.label: json.loads((checkpoint.folder / "config.json").read_text())}
    requests = requests_of(lengths, recorder.dry_run, repeats, turns)
    for label, model in models.items():
        specs = engines(model, requests, recorder.dry_run, variants)
        if checkpoint is not None:
            of_checkpoint: dict[str, Any] = {"model_dir": str(checkpoint.folder), "texts": checkpoint.texts}
            specs = {name: replace(spec, **of_checkpoint) for name, spec in specs.items()}
        if engine_args:
            specs = {name: replace(spec, engine=spec.engine | engine_args) for name, spec in specs.items()}
        form = "fp32" if recorder.dry_run else "bf16"
        form += "-compiled" if "compilation_config" in (engine_args or {}) else ""

        def tell(request: Request, results: dict[str, EngineResult], name: str = f"b1-{label}-{form}") -> None:
            record(recorder, request, results, name)

        measure_in_turns(specs, timeout_s=600, tell=tell)


def record(recorder: Recorder, request: Request, results: dict[str, EngineResult], name: str) -> None:
    """Record what the engines took for one request, and say how flex stands. name: of model and form in cases."""
    chunk = f"q{request.prompt_len - request.cached_len}-" if request.cached_len > 0 else ""
    case = f"{chunk}n{request.prompt_len}-{name}"
    for variant, result in results.items():
        recorder.add(NAME, case, variant, "time", "ms", [each.ttft_ms for each in result.of(request.prompt_len)])
    for variant in filter(lambda variant: is_flex(variant) or variant == CONTROL, results):
        found, low = (ratio(results, request.prompt_len, variant, each) for each in (0.5, 0.2))
        verdict = ""
        if variant != CONTROL:
            verdict = f", goal {GOAL} {'reached' if found <= GOAL else 'MISSED'}"
        recorder.note(f"{case}: {variant} takes {found:.3f} of the faster dense prefill{verdict}; {low:.3f} by p20")
