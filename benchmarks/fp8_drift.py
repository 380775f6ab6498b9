"""What an fp8 KV cache changes on a real checkpoint and real texts: log-probs and greedy tokens, against a plain cache.

Of this backend and, where it serves such a cache, of vLLM's own, each against itself; prompts and second halves as in
`real`. Without a checkpoint the bundled model reads its own questions in a dry run, and nothing otherwise.
"""

from pathlib import Path
from typing import Any

import torch
from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.audit import AuditSettings, Probe, change_of_probes, cut_prompts, read_prompt, read_tokens
from farspan.evaluation.evaluate import EvalSettings, engine_arguments, open_engine

from benchmarks.real import Inputs, on_texts
from benchmarks.record import BenchmarkError, Recorder

NAME = "fp8_drift"
CHUNK = 2048
BACKENDS: dict[str, dict[str, Any] | None] = {"farspan": {}, "vllm": None}
"""Options of this backend; None for the one that vLLM chooses."""

NEEDS_GPU = False


def cases(dry_run: bool) -> list[int]:
    """List the lengths of the dry run; those of a checkpoint come from the command line."""
    return [1024] if dry_run else []


def run(recorder: Recorder, inputs: Inputs | None) -> None:
    on_texts(recorder, inputs, measure, lengths=tuple(cases(True)), prompts=1, questions=0)


def measure(recorder: Recorder, inputs: Inputs) -> None:
    """Read all prompts with both caches, backend by backend. Raises BenchmarkError where this backend is refused."""
    if unknown := set(inputs.variants) - BACKENDS.keys():
        raise BenchmarkError(f"variants {sorted(unknown)}; known are {', '.join(BACKENDS)}")
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    for name in inputs.variants or BACKENDS:
        found = {}
        for cache in ("auto", "fp8"):
            try:
                found[cache] = read_all(inputs, BACKENDS[name], {"kv_cache_dtype": cache})
            except ConfigError as refusal:
                if BACKENDS[name] is not None:
                    raise BenchmarkError(f"{name} with kv_cache_dtype={cache!r}: {refusal}") from refusal
                recorder.note(f"{name} with kv_cache_dtype={cache!r} is left out: {refusal}")
                break
        else:
            for length, plain in found["auto"].items():
                change = change_of_probes(plain, found["fp8"][length])
                case = f"n{length}-{inputs.label}-{dtype}"
                for metric, unit, value in (
                    ("drift", "nats/token", change.drift),
                    ("drift_error", "nats/token", change.drift_error),
                    ("changed", "fraction", change.changed),
                ):
                    recorder.add(NAME, case, f"{name}-fp8", metric, unit, [value])


def read_all(inputs: Inputs, options: dict[str, Any] | None, cache: dict[str, Any]) -> dict[int, list[Probe]]:
    """Read the prompts of every length in one engine. Raises ConfigError for what vLLM refuses."""
    audit = AuditSettings(inputs.model, inputs.texts, inputs.lengths, (), Path(), inputs.prompts)
    prompts = cut_prompts(audit, read_tokens(audit.model, audit.texts))
    room = {"enforce_eager": True, "max_num_seqs": 1, "max_model_len": max(inputs.lengths)}
    settings = EvalSettings(
        inputs.model, (), inputs.lengths, Path(), count=1, chunk=CHUNK, engine_args=room | inputs.engine_args | cache
    )
    with open_engine(inputs.model, engine_arguments(settings, options)) as llm:
        return {length: [read_prompt(llm, tokens, {}) for tokens in mine] for length, mine in prompts.items()}
