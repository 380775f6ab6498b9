"""Speculative decoding through vLLM: greedy tokens are those without it, however many drafts are right."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_engine_features import METHODS
from tests.integration.test_engine_tokens import generate, make_prompts, run

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

DRAFTS = 4
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SIZES: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 16, "block_size": 32}


def repeating(length: int, period: int, seed: int) -> list[int]:
    """A prompt whose end was seen before, so that there is always something to draft."""
    (words,) = make_prompts((period,), seed)
    return (words * (length // period + 1))[:length]


# Chunks of 256 tokens: prompts within one, over several, and with last chunks as short as a draft.
PROMPTS = [
    repeating(length, period, seed)
    for seed, (length, period) in enumerate([(1, 1), (3, 2), (40, 7), (129, 20), (258, 30), (515, 64), (700, 90)])
]
BUDGETS = [30, 25, 40, 30, 20, 30, 16]


def counted(llm: Any) -> dict[str, int]:
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    return {metric.name: metric.value for metric in llm.get_metrics() if metric.name in names}


@pytest.fixture(scope="module")
def start(make_module_llm: Callable[..., Any]) -> Callable[..., Any]:
    def start_engine(method: str | None, **arguments: Any) -> Any:
        options = {} if method is None else {"additional_config": {"farspan": METHODS[method]}}
        backend = None if method is None else "CUSTOM"
        return make_module_llm("llama", backend, **{**SIZES, **options, "disable_log_stats": False, **arguments})

    return start_engine


@pytest.fixture(scope="module")
def without(start: Callable[..., Any]) -> Callable[[str], list[list[int]]]:
    """Greedy tokens without drafts: of vLLM's own backend, or, as string moves keys, of ours."""
    found: dict[str | None, list[list[int]]] = {}

    def tokens(method: str) -> list[list[int]]:
        stock = "string" if method == "string" else None
        if stock not in found:
            found[stock] = generate(start(stock), PROMPTS, BUDGETS)
        return found[stock]

    return tokens


@pytest.mark.parametrize("method", ["dense", "flex", "block_sparse", "string"])
def test_speculative_decoding(start: Callable[..., Any], without: Callable[[str], Any], method: str) -> None:
    expected = without(method)
    llm = start(method, speculative_config=NGRAM)
    assert generate(llm, PROMPTS, BUDGETS) == expected
    # One by one, with prefixes that are cached already, and in another order, so that drafts meet other lengths.
    assert [generate(llm, [prompt], [budget])[0] for prompt, budget in zip(PROMPTS, BUDGETS, strict=True)] == expected
    order = random.Random(1).sample(range(len(PROMPTS)), len(PROMPTS))
    outputs = run(llm, [PROMPTS[each] for each in order], [BUDGETS[each] for each in order])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [expected[each] for each in order]
    assert outputs[order.index(6)].num_cached_tokens > 512
    drafted, accepted = (counted(llm)[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    assert 0 < accepted < drafted
