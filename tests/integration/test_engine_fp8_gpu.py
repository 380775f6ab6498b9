"""A KV cache in fp8 on a GPU: tokens in CUDA graphs, and how far log-probabilities move from bfloat16's."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_engine_speculation import BUDGETS, NGRAM, PROMPTS, SIZES
from tests.integration.test_engine_speculation_gpu import GRAPHS
from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

IN_GRAPHS = {**SIZES, "block_size": 128, "enforce_eager": False, "compilation_config": GRAPHS}
LONG = make_prompts((1500, 900, 600), seed=3)


def scores(llm: Any) -> list[float]:
    """Log-probabilities of the tokens of `LONG`, prompts in chunks."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in LONG], params, use_tqdm=False)
    return [
        step[token].logprob
        for prompt, output in zip(LONG, outputs, strict=True)
        for step, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]


def distance(found: list[float], expected: list[float]) -> float:
    """Root mean square of the differences, nats."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(found, expected, strict=True)) / len(found))


def test_drift_is_no_more_than_that_of_the_stock_backend(make_llm: Callable[..., Any]) -> None:
    found: dict[str, tuple[list[float], list[list[int]]]] = {}
    for backend, dtype in (("CUSTOM", "auto"), ("CUSTOM", "fp8"), ("FLASH_ATTN", "auto"), ("FLASH_ATTN", "fp8")):
        arguments = {**IN_GRAPHS, "dtype": "bfloat16", "kv_cache_dtype": dtype}
        try:
            llm = make_llm("llama", backend, **arguments)
        except Exception as problem:  # the stock backend may not serve it here
            if backend == "CUSTOM":
                raise
            print(f"{backend} {dtype}: {problem}")
            continue
        found[f"{backend} {dtype}"] = scores(llm), generate(llm, PROMPTS, BUDGETS)
        llm.llm_engine.engine_core.shutdown()
    ours = distance(found["CUSTOM fp8"][0], found["CUSTOM auto"][0])
    print("rms drift of farspan in fp8:", ours)
    for name, (each, tokens) in found.items():
        same = sum(
            a == b for x, y in zip(tokens, found["CUSTOM auto"][1], strict=True) for a, b in zip(x, y, strict=True)
        )
        print(name, "rms to farspan in bf16:", distance(each, found["CUSTOM auto"][0]), "tokens alike:", same)
    assert 0 < ours < 0.5
    if "FLASH_ATTN fp8" in found:
        assert ours <= 1.1 * distance(found["FLASH_ATTN fp8"][0], found["FLASH_ATTN auto"][0])


def test_drafts_in_graphs(make_llm: Callable[..., Any]) -> None:
    """In float16, where all launches round alike, drafts change few tokens."""
    reference = make_llm("llama", dtype="float16", kv_cache_dtype="fp8", **IN_GRAPHS)
    expected = generate(reference, PROMPTS, BUDGETS)
    reference.llm_engine.engine_core.shutdown()
    flex = {"farspan": {"prefill": {"method": "flex", "min_seq_len": 0, "min_chunk_len": 0}}}
    arguments = {**IN_GRAPHS, "kv_cache_dtype": "fp8", "speculative_config": NGRAM}
    llm = make_llm("llama", dtype="float16", **arguments)
    found = generate(llm, PROMPTS, BUDGETS)
    llm.llm_engine.engine_core.shutdown()
    same = sum(a == b for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
    print("tokens alike with drafts:", same, "of", sum(BUDGETS))
    assert same >= 0.7 * sum(BUDGETS)
    sparse = make_llm("llama", dtype="bfloat16", additional_config=flex, **arguments)
    assert all(
        len(tokens) == budget for tokens, budget in zip(generate(sparse, PROMPTS, BUDGETS), BUDGETS, strict=True)
    )
