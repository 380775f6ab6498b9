"""Tokens of a request whose pages lie in host memory, but for the few that a step writes, against offload off.

Greedy, in float32. With `--checkpoint DIR` of trained models, on prompts of this repository's own code, as long as the
model allows and 32K at most (on a CPU 4K, where that takes minutes); without one the shape of a 0.5B model with random
weights at 32K. `accuracy` is the share of the tokens that are the same.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from farspan.scheduler.capacity import KVLayout, min_slots, needed_blocks, staging_bytes_of, stub_bytes_of

from benchmarks.engine import TINY_LLAMA, EngineSpec, Request, measure
from benchmarks.flex_ttft import SHAPES
from benchmarks.record import ROOT, BenchmarkError, Recorder

NEEDS_GPU = False
OFF, COLD = "farspan", "farspan-offload-cold"
OUTPUT_LEN = 33
SPARE_SLOTS = 8
LONGEST, LONGEST_ON_CPU = 32768, 4096
STEP_TOKENS, STEP_TOKENS_ON_CPU = 8192, 1024


def cases(dry_run: bool) -> list[int]:
    """List the lengths of prompt and answer together, where the model has as many positions."""
    return [320] if dry_run else [LONGEST if torch.cuda.is_available() else LONGEST_ON_CPU]


def specs_of(
    model: dict[str, Any], max_len: int, step_tokens: int, page_size: int, dtype: torch.dtype = torch.float32
) -> dict[str, EngineSpec]:
    """An engine without offload, and one with slots for what a step writes and a few pages more.

    model: config.json.
    """
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    layout = KVLayout(
        num_kv_heads=model["num_key_value_heads"],
        head_dim=head_dim,
        element_bytes=dtype.itemsize,
        page_size=page_size,
        hot_heads=(0,) * model["num_hidden_layers"],
        stub_bytes=stub_bytes_of(page_size, dtype.itemsize),
    )
    num_blocks = needed_blocks(max_len, page_size)
    num_slots = min_slots(step_tokens, page_size, 1) + SPARE_SLOTS
    cold_bytes = num_slots * layout.cold_block_bytes + num_blocks * layout.hot_block_bytes
    cold_bytes += staging_bytes_of(layout, 1, max_len)
    engine = {
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": page_size,
        "max_model_len": max_len,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": 1,
        "gpu_memory_utilization": 0.4,
    }
    request = Request(max_len - OUTPUT_LEN, OUTPUT_LEN)
    off = EngineSpec([request], model, "CUSTOM", {}, engine)
    off.engine["kv_cache_memory_bytes"] = (num_blocks + 1) * layout.cold_block_bytes
    options = {"offload": {"group_size": 1, "host_memory": (num_blocks + 0.5) * layout.cold_block_bytes / 2**30}}
    cold = replace(off, options=options, engine=engine | {"kv_cache_memory_bytes": cold_bytes})
    return {OFF: off, COLD: cold}


def check(recorder: Recorder, label: str, specs: dict[str, EngineSpec]) -> None:
    """Record how many tokens are the same. Raises BenchmarkError where not all are."""
    results = {name: measure(spec, timeout_s=420) for name, spec in specs.items()}
    (ours,), (other,) = results[COLD].timings, results[OFF].timings
    same = [float(a == b) for a, b in zip(ours.token_ids, other.token_ids, strict=True)]
    share = sum(same) / len(same)
    recorder.add("offload_decode", f"n{ours.prompt_len}-b1-{label}-fp32", COLD, "accuracy", "fraction", [share])
    recorder.note(
        f"{label}, {ours.prompt_len} tokens: {sum(same):.0f} of {len(same)} tokens are those of offload off; first "
        f"token after {ours.ttft_ms / 1e3:.1f} s, {other.ttft_ms / 1e3:.1f} s with offload off"
    )
    if share < 1:
        raise BenchmarkError(f"{label}: other tokens, {ours.token_ids}, than with offload off, {other.token_ids}")


def run(recorder: Recorder) -> None:
    on_gpu = torch.cuda.is_available()
    step_tokens = STEP_TOKENS if on_gpu else STEP_TOKENS_ON_CPU
    (longest,) = cases(recorder.dry_run)
    if recorder.dry_run:
        check(recorder, "tiny", specs_of(TINY_LLAMA, longest, 64, 16))
        return
    for folder in recorder.checkpoints:
        model = json.loads((folder / "config.json").read_text())
        specs = specs_of(model, min(model["max_position_embeddings"], longest), step_tokens, 128)
        texts = tuple(sorted((ROOT / "engine_ext").rglob("*.py")))
        check(
            recorder,
            folder.name,
            {name: replace(spec, model_dir=str(folder), texts=texts) for name, spec in specs.items()},
        )
    if not recorder.checkpoints:
        if not on_gpu:
            raise BenchmarkError("without a GPU offload_exact needs --checkpoint DIR, a folder with a trained model.")
        check(recorder, "qwen0.5b-random", specs_of(SHAPES["qwen0.5b"], longest, step_tokens, 128))
