"""Greedy tokens through vLLM with farspan equal those of vLLM's own CPU backend."""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

LENGTHS = (1, 63, 128, 129, 700, 1000)
"""Prompts in tokens: shorter than a page, on its edges, and over several."""
VOCAB = 512


def make_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def generate(llm: Any, prompts: list[list[int]], max_tokens: int | list[int] = 12) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    return [list(output.outputs[0].token_ids) for output in run(llm, prompts, max_tokens)]


def run(llm: Any, prompts: list[list[int]], max_tokens: int | list[int] = 12) -> list[Any]:
    from vllm import SamplingParams

    budgets = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    params = [SamplingParams(temperature=0, max_tokens=budget, ignore_eos=True) for budget in budgets]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def launches(llm: Any) -> dict[str, int]:
    """Counts of our paths; fails if any layer's attention is not ours."""
    (found,) = llm.collective_rpc("attention_launches")
    assert list(found) == ["FarspanImpl"]
    return found["FarspanImpl"]


_stock_tokens: dict[str, list[list[int]]] = {}


@pytest.fixture
def stock_tokens(make_llm: Any) -> Callable[..., list[list[int]]]:
    """Tokens of vLLM's own backend, each set of prompts computed once.

    The engine lives as long as the test: the end of one takes the process groups of all others in the process along.
    """
    engines: dict[str, Any] = {}

    def tokens(architecture: str, prompts: list[list[int]], max_tokens: int | list[int] = 12) -> list[list[int]]:
        key = repr((architecture, prompts, max_tokens))
        if key not in _stock_tokens:
            if architecture not in engines:
                engines[architecture] = make_llm(architecture, None, enable_prefix_caching=False)
            _stock_tokens[key] = generate(engines[architecture], prompts, max_tokens)
        return _stock_tokens[key]

    return tokens


@pytest.mark.parametrize(("chunk", "page"), [(64, 32), (100, 16), (129, 64), (2048, 128)], ids=lambda value: str(value))
def test_chunked_prefill(make_llm: Any, stock_tokens: Any, chunk: int, page: int) -> None:
    prompts = make_prompts(LENGTHS)
    llm = make_llm(max_num_batched_tokens=chunk, max_num_seqs=16, block_size=page, enable_prefix_caching=False)
    got = generate(llm, prompts)
    assert got == stock_tokens("llama", prompts)
    counts = launches(llm)
    assert counts["decode"] > 0
    assert counts["prefill_dense"] > 0
    assert "prefill_sparse" not in counts


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_mixed_batches(make_llm: Any, stock_tokens: Any, architecture: str) -> None:
    llm = make_llm(architecture, max_num_batched_tokens=256, max_num_seqs=16, enable_prefix_caching=False)
    generator = random.Random(1)
    for size in (1, 3, 16):
        prompts = make_prompts(tuple(generator.randrange(1, 400) for _ in range(size)), seed=size)
        budgets = [generator.randrange(1, 20) for _ in range(size)]
        assert generate(llm, prompts, budgets) == stock_tokens(architecture, prompts, budgets)
    assert launches(llm)["decode"] > 0


def test_prefix_cache_hits(make_llm: Any, stock_tokens: Any) -> None:
    llm = make_llm(max_num_batched_tokens=256, max_num_seqs=16, block_size=32, enable_prefix_caching=True)
    prefix, *tails = make_prompts((600, 1, 50, 300))
    prompts = [prefix, *(prefix + tail for tail in tails), prefix[:450], prefix]
    expected = stock_tokens("llama", prompts)
    cached = []
    for prompt, tokens in zip(prompts, expected, strict=True):
        (output,) = run(llm, [prompt])
        assert list(output.outputs[0].token_ids) == tokens
        cached.append(output.num_cached_tokens)
    assert cached[0] == 0
    assert all(tokens >= 448 for tokens in cached[1:4])
    assert cached[-1] >= 576


# Pages for a part of the sixteen requests that run together: they preempt each other.
FEW_PAGES: dict[str, Any] = {
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "max_model_len": 512,
    "block_size": 16,
    "num_gpu_blocks_override": 40,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
PREEMPTING = make_prompts(tuple(range(60, 76)), seed=5)


def num_preemptions(llm: Any) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_preemption(make_llm: Any, stock_tokens: Any) -> None:
    llm = make_llm(**FEW_PAGES)
    assert generate(llm, PREEMPTING, 40) == stock_tokens("llama", PREEMPTING, 40)
    assert num_preemptions(llm) > 0


def test_multiprocess_engine(make_llm: Any, stock_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(LENGTHS)
    expected = stock_tokens("llama", prompts)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = make_llm(max_num_batched_tokens=256, max_num_seqs=16)
    assert generate(llm, prompts) == expected
    assert launches(llm)["prefill_dense"] > 0
