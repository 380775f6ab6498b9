"""Answers of trained models whose decode reads a choice of the pages in host memory, beside exact decode.

`--checkpoint DIR` of models, as for `benchmarks.offload_exact`; without one the bundled model in a dry run. Greedy,
one request at a time, in engines with slots for what a step writes and a few pages more; in float32 on a CPU.
`accuracy` is the score of questions whose answers, after their first word, come from decode; `changed` the share of
the tokens that continue this repository's code otherwise than with exact decode; `density` the share of the pages in
host memory that were read.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from farspan.evaluation.evaluate import EvalSettings, make_samples
from farspan.evaluation.results import Cell
from farspan.needle import model_dir
from farspan.needle.tasks import Sample, score
from farspan.scheduler.capacity import bounds_bytes_of, needed_blocks
from farspan.tokenizer import load_tokenizer

from benchmarks.engine import WORKER_ENV
from benchmarks.engine_worker import ENGINE, selected_pages
from benchmarks.offload_exact import COLD, specs_of
from benchmarks.record import ROOT, BenchmarkError, Recorder

NEEDS_GPU = False
PAGE_SIZE = 128
STEP_TOKENS = 1024
SELECT = "farspan-offload-select"
VARIANTS: dict[str, dict[str, Any]] = {
    COLD: {},
    SELECT: {"cold_decode": {"method": "select"}},
    f"{SELECT}-0.8": {"cold_decode": {"method": "select", "coverage": 0.8}},
}
TASKS = ("niah_single", "niah_multiquery", "niah_multivalue")
ROOM = 192
"""Tokens of a length that are left to the answer."""
CONTINUED = 64
"""Tokens that continue a text."""


def cases(dry_run: bool) -> list[tuple[int, int, int]]:
    """List lengths, prompt and answer together, with how many questions of each task and texts each has."""
    if dry_run:
        return [(4096, 1, 1)]
    return [(8192, 10, 4), (32768, 5, 2)] if torch.cuda.is_available() else [(4096, 4, 2)]


def dtype_here() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def questions_of(model: str, length: int, count: int) -> dict[str, list[Sample]]:
    """By task."""
    settings = EvalSettings(model, TASKS, (length - ROOM,), Path(), count=count)
    return {task: make_samples(settings, Cell(task, task, length - ROOM, None, 0, count)) for task in TASKS}


def texts_of(model: str, length: int, count: int) -> list[list[int]]:
    """Tokens of this repository's code, one prompt after another, from the beginning again where it ends."""
    tokenizer = load_tokenizer(model)
    files = sorted((ROOT / "engine_ext").rglob("*.py"))
    tokens = list(tokenizer.encode("\n".join(path.read_text() for path in files)))
    prompt_len = length - CONTINUED
    tokens *= -(-prompt_len * count // len(tokens))
    return [tokens[start : start + prompt_len] for start in range(0, prompt_len * count, prompt_len)]


def selection_bytes(config: dict[str, Any], num_blocks: int) -> int:
    """What selective decode of one request takes of the memory for KV: bounds of the keys of all blocks, buffers."""
    num_q_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_q_heads
    num_layers = config["num_hidden_layers"]
    element_bytes = dtype_here().itemsize
    bounds = bounds_bytes_of(num_layers * num_kv_heads, PAGE_SIZE, head_dim, element_bytes)
    of_pages = 4 + 4 * num_kv_heads + 8 * num_q_heads
    return num_blocks * (bounds + of_pages) + num_layers * num_q_heads * (head_dim * element_bytes + 8)


@contextmanager
def engine(model: str, max_len: int, offload: dict[str, Any]) -> Iterator[Any]:
    """An engine whose pages are nearly all on the host; an `LLM`."""
    from vllm import LLM

    config = json.loads(Path(model, "config.json").read_text())
    spec = specs_of(config, max_len, STEP_TOKENS, PAGE_SIZE, dtype_here())[COLD]
    arguments: dict[str, Any] = ENGINE | spec.engine
    if not torch.cuda.is_available():
        del arguments["compilation_config"]
        arguments["enforce_eager"] = True
    if offload:
        arguments["kv_cache_memory_bytes"] += selection_bytes(config, needed_blocks(max_len, PAGE_SIZE))
    assert spec.options is not None
    options = {"farspan": {"offload": {**spec.options["offload"], **offload}}}
    llm = LLM(model, attention_backend="CUSTOM", additional_config=options, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generated(llm: Any, prompt: Any, most: int) -> Any:
    """Greedy; the one completion."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=not isinstance(prompt, str))
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return output.outputs[0]


def measure(recorder: Recorder, model: str, label: str) -> None:
    """Run the variants one after the other, exact decode first. model: a folder, or `needle`."""
    folder = str(model_dir()) if model == "needle" else model
    config = json.loads(Path(folder, "config.json").read_text())
    limit = config["max_position_embeddings"]
    asked = {min(length, limit): counts for length, *counts in cases(recorder.dry_run)}
    questions = {length: questions_of(model, length, count) for length, (count, _) in asked.items()}
    texts = {length: texts_of(folder, length, count) for length, (_, count) in asked.items()}
    exact: dict[int, list[list[int]]] = {}
    for name, offload in VARIANTS.items():
        with engine(folder, max(asked), offload) as llm:
            for length in asked:
                case = f"n{length}-b1-{label}-{'bf16' if torch.cuda.is_available() else 'fp32'}"
                before = llm.collective_rpc(selected_pages)[0]
                for task, samples in questions[length].items():
                    scores = [
                        score(generated(llm, each.prompt, min(each.max_new_tokens, ROOM - 1)).text, each)
                        for each in samples
                    ]
                    mean = sum(scores) / len(scores)
                    recorder.add("offload_decode", f"{case}-{task}", name, "accuracy", "fraction", [mean])
                    recorder.note(f"{case}-{task} {name}: {mean:.3f} of {len(scores)} questions")
                found = [
                    list(generated(llm, {"prompt_token_ids": text}, CONTINUED).token_ids) for text in texts[length]
                ]
                if name == COLD:
                    exact[length] = found
                    continue
                pairs = [pair for a, b in zip(found, exact[length], strict=True) for pair in zip(a, b, strict=True)]
                changed = sum(a != b for a, b in pairs) / len(pairs)
                recorder.add("offload_decode", case, name, "changed", "fraction", [changed])
                after = llm.collective_rpc(selected_pages)[0]
                num_read, num_pages = (last - first for last, first in zip(after, before, strict=True))
                if num_pages == 0:
                    raise BenchmarkError(f"{case}: no page lay on the host")
                recorder.add("offload_decode", case, name, "density", "fraction", [num_read / num_pages])


def run(recorder: Recorder) -> None:
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if recorder.dry_run:
        measure(recorder, "needle", "needle")
    for folder in recorder.checkpoints:
        measure(recorder, str(folder), folder.name)
    if not recorder.dry_run and not recorder.checkpoints:
        recorder.note("no checkpoint: name one with --checkpoint")
